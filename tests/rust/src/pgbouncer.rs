//! A real PgBouncer of a test's own, in transaction mode, in front of a [`PostgresServer`]: ended on drop.

use std::fs::{self, File};
use std::ops::Range;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::DEADLINE;
use crate::postgres_server::{PostgresServer, command, own};

const PORTS: Range<u16> = 30_000..32_000;

/// Lets everybody in, and is `postgres` on the server.
pub struct PgBouncer {
    port: u16,
    process: Child,
    folder: TempDir,
}

impl PgBouncer {
    /// A pool of two sessions on `server`. `settings` are further lines of its file. Returns when it answers.
    pub fn start(server: &PostgresServer, settings: &str) -> Self {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let folder = tempfile::Builder::new().prefix("polybus-pgbouncer-").tempdir().unwrap();
            let port = fastrand::u16(PORTS);
            let config = format!(
                "[databases]\n* = host=127.0.0.1 port={} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
                 listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n\
                 default_pool_size = 2\nserver_login_retry = 0.1\n{settings}\n",
                server.port()
            );
            fs::write(folder.path().join("pgbouncer.ini"), config).unwrap();
            own(folder.path());
            let process = spawn(&folder);
            let mut pool = Self { port, process, folder };
            if pool.comes_up(deadline) {
                return pool;
            }
            assert!(Instant::now() < deadline, "pgbouncer does not start:\n{}", pool.log());
        }
    }

    fn comes_up(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            if self.process.try_wait().unwrap().is_some() {
                return false;
            }
            if self.log().contains("process up") {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("pgbouncer does not come up:\n{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// A connection to it.
    pub async fn connect(&self) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// `kill -9`, and another one in its place.
    pub fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        let deadline = Instant::now() + DEADLINE;
        loop {
            fs::write(self.folder.path().join("log"), "").unwrap();
            self.process = spawn(&self.folder);
            if self.comes_up(deadline) {
                return;
            }
            assert!(Instant::now() < deadline, "pgbouncer does not start again:\n{}", self.log());
        }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn spawn(folder: &TempDir) -> Child {
    let found = PathBuf::from("/usr/sbin/pgbouncer");
    let program = if found.exists() { found } else { "pgbouncer".into() };
    let mut command = command(&program.to_string_lossy());
    let log = File::options().append(true).create(true).open(folder.path().join("log")).unwrap();
    command.arg(folder.path().join("pgbouncer.ini")).current_dir("/");
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}
