//! Carries events from the outbox to a bus.
//!
//! ```text
//!            claim                    published
//!  pending ────────► claimed ──────────────────────► delivered
//!     ▲                 │  │  cannot be published
//!     │ retry, give back│  └───────────────────────► dead ──replay──► pending
//!     └─────────────────┘
//!       or the lease ran out
//! ```
//!
//! A relay claims rows in one short statement, publishes them in order, and ends its claim in another. No transaction is
//! open in between. Whoever dies in between has its rows claimed by another relay when the lease is over: they are
//! published again, with the same ids. Any number of relays work on one table. Rows of one partition key are published in
//! order, by one relay at a time; a row that fails holds back its key until its retry, and nothing else.
//!
//! - [`sql`], [`mysql_claim`]: the statements, and how the order of a key is kept without locks that last;
//! - [`store`]: the table, through an [`Executor`]; [`floor`]: where its unfinished rows begin;
//! - [`postgres`], [`tls`], [`listen`], [`mysql`], [`mysql_server`]: our own connections;
//! - [`policy`], [`publish`]: what becomes of the rows of one claim;
//! - [`work`]: the loop; [`report`]: what it says about itself;
//! - [`host`]: an executor and a policy that live in another language.

mod floor;
pub mod host;
mod listen;
mod mysql;
mod mysql_claim;
mod mysql_server;
mod policy;
mod postgres;
mod publish;
mod record;
mod report;
mod sql;
mod store;
mod tls;
mod work;

use std::sync::Arc;
use std::time::Duration;

use self::floor::Floor;
use self::mysql::MySql;
pub use self::policy::{Decision, Failed, FailurePolicy};
use self::postgres::{Postgres, Server};
pub use self::publish::Publisher;
use self::report::Counters;
pub use self::report::{Health, RelayBatch};
pub use self::sql::wake;
use self::store::Store;
pub use self::store::{Answer, DeadRow, Executor, RelayStats};
use crate::error::{Error, Result};
use crate::outbox::table::{OUTBOX, Table};
use crate::process::PerProcess;
use crate::retry::RetryPolicy;

/// How a relay works.
#[derive(Clone)]
pub struct RelayOptions {
    /// Table of the outbox, `table` or `schema.table`. Default `polybus_outbox`.
    pub table: String,
    /// Most rows in one claim; each worker has at most two in memory. Default 500.
    pub batch: usize,
    /// Claims under way at the same time in this process. With one, rows without a key go in order, too. Default 1.
    pub workers: usize,
    /// How long rows stay ours without a sign of life: what a relay had that died is published after this. Default 30 s.
    pub lease: Duration,
    /// Longest pause between looks at the table. After rows were found the pauses are shorter. Default 250 ms.
    pub poll_interval: Duration,
    /// Wake up by NOTIFY. PostgreSQL only; behind a pool of connections it wants `listen_url`. Default true.
    pub listen: bool,
    /// Where to listen, when `url` leads to a pool of connections that does not pass notifications on.
    pub listen_url: Option<String>,
    /// For rows that the bus refuses, unless a [`FailurePolicy`] is given.
    pub retry: RetryPolicy,
    /// Called at named steps: a test ends its process there.
    #[doc(hidden)]
    pub probe: Option<Arc<dyn Fn(&'static str) + Send + Sync>>,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self {
            table: OUTBOX.to_owned(),
            batch: 500,
            workers: 1,
            lease: Duration::from_secs(30),
            poll_interval: Duration::from_millis(250),
            listen: true,
            listen_url: None,
            retry: RetryPolicy::default(),
            probe: None,
        }
    }
}

/// The database of a relay.
#[derive(Clone)]
enum Source {
    Server { url: Box<Server>, listen: Option<Box<Server>> },
    MySql(Box<mysql_server::Server>),
    Given(Arc<dyn Executor>),
}

/// A relay. Cheap to clone; clones share everything. Opens nothing until it is used.
#[derive(Clone)]
pub struct Relay(Arc<Inner>);

struct Inner {
    source: Source,
    table: Table,
    bus: Arc<dyn Publisher>,
    policy: Arc<dyn FailurePolicy>,
    options: RelayOptions,
    live: PerProcess<Live>,
}

/// What one process has of it.
struct Live {
    /// For calls.
    store: Store,
    workers: Vec<Desk>,
    /// Rows may be there.
    wake: Arc<tokio::sync::Notify>,
    stop: tokio::sync::watch::Sender<u64>,
    /// Workers of one process do not get into each other's way.
    claiming: tokio::sync::Mutex<()>,
    counters: Counters,
}

/// What a worker has.
struct Desk {
    store: Store,
    /// Where it ends claims while it makes the next: in a backlog PostgreSQL's work is what limits, and two sessions are
    /// two processes there.
    marks: Store,
}

impl Relay {
    /// A relay from the PostgreSQL, MySQL or MariaDB database at `url` to `bus`. Opens nothing. `InvalidConfig` for what
    /// can never work.
    pub fn new(url: &str, bus: Arc<dyn Publisher>, options: RelayOptions) -> Result<Self> {
        if mysql_server::Server::is_meant(url) {
            if options.listen_url.is_some() {
                return Err(Error::invalid_config(
                    "listen_url is for PostgreSQL: MySQL and MariaDB notify nobody, and the relay polls them",
                ));
            }
            return Self::build(Source::MySql(Box::new(mysql_server::Server::parse(url)?)), bus, options);
        }
        let url = Box::new(Server::parse(url)?);
        let listen = match &options.listen_url {
            _ if !options.listen => None,
            Some(other) => Some(Box::new(Server::parse(other)?)),
            None => Some(url.clone()),
        };
        Self::build(Source::Server { url, listen }, bus, options)
    }

    /// A relay whose statements `executor` runs.
    pub fn through(executor: Arc<dyn Executor>, bus: Arc<dyn Publisher>, options: RelayOptions) -> Result<Self> {
        Self::build(Source::Given(executor), bus, options)
    }

    fn build(source: Source, bus: Arc<dyn Publisher>, options: RelayOptions) -> Result<Self> {
        let table = Table::parse(&options.table)?;
        if options.batch == 0 || options.workers == 0 || options.lease < Duration::from_millis(10) {
            return Err(Error::invalid_config("batch and workers are at least 1, and the lease is at least 10 ms"));
        }
        bus.check()?;
        let policy: Arc<dyn FailurePolicy> = Arc::new(options.retry.clone());
        Ok(Self(Arc::new(Inner { source, table, bus, policy, options, live: PerProcess::new() })))
    }

    /// Lets `policy` decide about rows that the bus refuses.
    #[must_use]
    pub fn with_policy(self, policy: Arc<dyn FailurePolicy>) -> Self {
        let Inner { source, table, bus, options, .. } = &*self.0;
        let (source, table, bus, options) = (source.clone(), table.clone(), bus.clone(), options.clone());
        Self(Arc::new(Inner { source, table, bus, policy, options, live: PerProcess::new() }))
    }

    fn live(&self) -> &Live {
        self.0.live.get_or_init(|| {
            let workers = match &self.0.source {
                Source::Server { .. } | Source::MySql(_) => self.0.options.workers,
                Source::Given(_) => 1, // it has one connection, or whatever it thinks best
            };
            let store = || {
                let executor: Arc<dyn Executor> = match &self.0.source {
                    Source::Server { url, .. } => Postgres::executor((**url).clone(), self.0.table.clone()),
                    Source::MySql(url) => MySql::executor((**url).clone(), self.0.table.clone()),
                    Source::Given(executor) => executor.clone(),
                };
                Store::new(executor, self.0.table.clone(), Floor::default())
            };
            let desk = || Desk { store: store(), marks: store() };
            Live {
                store: store(),
                workers: std::iter::repeat_with(desk).take(workers).collect(),
                wake: Arc::default(),
                stop: tokio::sync::watch::Sender::new(0),
                claiming: tokio::sync::Mutex::default(),
                counters: Counters::default(),
            }
        })
    }

    fn store(&self) -> &Store {
        &self.live().store
    }

    fn probe(&self, step: &'static str) {
        if let Some(probe) = &self.0.options.probe {
            probe(step);
        }
    }

    /// Who is connected to what, without a password; `None` if an executor runs the statements.
    pub fn database(&self) -> Option<&str> {
        match &self.0.source {
            Source::Server { url, .. } => Some(url.name()),
            Source::MySql(url) => Some(url.name()),
            Source::Given(_) => None,
        }
    }

    /// The options it was made with.
    pub fn options(&self) -> &RelayOptions {
        &self.0.options
    }

    /// Fails if the table is missing, of another version or not readable.
    pub async fn check(&self) -> Result<()> {
        self.store().check().await.map_err(|error| error.during("relay"))
    }

    /// Counts on the live table.
    pub async fn stats(&self) -> Result<RelayStats> {
        let stats = self.store().stats().await.map_err(|error| error.during("stats"))?;
        self.live().counters.sampled(stats);
        Ok(stats)
    }

    /// Dead rows in order, those after the row `after` (0: from the first), at most `limit`.
    pub async fn dead_letters(&self, after: i64, limit: usize) -> Result<Vec<DeadRow>> {
        self.store().dead(after, limit).await.map_err(|error| error.during("dead_letters"))
    }

    /// Makes the dead row of one event, or all of them, pending again; attempts count from 1, and their place is at the
    /// end. Resolves to how many. `NotFound` for an event without a dead row.
    pub async fn replay(&self, event_id: Option<&str>) -> Result<u64> {
        let mut count = 0;
        loop {
            let some = self.store().replay(event_id, PAGE).await.map_err(|error| error.during("replay"))?;
            count += some;
            if event_id.is_some() || some < PAGE as u64 {
                break;
            }
        }
        self.wake();
        found(event_id, count)
    }

    /// Removes the dead row of one event, or all of them.
    pub async fn purge_dead(&self, event_id: Option<&str>) -> Result<u64> {
        let mut count = 0;
        loop {
            let some = self.store().purge_dead(event_id, PAGE).await.map_err(|error| error.during("purge"))?;
            count += some;
            if event_id.is_some() || some < PAGE as u64 {
                return found(event_id, count);
            }
        }
    }

    /// Removes rows that were delivered longer ago, in small steps. A row that is removed absorbs no second event of its
    /// id or dedupe key any more. Resolves to how many.
    pub async fn purge(&self, older_than: Duration) -> Result<u64> {
        self.store().purge(older_than, PAGE).await.map_err(|error| error.during("purge"))
    }

    /// Lets the workers of this process look at the table now.
    pub fn wake(&self) {
        self.live().wake.notify_one();
    }
}

/// Rows in one statement that looks after old ones.
const PAGE: usize = 2000;

fn found(event_id: Option<&str>, count: u64) -> Result<u64> {
    match event_id {
        Some(id) if count == 0 => Err(Error::not_found(format!(
            "the outbox has no dead letter of event {id:?}; it was replayed or purged before"
        ))),
        _ => Ok(count),
    }
}
