//! Real Redis servers of a test's own: each on a free port of the loopback, with its data in a temporary folder, killed
//! and removed on drop. Plain, with TLS, as a replica, watched by sentinels, or as a cluster.
//!
//! Everything here blocks for as long as it takes and panics when that is too long: a test that cannot set the stage
//! must fail. A server cannot be reached by its name, only by `url`, so a test may run beside any other.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::ops::Range;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

use crate::DEADLINE;
use crate::certificates::Certificates;

/// Below what systems give to outgoing connections, which would take the port of a server that is down; and low enough
/// for a cluster's second port, which is 10 000 higher.
const PORTS: Range<u16> = 10_000..22_000;

/// What a server is started with.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Append-only file with this `appendfsync`: `always`, `everysec` or `no`. Default: none, and no snapshots either.
    pub appendfsync: Option<&'static str>,
    /// Needed by every client.
    pub password: Option<&'static str>,
    /// As Redis writes it: `10mb`. Beyond it writes are refused, unless `more` sets another policy.
    pub maxmemory: Option<&'static str>,
    /// Speak TLS only.
    pub tls: Tls,
    /// Port of the master, on this machine. It must have the same password.
    pub replica_of: Option<u16>,
    /// Any other directives: `("maxmemory-policy", "allkeys-lru")`.
    pub more: Vec<(&'static str, String)>,
}

/// Whether a server speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tls {
    /// No.
    #[default]
    Off,
    /// With certificates of its own, made for this server.
    On,
    /// Clients show a certificate, too.
    Mutual,
}

/// What a restart finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// What the server had written, if it writes at all.
    Kept,
    /// Nothing: the folder is emptied.
    Lost,
}

/// A server of this test.
pub struct RedisServer {
    options: Options,
    port: u16,
    sentinel: bool,
    process: Child,
    certificates: Option<Certificates>,
    folder: TempDir,
}

impl RedisServer {
    /// A server that keeps nothing, without a password.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    /// A server with these options. Returns when it answers.
    pub fn with(options: Options) -> Self {
        Self::launch(options, None)
    }

    fn launch(options: Options, sentinel: Option<&str>) -> Self {
        let certificates = (options.tls != Tls::Off).then(Certificates::new);
        let deadline = Instant::now() + DEADLINE;
        loop {
            let folder = tempfile::Builder::new().prefix("polybus-redis-").tempdir().unwrap();
            fs::create_dir(folder.path().join("data")).unwrap();
            let port = fastrand::u16(PORTS);
            write_config(folder.path(), port, &options, certificates.as_ref(), sentinel);
            let process = spawn(folder.path(), sentinel.is_some());
            let (options, certificates) = (options.clone(), certificates.clone());
            let mut server = Self { options, port, sentinel: sentinel.is_some(), process, certificates, folder };
            if server.comes_up(deadline) {
                return server;
            }
            assert!(Instant::now() < deadline, "redis-server does not start:\n{}", server.log());
        }
    }

    /// Waits until it answers. False when it ended by itself, as it does when its port is taken.
    fn comes_up(&mut self, deadline: Instant) -> bool {
        let our_own = format!("process_id:{}\r", self.process.id());
        while Instant::now() < deadline {
            if self.process.try_wait().unwrap().is_some() {
                return false;
            }
            // Another test's server may have the port, and answer: this must be ours, and done with loading.
            if self.ask(&["INFO", "server"]).contains(&our_own) && self.ask(&["PING"]).trim() == "PONG" {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server on port {} does not answer:\n{}", self.port, self.log());
    }

    /// The URL for a bus, with everything that it needs to connect.
    pub fn url(&self) -> String {
        let password = self.options.password.map_or(String::new(), |password| format!(":{password}@"));
        match &self.certificates {
            None => format!("redis://{password}{}", self.address()),
            Some(made) => {
                let mut url = format!("rediss://{password}{}?ca_file={}", self.address(), made.authority().display());
                if self.options.tls == Tls::Mutual {
                    let (certificate, key) = made.client();
                    write!(url, "&cert_file={}&key_file={}", certificate.display(), key.display()).unwrap();
                }
                url
            }
        }
    }

    /// As [`RedisServer::url`], for `redis+pubsub://`.
    pub fn pubsub_url(&self) -> String {
        self.url().replacen("redis://", "redis+pubsub://", 1)
    }

    /// `127.0.0.1:<port>`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Of its TLS, and of clients.
    pub fn certificates(&self) -> Option<&Certificates> {
        self.certificates.as_ref()
    }

    /// Runs a command with redis-cli. Panics when the server cannot be reached, is too slow or answers with an error.
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = self.redis_cli().arg("-e").args(arguments).output().unwrap();
        let (told, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "redis-cli {arguments:?}: {told}{wrong}\n{}", self.log());
        told.trim_end().to_owned()
    }

    /// As [`RedisServer::cli`], whatever comes of it.
    fn ask(&self, arguments: &[&str]) -> String {
        let output = self.redis_cli().args(arguments).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Asks again until the answer to a command contains `expected`.
    pub fn until(&self, arguments: &[&str], expected: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let answer = self.ask(arguments);
            if answer.contains(expected) {
                return;
            }
            assert!(Instant::now() < deadline, "{arguments:?} never answered {expected}, but {answer}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn redis_cli(&self) -> Command {
        let mut command = Command::new("redis-cli");
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string()]).stdin(Stdio::null());
        match self.options.password {
            Some(password) => command.env("REDISCLI_AUTH", password),
            None => command.env_remove("REDISCLI_AUTH"),
        };
        if let Some(certificates) = &self.certificates {
            let (certificate, key) = certificates.client();
            command.arg("--tls").arg("--cacert").arg(certificates.authority());
            command.arg("--cert").arg(certificate).arg("--key").arg(key);
        }
        command
    }

    /// `kill -9`: nothing is flushed, connections are reset. Returns when it is dead.
    pub fn kill9(&mut self) {
        self.process.kill().unwrap(); // nothing happens if it has ended
        self.process.wait().unwrap();
    }

    /// An orderly end, by SIGTERM. Returns when it has ended.
    pub fn stop(&mut self) {
        if self.process.try_wait().unwrap().is_none() {
            self.signal(Signal::TERM);
        }
        self.process.wait().unwrap();
    }

    /// The server stands still with its connections open: half-open, as clients see it. Returns when it does.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
        waitpid(Some(self.pid()), WaitOptions::UNTRACED).unwrap();
    }

    /// The server goes on where it was paused.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Starts again on the same port, after an orderly end if it runs. Returns when it answers.
    pub fn restart(&mut self, data: Data) {
        self.stop();
        if data == Data::Lost {
            let data = self.folder.path().join("data");
            fs::remove_dir_all(&data).unwrap();
            fs::create_dir(&data).unwrap();
        }
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.process = spawn(self.folder.path(), self.sentinel);
            if self.comes_up(deadline) {
                return;
            }
            // Somebody has the port at this moment: it is ours again when they have noticed.
            assert!(Instant::now() < deadline, "redis-server does not start again:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// The end of what the server logged.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        drop(self.process.kill()); // works on a paused one, too
        drop(self.process.wait());
    }
}

/// In a file, because a sentinel rewrites its own, and to keep the password from other users' `ps`.
fn write_config(folder: &Path, port: u16, options: &Options, made: Option<&Certificates>, sentinel: Option<&str>) {
    let mut config = format!("bind 127.0.0.1\ndir {}/data\n", folder.display());
    let mut set = |name: &str, value: &dyn std::fmt::Display| writeln!(config, "{name} {value}").unwrap();
    match made {
        None => set("port", &port),
        Some(made) => {
            let (certificate, key) = made.server();
            set("port", &0);
            set("tls-port", &port);
            set("tls-ca-cert-file", &made.authority().display());
            set("tls-cert-file", &certificate.display());
            set("tls-key-file", &key.display());
            set("tls-auth-clients", if options.tls == Tls::Mutual { &"yes" } else { &"no" });
        }
    }
    if sentinel.is_none() {
        set("save", &"\"\"");
        set("appendonly", if options.appendfsync.is_some() { &"yes" } else { &"no" });
        set("repl-diskless-sync-delay", &0); // a replica need not wait for others to come
    }
    if let Some(appendfsync) = options.appendfsync {
        set("appendfsync", &appendfsync);
    }
    if let Some(password) = options.password {
        set("requirepass", &password);
        set("masterauth", &password);
    }
    if let Some(maxmemory) = options.maxmemory {
        set("maxmemory", &maxmemory);
    }
    if let Some(master) = options.replica_of {
        set("replicaof", &format!("127.0.0.1 {master}"));
    }
    for (name, value) in &options.more {
        set(name, value);
    }
    config.push_str(sentinel.unwrap_or_default());
    fs::write(folder.join("config"), config).unwrap();
}

fn spawn(folder: &Path, sentinel: bool) -> Child {
    // Its output is never that of the test: who waits for the end of that would wait for the server's.
    let log = File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let mut command = Command::new("redis-server");
    command.arg(folder.join("config"));
    if sentinel {
        command.arg("--sentinel");
    }
    let started = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
    started.expect("redis-server is needed: run `make setup`")
}

/// Three masters that share the slots, without replicas.
pub struct Cluster {
    pub nodes: Vec<RedisServer>,
}

impl Cluster {
    /// Returns when every node knows that all slots are served.
    pub fn start() -> Self {
        let more = vec![("cluster-enabled", "yes".to_owned()), ("cluster-node-timeout", "1000".to_owned())];
        let options = Options { more, ..Options::default() };
        let nodes: Vec<_> = (0..3).map(|_| RedisServer::with(options.clone())).collect();
        let addresses: Vec<_> = nodes.iter().map(RedisServer::address).collect();
        let mut create = Command::new("redis-cli");
        create.args(["--cluster", "create"]).args(&addresses).args(["--cluster-replicas", "0", "--cluster-yes"]);
        let output = create.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "no cluster: {}", String::from_utf8_lossy(&output.stdout));
        for node in &nodes {
            node.until(&["CLUSTER", "INFO"], "cluster_state:ok");
        }
        Self { nodes }
    }

    /// Names two of the nodes, so that a client finds the third by itself.
    pub fn url(&self) -> String {
        format!("redis+cluster://{},{}", self.nodes[0].address(), self.nodes[1].address())
    }
}

/// A master and its replica, watched by three sentinels of which two must agree.
pub struct Sentinels {
    pub master: RedisServer,
    pub replica: RedisServer,
    pub sentinels: Vec<RedisServer>,
}

impl Sentinels {
    /// Name of the master.
    pub const NAME: &'static str = "main";

    /// Returns when the sentinels know the replica and each other. They take a master for dead after half a second.
    pub fn start() -> Self {
        Self::with(Options::default())
    }

    /// As [`Sentinels::start`], with these options for master and replica.
    pub fn with(options: Options) -> Self {
        let master = RedisServer::with(options.clone());
        let replica = RedisServer::with(Options { replica_of: Some(master.port()), ..options.clone() });
        replica.until(&["INFO", "replication"], "master_link_status:up");
        let name = Self::NAME;
        let mut watch = format!(
            "sentinel monitor {name} 127.0.0.1 {} 2\nsentinel down-after-milliseconds {name} 500\n\
             sentinel failover-timeout {name} 3000\n",
            master.port()
        );
        if let Some(password) = options.password {
            writeln!(watch, "sentinel auth-pass {name} {password}").unwrap();
        }
        let sentinels: Vec<_> = (0..3).map(|_| RedisServer::launch(Options::default(), Some(&watch))).collect();
        let all_known = format!("name={name},status=ok,address={},slaves=1,sentinels=3", master.address());
        for sentinel in &sentinels {
            sentinel.until(&["INFO", "sentinel"], &all_known);
        }
        Self { master, replica, sentinels }
    }

    /// The URL for a bus.
    pub fn url(&self) -> String {
        let password = self.master.options.password.map_or(String::new(), |password| format!(":{password}@"));
        let addresses: Vec<_> = self.sentinels.iter().map(RedisServer::address).collect();
        format!("redis+sentinel://{password}{}/{}", addresses.join(","), Self::NAME)
    }
}

static SHARED: Mutex<Option<RedisServer>> = Mutex::new(None);

/// The server that all tests of this process share, each under a bus name of its own; started by the first that asks.
pub fn with_shared<T>(ask: impl FnOnce(&RedisServer) -> T) -> T {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    ask(shared
        .get_or_insert_with(|| RedisServer::with(Options { appendfsync: Some("everysec"), ..Options::default() })))
}

/// Ends the shared server when it is dropped, also by a panic: nothing drops a static.
pub struct EndShared;

impl Drop for EndShared {
    fn drop(&mut self) {
        drop(SHARED.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
