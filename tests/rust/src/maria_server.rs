//! Real MariaDB servers of a test's own, as [`crate::postgres_server`] has them of PostgreSQL.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use mysql_async::{Conn, OptsBuilder};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::DEADLINE;
use crate::certificates::Certificates;

const PORTS: Range<u16> = 14_000..22_000;
const DATABASE: &str = "shop";

/// A server of this test. `root` and `relay` may do everything and need no password; whoever is called `shop` does:
/// `secret`.
pub struct MariaServer {
    port: u16,
    process: Child,
    folder: TempDir,
    certificates: Option<Certificates>,
}

impl MariaServer {
    /// Returns when it answers. It knows no TLS.
    pub fn start() -> Self {
        Self::with(None)
    }

    /// With TLS.
    pub fn with(certificates: Option<Certificates>) -> Self {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let folder = tempfile::Builder::new().prefix("polybus-mariadb-").tempdir().unwrap();
            run(Command::new("cp").arg("-a").arg(template()).arg(folder.path().join("data")));
            let port = fastrand::u16(PORTS);
            let process = spawn(folder.path(), port, certificates.as_ref());
            let mut server = Self { port, process, folder, certificates: certificates.clone() };
            if server.comes_up(deadline) {
                let script = format!(
                    "DELETE FROM mysql.global_priv WHERE User = ''; FLUSH PRIVILEGES; CREATE DATABASE {DATABASE};
                     CREATE USER shop IDENTIFIED BY 'secret'; CREATE USER relay; GRANT ALL ON *.* TO relay"
                );
                server.on("mysql", &script);
                return server;
            }
            assert!(Instant::now() < deadline, "mariadb does not start:\n{}", server.log());
        }
    }

    fn comes_up(&mut self, deadline: Instant) -> bool {
        while Instant::now() < deadline {
            // It says so in a log of its own; a port that somebody else has ends it.
            if self.log().contains("ready for connections") {
                return true;
            }
            if self.process.try_wait().unwrap().is_some() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("mariadb does not come up:\n{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// For the user `relay`.
    pub fn url(&self) -> String {
        self.url_of("relay")
    }

    /// For `user` or `user:password`.
    pub fn url_of(&self, user: &str) -> String {
        format!("mysql://{user}@127.0.0.1:{}/{DATABASE}", self.port)
    }

    /// A connection for `root`.
    pub async fn connect(&self) -> Conn {
        let options = OptsBuilder::default().ip_or_hostname("127.0.0.1").tcp_port(self.port);
        Conn::new(options.user(Some("root")).db_name(Some(DATABASE)).prefer_socket(false)).await.unwrap()
    }

    /// Runs statements with the mariadb client, and answers with the rows: columns divided by `|`.
    pub fn sql(&self, sql: &str) -> String {
        self.on(DATABASE, sql)
    }

    fn on(&self, database: &str, sql: &str) -> String {
        let mut command = Command::new("mariadb");
        let port = format!("--port={}", self.port);
        command.args(["--no-defaults", "--host=127.0.0.1", &port, "--user=root", "-N", "-B", "-e", sql, database]);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "mariadb {sql:?}: {told}\n{}", self.log());
        String::from_utf8_lossy(&output.stdout).trim_end().replace('\t', "|")
    }

    /// `kill -9`. Returns when it is dead.
    pub fn kill9(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// An orderly end. Returns when it has ended.
    pub fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_none() {
            kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        }
        self.process.wait().unwrap();
    }

    /// Starts it again on the same port. Returns when it answers.
    pub fn restart(&mut self) {
        self.stop();
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.process = spawn(self.folder.path(), self.port, self.certificates.as_ref());
            if self.comes_up(deadline) {
                return;
            }
            assert!(Instant::now() < deadline, "mariadb does not start again:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for MariaServer {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).current_dir("/").output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {told}");
}

/// It refuses to be root unless it is told to be.
fn as_whoever_we_are() -> Option<&'static str> {
    rustix::process::geteuid().is_root().then_some("--user=root")
}

fn spawn(folder: &Path, port: u16, certificates: Option<&Certificates>) -> Child {
    let place = |name: &str| folder.join(name).display().to_string();
    let mut command =
        Command::new(if Path::new("/usr/sbin/mariadbd").exists() { "/usr/sbin/mariadbd" } else { "mariadbd" });
    command.arg("--no-defaults").args(as_whoever_we_are());
    command.args([format!("--datadir={}", place("data")), format!("--socket={}", place("socket"))]);
    command.args([format!("--pid-file={}", place("pid")), format!("--port={port}")]);
    // A killed server loses nothing without flushes; only a machine without power would.
    command.args(["--bind-address=127.0.0.1", "--skip-log-bin", "--innodb-flush-log-at-trx-commit=2"]);
    command.args(["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-flush-method=nosync"]);
    if let Some(certificates) = certificates {
        let (certificate, key) = certificates.server();
        command.arg(format!("--ssl-ca={}", certificates.authority().display()));
        command.arg(format!("--ssl-cert={}", certificate.display())).arg(format!("--ssl-key={}", key.display()));
    }
    let log = File::create(folder.join("log")).unwrap();
    command.current_dir("/").stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap()
}

/// A folder as mariadb-install-db makes it. Made once on this machine, by whoever comes first.
fn template() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    let folder = std::env::temp_dir().join(format!("polybus-mariadb-template-{uid}"));
    let lock = File::create(folder.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if folder.exists() {
        return folder;
    }
    let made = folder.with_extension("new");
    drop(fs::remove_dir_all(&made)); // of somebody who did not finish
    let mut install = Command::new("mariadb-install-db");
    install.arg("--no-defaults").args(as_whoever_we_are()).arg(format!("--datadir={}", made.display()));
    install.args(["--auth-root-authentication-method=normal", "--skip-test-db", "--innodb-log-file-size=8M"]);
    run(&mut install);
    fs::rename(&made, &folder).unwrap();
    folder
}
