//! Real PostgreSQL servers of a test's own: each on a free port of the loopback, with its data in a temporary folder,
//! ended and removed on drop. The data is copied from a folder that is made once on this machine.
//!
//! As with [`crate::redis_server`], everything blocks for as long as it takes and panics when that is too long.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

use crate::DEADLINE;
use crate::certificates::Certificates;

const PORTS: Range<u16> = 22_000..30_000;

/// Who runs the server when we are root: it refuses to be that.
const USER: &str = "nobody";

/// A server of this test. Its superuser `postgres` needs no password; whoever is called `shop` does: `secret`.
pub struct PostgresServer {
    port: u16,
    process: Child,
    folder: TempDir,
}

impl PostgresServer {
    /// Returns when it answers.
    pub fn start() -> Self {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let folder = tempfile::Builder::new().prefix("polybus-postgres-").tempdir().unwrap();
            let data = folder.path().join("data");
            run(Command::new("cp").arg("-a").arg(template()).arg(&data));
            let port = fastrand::u16(PORTS);
            own(folder.path());
            let process = spawn(&data, port);
            let mut server = Self { port, process, folder };
            if server.comes_up(deadline) {
                server.sql("CREATE ROLE shop LOGIN PASSWORD 'secret'");
                return server;
            }
            assert!(Instant::now() < deadline, "postgres does not start:\n{}", server.log());
        }
    }

    /// A hot standby of this server, as it is now and with what follows. This server starts again.
    pub fn standby(&mut self) -> Self {
        self.add_rules("host replication all 127.0.0.1/32 trust");
        self.restart();
        let deadline = Instant::now() + DEADLINE;
        loop {
            let folder = tempfile::Builder::new().prefix("polybus-postgres-").tempdir().unwrap();
            own(folder.path());
            let data = folder.path().join("data");
            run(command("pg_basebackup").args(["-d", &self.url(), "-R", "-c", "fast", "-D"]).arg(&data));
            let port = fastrand::u16(PORTS);
            let process = spawn(&data, port);
            let mut server = Self { port, process, folder };
            if server.comes_up(deadline) {
                return server;
            }
            assert!(Instant::now() < deadline, "the standby does not start:\n{}", server.log());
        }
    }

    fn comes_up(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            if self.process.try_wait().unwrap().is_some() {
                return false;
            }
            // Ours writes this file; whoever has our port does not. One that was killed leaves its own behind.
            let told = fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
            let lines: Vec<_> = told.lines().map(str::trim).collect();
            if lines.first() == Some(&&*self.process.id().to_string())
                && matches!(lines.get(7), Some(&"ready" | &"standby"))
            {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("postgres does not come up:\n{}", self.log());
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("data/log")).unwrap_or_default()
    }

    /// For the superuser.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// For `user` or `user:password`.
    pub fn url_of(&self, user: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/postgres", self.port)
    }

    /// A connection for the superuser.
    pub async fn connect(&self) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Runs statements with psql, and answers with the rows: columns divided by `|`.
    pub fn sql(&self, sql: &str) -> String {
        let mut command = Command::new(binary("psql"));
        command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", &self.url(), "-c", sql]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "psql {sql:?}: {told}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Offers TLS from now on, with the certificate for the loopback, and asks clients for theirs. `rules` go before those of
    /// `pg_hba.conf`. Returns when it answers again.
    pub fn offer_tls(&mut self, certificates: &Certificates, rules: &str) {
        let (certificate, key) = certificates.server();
        for (from, name) in [(certificate, "server.crt"), (key, "server.key"), (certificates.authority(), "ca.crt")] {
            let file = self.data().join(name);
            fs::copy(from, &file).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
            own(&file);
        }
        let settings = "\nssl = on\nssl_ca_file = 'ca.crt'\n";
        File::options()
            .append(true)
            .open(self.data().join("postgresql.conf"))
            .unwrap()
            .write_all(settings.as_bytes())
            .unwrap();
        self.add_rules(rules);
        self.restart();
    }

    /// Puts lines before those of `pg_hba.conf`; they hold after the next start.
    pub fn add_rules(&self, rules: &str) {
        let file = self.data().join("pg_hba.conf");
        let others = fs::read_to_string(&file).unwrap();
        fs::write(&file, format!("{rules}\n{others}")).unwrap();
    }

    /// `kill -9` of everything. Returns when it is dead.
    pub fn kill9(&mut self) {
        // The backends notice that their parent is gone; a start waits until they have.
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// A fast end, in which sessions are told that the server goes. Returns when it has ended.
    pub fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&self.process), Signal::INT).unwrap();
        }
        self.process.wait().unwrap();
    }

    /// Starts it again on the same port. Returns when it answers.
    pub fn restart(&mut self) {
        self.stop();
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.process = spawn(&self.data(), self.port);
            if self.comes_up(deadline) {
                return;
            }
            assert!(Instant::now() < deadline, "postgres does not start again:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // An immediate end: backends are gone, too, before the folder goes.
        let _ = kill_process(Pid::from_child(&self.process), Signal::QUIT);
        drop(self.process.wait());
    }
}

fn binary(name: &str) -> PathBuf {
    let mut folders: Vec<_> = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().collect();
    folders.sort_by_key(|folder| folder.file_name());
    let found = folders.iter().rev().map(|folder| folder.path().join("bin").join(name)).find(|path| path.exists());
    found.unwrap_or_else(|| name.into())
}

/// `program` run by somebody who may run a server.
pub(crate) fn command(program: &str) -> Command {
    if !rustix::process::geteuid().is_root() {
        return Command::new(binary(program));
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid", USER, "--regid", "nogroup", "--clear-groups", "--"]).arg(binary(program));
    command
}

/// Gives a folder to who runs the server.
pub(crate) fn own(folder: &Path) {
    if rustix::process::geteuid().is_root() {
        run(Command::new("chown").arg("-R").arg(format!("{USER}:nogroup")).arg(folder));
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).current_dir("/").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}");
}

fn spawn(data: &Path, port: u16) -> Child {
    let mut command = command("postgres");
    command.arg("-D").arg(data).args(["-p", &port.to_string()]).current_dir("/");
    let log = File::options().append(true).create(true).open(data.join("log")).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

/// A folder as initdb makes it. Made once on this machine, by whoever comes first.
fn template() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let folder = std::env::temp_dir().join(format!("polybus-postgres-template-{uid}"));
    let lock = File::create(folder.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if folder.exists() {
        return folder;
    }
    let made = folder.with_extension("new");
    drop(fs::remove_dir_all(&made)); // of somebody who did not finish
    fs::create_dir(&made).unwrap();
    own(&made);
    let mut initdb = command("initdb");
    run(initdb.arg("-D").arg(&made).args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]));
    // A killed server loses nothing without fsync; only a machine without power would.
    let settings = "\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\nmax_connections = 60\n\
                    shared_buffers = 64MB\nmax_prepared_transactions = 10\n";
    let mut config = fs::read_to_string(made.join("postgresql.conf")).unwrap();
    config.push_str(settings);
    fs::write(made.join("postgresql.conf"), config).unwrap();
    fs::write(made.join("pg_hba.conf"), "host all shop 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n")
        .unwrap();
    fs::rename(&made, &folder).unwrap();
    folder
}
