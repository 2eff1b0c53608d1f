//! A connection that comes back: to the server that holds one partition, wherever that is at the moment.
//!
//! A [`Link`] is a place for one multiplexed connection. Whoever needs it first connects, the others wait for the same
//! attempt; attempts follow each other with growing, jittered pauses, so that many clients of a server that comes back
//! do not arrive together. An outage is logged once when it begins and once when it ends.
//!
//! The library's own time limits are off: its default of 500 ms would end a blocking read, and take every other command
//! on the connection with it. Each call here carries a deadline instead, and a connection that let one pass is dropped.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::{AsyncConnectionConfig, Cmd, Pipeline, PushInfo, PushKind, Value};
use tokio::time::{Instant, timeout_at};

use super::address::{Address, Layout};
use super::fault::{self, Failure};
use super::partition::lock;
use super::scripts::{self, Script};
use super::value;
use super::wire::Wire;
use crate::error::{Error, ErrorKind, Result};
use crate::retry::{Jitter, RetryPolicy};

/// Between attempts to connect.
pub(super) const RECONNECT: RetryPolicy = RetryPolicy {
    max_retries: u32::MAX,
    initial_delay: Duration::from_millis(50),
    max_delay: Duration::from_secs(1),
    factor: 2.0,
    jitter: Jitter::Full,
};
/// One attempt to connect, name resolution and TLS included.
const CONNECT: Duration = Duration::from_secs(3);
/// Before a command is repeated that the server refused because it starts or fails over.
const AGAIN: Duration = Duration::from_millis(50);
/// Commands that one write to the socket may carry.
const PIPELINE: usize = 1024;

/// What all links of a bus share.
pub(super) struct Server {
    pub address: Address,
    /// Connections that were made again after a loss.
    pub reconnects: AtomicU64,
    down: AtomicBool,
    gate: Arc<Gate>,
}

/// One attempt to connect at a time, and the pauses between them. A pause holds for whoever comes next: callers that
/// began to wait together also lose their patience together.
#[derive(Default)]
struct Gate {
    attempts: tokio::sync::Mutex<Attempts>,
    failure: Mutex<Option<Error>>,
}

#[derive(Default)]
struct Attempts {
    failed: u32,
    next: Option<Instant>,
}

impl Server {
    pub fn new(address: Address) -> Self {
        Self { address, reconnects: AtomicU64::new(0), down: AtomicBool::new(false), gate: Arc::default() }
    }

    /// A new connection to the server that holds `key`; `lost` is called once when it ends. It lives on our runtime,
    /// whoever asked for it.
    async fn connect(
        self: &Arc<Self>,
        key: &str,
        lost: impl Fn() + Send + Sync + 'static,
    ) -> Result<Connection, Failure> {
        let (server, key) = (self.clone(), key.to_owned());
        let reach = async move { server.reach(&key, lost).await };
        let reached = crate::process::current().runtime.spawn(tokio::time::timeout(CONNECT, reach));
        match reached.await {
            Ok(Ok(reached)) => reached,
            _ => {
                let place = self.address.describe();
                Err(Error::connection_failed(format!("no answer from Redis at {place} in {CONNECT:?}")).into())
            }
        }
    }

    async fn reach(&self, key: &str, lost: impl Fn() + Send + Sync + 'static) -> Result<Connection, Failure> {
        let place = self.place(key).await?;
        let mut connection = Connection::open(&self.address.server(&place)?, &place, lost).await?;
        if matches!(self.address.layout, Layout::Sentinel(_)) {
            // A sentinel may not have noticed yet that this one was demoted.
            let role = value::list(connection.ask(&redis::cmd("ROLE")).await?)?;
            if role.into_iter().next().map(value::text).transpose()?.as_deref() != Some("master") {
                return Err(
                    Error::connection_failed(format!("{}:{} is not the master any more", place.0, place.1)).into()
                );
            }
        }
        connection.ask_all(&scripts::load()).await?;
        Ok(connection)
    }

    /// Where the server with `key` is.
    pub async fn place(&self, key: &str) -> Result<(String, u16), Failure> {
        match &self.address.layout {
            Layout::Single => Ok(self.address.seeds()[0].clone()),
            Layout::Sentinel(name) => self.master(name).await,
            Layout::Cluster => self.owner(key).await,
        }
    }

    /// The address of the master, from the first sentinel that answers.
    async fn master(&self, name: &str) -> Result<(String, u16), Failure> {
        let mut command = redis::cmd("SENTINEL");
        command.arg("GET-MASTER-ADDR-BY-NAME").arg(name);
        let mut failure = None;
        for seed in self.address.seeds() {
            let asked = async {
                let mut sentinel = open(&self.address.sentinel(seed)?, &plain(), seed).await?;
                Ok::<_, Failure>(value::list(ask(&mut sentinel, &command).await?)?)
            };
            match asked.await {
                Ok(found) if found.len() == 2 => {
                    let mut found = found.into_iter().map(value::text);
                    let (host, port) = (found.next().transpose()?, found.next().transpose()?);
                    return match (host, port.and_then(|port| port.parse().ok())) {
                        (Some(host), Some(port)) => Ok((host, port)),
                        _ => Err(fault::strange("an address").into()),
                    };
                }
                Ok(_) => {
                    let unknown = format!("the sentinels do not know a master named {name:?}; check the URL's path");
                    failure = Some(Error::connection_failed(unknown).into());
                }
                Err(cause) => failure = Some(cause),
            }
        }
        Err(failure.unwrap_or_else(|| Error::connection_failed("no sentinel answered").into()))
    }

    /// The node that serves the slot of `key`, as the first node that answers says.
    async fn owner(&self, key: &str) -> Result<(String, u16), Failure> {
        let mut failure = None;
        for seed in self.address.seeds() {
            match self.ask_owner(seed, key).await {
                Ok(owner) => return Ok(owner),
                Err(cause) => failure = Some(cause),
            }
        }
        Err(failure.unwrap_or_else(|| Error::connection_failed("no node of the cluster answered").into()))
    }

    async fn ask_owner(&self, seed: &(String, u16), key: &str) -> Result<(String, u16), Failure> {
        let mut node = open(&self.address.server(seed)?, &plain(), seed).await?;
        let slot = value::number(ask(&mut node, redis::cmd("CLUSTER").arg("KEYSLOT").arg(key)).await?)?;
        let ranges = value::list(ask(&mut node, redis::cmd("CLUSTER").arg("SLOTS")).await?)?;
        for range in ranges {
            let mut range = value::list(range)?.into_iter();
            let (first, last) = (range.next().map(value::number), range.next().map(value::number));
            let (Some(first), Some(last), Some(master)) = (first.transpose()?, last.transpose()?, range.next()) else {
                continue;
            };
            if !(first..=last).contains(&slot) {
                continue;
            }
            let mut master = value::list(master)?.into_iter();
            let (host, port) = (master.next().map(value::text), master.next().map(value::number));
            let host = host.transpose()?.unwrap_or_default();
            let port = port.transpose()?.and_then(|port| u16::try_from(port).ok());
            // An empty name means: the address that you asked.
            let host = if host.is_empty() { seed.0.clone() } else { host };
            return port.map(|port| (host, port)).ok_or_else(|| fault::strange("a port").into());
        }
        let mut failure =
            Failure::from(Error::connection_failed("no node of the cluster serves the bus's slot at the moment"));
        failure.again = true;
        Err(failure)
    }

    /// Notes how an attempt ended; says so when that is news.
    fn note(&self, failure: Option<&Failure>) {
        match failure {
            Some(failure) if !self.down.swap(true, Ordering::AcqRel) => {
                log::warn!("redis {} cannot be reached, trying again: {}", self.address.describe(), failure.error);
            }
            None if self.down.swap(false, Ordering::AcqRel) => {
                log::warn!("redis {} is reached again", self.address.describe());
            }
            _ => {}
        }
    }
}

fn plain() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT))
        .set_response_timeout(None)
        .set_pipeline_buffer_size(PIPELINE)
}

async fn open(
    client: &redis::Client,
    config: &AsyncConnectionConfig,
    place: &(String, u16),
) -> Result<MultiplexedConnection, Failure> {
    client.get_multiplexed_async_connection_with_config(config).await.map_err(|cause| unreachable(cause, place))
}

/// What went wrong while a connection was made.
fn unreachable(cause: redis::RedisError, (host, port): &(String, u16)) -> Failure {
    let mut failure = Failure::from(cause);
    failure.unknown = false; // nothing but the greeting was sent
    if failure.error.kind() == ErrorKind::ConnectionFailed && !failure.again {
        let why = std::error::Error::source(&failure.error).map_or_else(String::new, |why| format!(" ({why})"));
        failure.error = Error::connection_failed(format!(
            "cannot connect to Redis at {host}:{port}{why}; check that it runs there, has room for clients (maxclients), and that the URL says whether it wants TLS"
        ));
    }
    failure
}

/// A connection that is open: our own, or the library's where only that can do it (TLS).
#[derive(Clone)]
enum Connection {
    Own(Wire),
    Library(MultiplexedConnection),
}

impl Connection {
    /// `lost` is called when the server has gone.
    async fn open(
        client: &redis::Client,
        place: &(String, u16),
        lost: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, Failure> {
        let lost = Arc::new(lost);
        let gone = lost.clone();
        let own = tokio::time::timeout(CONNECT, Wire::open(client, &plain(), move || gone())).await;
        let own = own.unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()));
        if let Some(wire) = own.map_err(|cause| unreachable(cause, place))? {
            return Ok(Self::Own(wire));
        }
        let config = plain().set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Disconnection {
                lost();
            }
            Ok::<(), redis::aio::SendError>(())
        });
        Ok(Self::Library(open(client, &config, place).await?))
    }

    /// One command. Its refusal is an error.
    async fn ask(&mut self, command: &Cmd) -> redis::RedisResult<Value> {
        let wire = match self {
            Self::Library(connection) => return ask(connection, command).await,
            Self::Own(wire) => wire,
        };
        match wire.ask(&command.get_packed_command(), 1).await?.pop() {
            Some(Value::ServerError(refusal)) => Err(refusal.into()),
            answer => Ok(answer.unwrap_or(Value::Nil)),
        }
    }

    /// Commands together. A refusal is an answer.
    async fn ask_all(&mut self, commands: &Pipeline) -> redis::RedisResult<Vec<Value>> {
        match self {
            Self::Library(connection) => connection.req_packed_commands(commands, 0, commands.len()).await,
            Self::Own(wire) => wire.ask(&commands.get_packed_pipeline(), commands.len()).await,
        }
    }
}

/// One command. The library hands a refusal of the server out as a value: here it is the error that it is.
async fn ask(connection: &mut MultiplexedConnection, command: &Cmd) -> redis::RedisResult<Value> {
    match connection.req_packed_command(command).await? {
        Value::ServerError(refusal) => Err(refusal.into()),
        answer => Ok(answer),
    }
}

/// See the module's page.
pub(super) struct Link {
    server: Arc<Server>,
    /// Its slot decides to which server the link goes.
    key: String,
    current: Arc<Mutex<Option<Live>>>,
    /// Of the server; in a cluster, where one node may be away and the others not, its own.
    gate: Arc<Gate>,
    /// There was a connection before.
    made: AtomicBool,
}

#[derive(Clone)]
struct Live {
    connection: Connection,
    number: u64,
}

impl Link {
    pub fn new(server: Arc<Server>, key: String) -> Self {
        let gate = match server.address.layout {
            Layout::Cluster => Arc::default(),
            _ => server.gate.clone(),
        };
        Self { server, key, current: Arc::default(), gate, made: AtomicBool::new(false) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Live>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection, made now if there is none, for as long as `deadline` allows. Refused credentials are not tried
    /// again.
    async fn live(&self, deadline: Instant) -> Result<Live, Failure> {
        if let Some(live) = self.lock().clone() {
            return Ok(live);
        }
        let attempt = async {
            let mut attempts = self.gate.attempts.lock().await;
            loop {
                if let Some(next) = attempts.next {
                    tokio::time::sleep_until(next).await;
                }
                if let Some(live) = self.lock().clone() {
                    return Ok(live);
                }
                // Counted before it is known how it ends, because the deadline may come first.
                attempts.failed = attempts.failed.saturating_add(1);
                let pause = RECONNECT.delay(attempts.failed, fastrand::f64()).unwrap_or(RECONNECT.max_delay);
                attempts.next = Some(Instant::now() + pause);
                match self.connect().await {
                    Ok(live) => {
                        if self.made.swap(true, Ordering::Relaxed) {
                            self.server.reconnects.fetch_add(1, Ordering::Relaxed);
                        }
                        *attempts = Attempts::default();
                        *lock(&self.gate.failure) = None;
                        self.server.note(None);
                        return Ok(live);
                    }
                    Err(failure) if !failure.again && failure.error.kind() != ErrorKind::ConnectionFailed => {
                        attempts.next = None;
                        return Err(failure);
                    }
                    Err(failure) => {
                        attempts.next = Some(Instant::now() + pause);
                        self.server.note(Some(&failure));
                        *lock(&self.gate.failure) = Some(failure.error);
                    }
                }
            }
        };
        match timeout_at(deadline, attempt).await {
            Ok(found) => found,
            Err(_) => {
                let late = || {
                    let place = self.server.address.describe();
                    Error::connection_failed(format!("no connection to Redis at {place} in time"))
                };
                Err(lock(&self.gate.failure).clone().unwrap_or_else(late).into())
            }
        }
    }

    async fn connect(&self) -> Result<Live, Failure> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let current = Arc::downgrade(&self.current);
        let connection = self
            .server
            .connect(&self.key, move || {
                if let Some(current) = current.upgrade() {
                    let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
                    drop(current.take_if(|live| live.number == number));
                }
            })
            .await?;
        let live = Live { connection, number };
        *self.lock() = Some(live.clone());
        Ok(live)
    }

    /// Connects once, and says at once when that fails.
    pub async fn check(&self) -> Result<(), Failure> {
        if self.lock().is_none() {
            self.connect().await?;
            self.made.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until there is a connection.
    pub async fn ready(&self, deadline: Instant) -> Result<(), Failure> {
        self.live(deadline).await.map(drop)
    }

    /// The connection, if there is one that may be written to at once, and its number.
    pub fn own(&self) -> Option<(Wire, u64)> {
        match &*self.lock() {
            Some(Live { connection: Connection::Own(wire), number }) => Some((wire.clone(), *number)),
            _ => None,
        }
    }

    /// The answers to what was written to [`Link::own`], as [`Link::run_all`] gives them.
    pub fn answered(&self, number: u64, answers: redis::RedisResult<Vec<Value>>) -> Result<Vec<Value>, Failure> {
        let answers = self.judge(number, Ok(answers.map_err(Failure::from)))?;
        if answers.iter().any(fault::moved) {
            self.drop_live(number);
        }
        Ok(answers)
    }

    /// Drops the connection: what waits for an answer on it fails.
    pub fn cut(&self) {
        *self.lock() = None;
    }

    /// Drops it if it is still the one with this number.
    pub fn drop_live(&self, number: u64) {
        drop(self.lock().take_if(|live| live.number == number));
    }

    /// Runs one command. Repeats it while the server says that it was not executed but may be in a moment.
    pub async fn run(&self, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        loop {
            let live = self.live(deadline).await?;
            let mut connection = live.connection;
            let answer = timeout_at(deadline, connection.ask(command)).await;
            match self.judge(live.number, answer.map(|answer| Ok(answer?))) {
                Err(failure) if failure.again && Instant::now() + AGAIN < deadline => tokio::time::sleep(AGAIN).await,
                other => return other,
            }
        }
    }

    /// Runs a pipeline; each answer may be an error of the server ([`fault::check`]). After one that says that another
    /// server is responsible, the next call connects anew.
    pub async fn run_all(&self, commands: &Pipeline, deadline: Instant) -> Result<Vec<Value>, Failure> {
        let live = self.live(deadline).await?;
        let mut connection = live.connection;
        let answer = timeout_at(deadline, connection.ask_all(commands)).await;
        match answer {
            Ok(answers) => self.answered(live.number, answers),
            Err(late) => self.judge(live.number, Err(late)),
        }
    }

    /// Runs a script.
    pub async fn script(&self, script: &Script, command: &Cmd, deadline: Instant) -> Result<Value, Failure> {
        match self.run(command, deadline).await {
            Err(failure) if failure.no_script => {
                let mut load = redis::cmd("SCRIPT");
                self.run(load.arg("LOAD").arg(script.text), deadline).await?;
                self.run(command, deadline).await
            }
            other => other,
        }
    }

    fn judge<T>(
        &self,
        number: u64,
        answer: std::result::Result<Result<T, Failure>, tokio::time::error::Elapsed>,
    ) -> Result<T, Failure> {
        let failure = match answer {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(failure)) => failure,
            Err(_) => {
                let place = self.server.address.describe();
                let late = Error::connection_failed(format!("Redis at {place} did not answer in time"));
                Failure { unknown: true, ..late.into() }
            }
        };
        if failure.unknown || failure.moved {
            self.drop_live(number);
        }
        Err(failure)
    }
}
