//! What carries events: the traits that a backend implements, and the one place that names all backends.
//!
//! Walk: [`Transport::publish`] stores events; [`Transport::subscribe`] joins a durable group and returns a
//! [`Source`]; [`Source::take`] leases deliveries to this process; [`Source::settle`] ends them. `memory` is the
//! worked example; `CONTRIBUTING.md` says how to add one.

pub mod memory;
pub mod redis;
mod room;
pub mod sqlite;
mod time;

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{Delivery, Lease, Verdict};
use crate::error::{Error, Result, nearest};
use crate::event::{Event, Text};
use crate::history::{HistoryEntry, HistoryFilter, ReplayBatch, ReplayStep};
use crate::pattern::Pattern;

pub use self::room::WhenFull;

/// A boxed future that owns what it needs.
pub type Task<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What a backend can do. The API and the conformance suite obey it; the rest is `Unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Events survive the process.
    pub durable: bool,
    /// Processes on this machine share it.
    pub cross_process: bool,
    /// Groups, leases and settling; without it delivery is at most once.
    pub ack: bool,
    /// Retries are scheduled by the store and do not hold a worker.
    pub delayed_retry: bool,
    /// Publish with `delay` and `expires_in`.
    pub delayed_publish: bool,
    /// Dead letters can be listed and replayed.
    pub dead_letters: bool,
    /// A new group may start at the beginning of the log or at a time.
    pub start_position: bool,
    /// Subscriptions without a group, one copy for each process.
    pub broadcast: bool,
    /// Groups that handle the events of one partition key one at a time, in order.
    pub ordered: bool,
    /// Mailboxes, and knowing who answers: requests with replies.
    pub request: bool,
    /// Groups remember the keys of what they handled: [`Source::begin`].
    pub idempotent: bool,
    /// A publish whose idempotency key was seen within the window is absorbed.
    pub publish_dedupe: bool,
    /// The log can be read, with what became of each event, and replayed into a group.
    pub history: bool,
}

/// What holds on the live store, as measured, not as hoped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guarantees {
    /// `memory`, `sqlite`, `redis` or `redis+pubsub`.
    pub transport: &'static str,
    /// `at-least-once` or `at-most-once`.
    pub delivery: &'static str,
    /// What a confirmed publish survives: `none` (lost with this process), `memory` (our processes, not the server),
    /// `process` (any killed process, the server included), `disk` (power loss).
    pub durability: &'static str,
    /// Order within one group: `publish` for first attempts.
    pub ordering: &'static str,
    /// What was looked at, for a person: version, file system, settings.
    pub details: Vec<(&'static str, String)>,
    /// Settings that weaken the promise, each with what to do.
    pub warnings: Vec<String>,
}

/// An event to publish, with its schedule.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The event.
    pub event: Event,
    /// Not delivered before this much time has passed, by the store's clock.
    pub delay: Option<Duration>,
    /// Not delivered after this much time has passed, counted from publish.
    pub expires_in: Option<Duration>,
}

/// Says that an event was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The event's id.
    pub id: Text,
    /// Position in the transport's log, as it writes it; `None` while it is delayed.
    pub position: Option<Text>,
    /// Nothing was stored: an event with this idempotency key was published before. `id` and `position` are that one's.
    pub duplicate: bool,
}

/// Where a group that does not exist yet begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// With events published after `subscribe` resolved.
    #[default]
    New,
    /// With the oldest event kept.
    Beginning,
    /// With the first event published at this time or later.
    At(SystemTime),
}

/// A subscription, as the transport sees it.
#[derive(Debug, Clone)]
pub struct GroupSpec {
    /// Durable group; shared by all processes that name it.
    pub group: Text,
    /// Name of the subscription, kept with dead letters.
    pub subscription: Text,
    /// Service that subscribes.
    pub service: Text,
    /// Which events. The newest subscriber's pattern is the group's.
    pub pattern: Pattern,
    /// Used only when the group is new.
    pub start: Start,
    /// No group: every process gets every event from now on, nothing is settled, nothing outlives the process.
    pub broadcast: bool,
    /// The events of one partition key are handed out one at a time, in order: the next one when nothing before it is
    /// unfinished. Decided when the group is made; who disagrees is refused ([`disagrees`]).
    pub ordered: bool,
    /// How long a delivery stays ours without a heartbeat.
    pub lease: Duration,
    /// Its handler answers requests: [`Transport::responders`] finds it while it gives signs of life.
    pub responder: bool,
    /// Hand out what has expired, marked so that it becomes a dead letter; otherwise it is dropped and counted.
    pub keep_expired: bool,
}

/// One group's numbers. Counted on the live store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupStats {
    /// Published and not yet taken by anyone of the group.
    pub lag: u64,
    /// Leased.
    pub in_flight: u64,
    /// Waiting for their next attempt.
    pub retrying: u64,
    /// Dead letters.
    pub dead: u64,
    /// Expired before a handler got them.
    pub expired: u64,
    /// Age of the oldest event that is not finished.
    pub oldest: Option<Duration>,
}

/// What ends a lease.
#[derive(Debug, Clone)]
pub struct Settlement {
    /// The right to do it.
    pub lease: Lease,
    /// What becomes of the delivery.
    pub verdict: Verdict,
}

/// `InvalidConfig` for a subscriber who wants another order than `group` was made with. Not the newest subscriber's wish,
/// as with the pattern: while processes disagree, events of one key would run at once, and nobody would notice.
pub(crate) fn disagrees(group: &str, ordered: bool) -> Error {
    let (is, wants) = if ordered { ("unordered", "ordered") } else { ("ordered", "unordered") };
    Error::invalid_config(format!(
        "group {group:?} was made {is} and cannot be followed {wants}: events of one key would run at once; subscribe with the option ordered as all its processes do, name another group=, or let the group finish and delete_group({group:?})"
    ))
}

/// Whether the delivery of a marked key may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// Ours.
    Run,
    /// It was handled before.
    Duplicate,
    /// Somebody handles it, since so long.
    Busy(Duration),
}

/// A socket at which answers to publishes arrive. An event loop that reads it while it awaits one spares a wake: the answer
/// wakes the loop itself, and not a thread of the core that wakes the loop.
pub trait Watched: Send + Sync {
    /// To be watched until [`Watched::read`] says that it has ended; its number means another socket after that, so watch
    /// a duplicate.
    fn socket(&self) -> BorrowedFd<'_>;

    /// The event loop reads from now on, or does not. To be said again with every publish: after a second without an
    /// answer the core reads itself.
    fn watch(&self, yes: bool);

    /// Hands out what has arrived, unless another thread is at it. Whether the connection lives on. Does not block.
    fn read(&self) -> bool;
}

/// A backend. All methods may be called from any thread; none blocks the caller; all fail with `BusClosed` after
/// [`Transport::close`].
pub trait Transport: Send + Sync + 'static {
    /// What this backend can do.
    fn capabilities(&self) -> Capabilities;

    /// Looks at the live store.
    fn guarantees(&self) -> Task<Result<Guarantees>>;

    /// Stores the batch whole or not at all, in order. `timeout` bounds the wait: `PublishTimeout` says that nothing
    /// was stored, `PublishUnknown` that it may have been.
    fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Result<Vec<Receipt>>>;

    /// As [`Transport::publish`] of each event alone, in order, all at the same time.
    fn publish_each(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Vec<Result<Receipt>>> {
        let alone: Vec<_> = batch.into_iter().map(|outgoing| self.publish(vec![outgoing], timeout)).collect();
        let receipt = |receipts: Result<Vec<Receipt>>| {
            receipts?.pop().ok_or_else(|| Error::connection_failed("the store gave no receipt"))
        };
        Box::pin(async move { futures_util::future::join_all(alone).await.into_iter().map(receipt).collect() })
    }

    /// Where the answers to publishes of this process arrive, if that is one socket.
    fn watched(&self) -> Option<Arc<dyn Watched>> {
        None
    }

    /// Joins the group, making it at `spec.start` when it is new. Once this resolves every later publish is seen,
    /// whoever makes it.
    fn subscribe(&self, spec: GroupSpec) -> Task<Result<Arc<dyn Source>>>;

    /// Counts on the live store. `NotFound` for a group that does not exist.
    fn group_stats(&self, group: Text) -> Task<Result<GroupStats>>;

    /// Forgets a group, what it had not finished and its dead letters. Resolves to whether it existed.
    fn delete_group(&self, group: Text) -> Task<Result<bool>>;

    /// Dead letters in order of their ids, those after the record `after`, at most `limit`.
    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<Text>,
        limit: usize,
    ) -> Task<Result<Vec<DeadLetter>>>;

    /// How many there are.
    fn dead_count(&self, filter: DeadLetterFilter) -> Task<Result<u64>>;

    /// Hands them to their groups again, attempts from 1, and removes the records, atomically for each record.
    fn dead_replay(&self, filter: DeadLetterFilter) -> Task<Result<u64>>;

    /// Removes them.
    fn dead_purge(&self, filter: DeadLetterFilter) -> Task<Result<u64>>;

    /// Whether somebody answers requests of this type: a group with a responder that gave a sign of life within its
    /// lease. `None` when the store cannot tell.
    fn responders(&self, _event_type: Text) -> Task<Result<Option<bool>>> {
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Puts a letter into a mailbox, whose owner has `ttl` to fetch it; afterwards it is gone. The name is lower-case
    /// hexadecimal.
    fn post(&self, _mailbox: Text, _letter: Bytes, _ttl: Duration) -> Task<Result<()>> {
        Box::pin(std::future::ready(Err(no_mail())))
    }

    /// Opens a mailbox, to read it. Makes nothing on the store.
    fn mailbox(&self, _name: Text) -> Result<Box<dyn Mailbox>> {
        Err(no_mail())
    }

    /// Stores copies of what was published before, whatever their idempotency keys: the fault that a test bus injects.
    fn repeat(&self, _batch: Vec<Outgoing>) -> Task<Result<Vec<Receipt>>> {
        Box::pin(std::future::ready(Err(Error::unsupported("only a test bus publishes twice"))))
    }
    /// Events of the log in publish order, those after the position `after`, at most `limit`; with `records`, what each
    /// group did with them. `InvalidConfig` for a text that is no position.
    fn history(
        &self,
        filter: HistoryFilter,
        after: Option<Text>,
        limit: usize,
        records: bool,
    ) -> Task<Result<Vec<HistoryEntry>>>;

    /// Hands the next events of the log to one group again, as [`ReplayStep`] says: the same events, attempts from 1,
    /// without their expiry. What the group has to do already, or does not follow, is left alone. `NotFound` for a
    /// group that does not exist.
    fn replay(&self, step: ReplayStep) -> Task<Result<ReplayBatch>>;

    /// Waits until nothing is left to do at this moment of the transport's clock. Resolves to when there is something
    /// again, as far as that is known. Only with a stopped clock.
    fn idle(&self) -> Task<Result<Option<Duration>>> {
        Box::pin(std::future::ready(Err(Error::unsupported("only a test bus can wait until it is idle"))))
    }

    /// What happened to this hold on the store, by the names of metrics: losses of the connection and the like.
    fn counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Flushes what was accepted, closes every source and releases the store. Idempotent.
    fn close(&self) -> Task<()>;
}

/// One process's hold on a group. `take` is called by one task at a time; the rest from any thread.
pub trait Source: Send + Sync + 'static {
    /// Leases up to `max` deliveries (at least 1), waiting until there is one. Dropping the future loses nothing:
    /// what it leased is handed back by [`Source::close`] or when the lease runs out.
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>>;

    /// Ends leases, all in one step. Resolves to those that were no longer ours and so had no effect. A store that
    /// cannot do all in one step lists in its error ([`Error::failures`]) what is left to do; the rest was done.
    fn settle(&self, settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>>;

    /// Marks keys as being handled, each for the delivery beside it, for as long as that is leased to us. Answers in
    /// order. [`Source::settle`] ends a mark in one step with its delivery: `Ack` keeps it for `keep` (from then on the
    /// key is [`Begun::Duplicate`]), every other verdict frees it.
    fn begin(&self, _wanted: Vec<(Lease, Text)>, _keep: Duration) -> Task<Result<Vec<Begun>>> {
        Box::pin(std::future::ready(Err(Error::unsupported("this transport remembers no keys"))))
    }

    /// Keeps everything that this source holds for another lease. Resolves to those of `held` that were lost.
    fn heartbeat(&self, held: Vec<Lease>) -> Task<Result<Vec<Lease>>>;

    /// For [`Transport::idle`], which otherwise waits for what this source may take and for what it holds. `None`: it
    /// does not rest. Only a transport with a stopped clock has to listen.
    fn rest(&self, _rest: Option<Rest>) {}

    /// Hands back what is still held, without counting the attempt, and leaves the group. A pending `take` ends
    /// with `BusClosed`. Idempotent.
    fn close(&self) -> Task<()>;
}

/// The reading end of a mailbox. Dropping it lets go of what it needs; what lies there goes with its time.
pub trait Mailbox: Send + Sync + 'static {
    /// Takes what lies there, waiting a moment (seconds at most) when there is nothing, then resolves to nothing.
    /// Called by one task at a time. A dropped future may take letters with it.
    fn next(&self) -> Task<Result<Vec<Bytes>>>;
}

fn no_mail() -> Error {
    Error::unsupported("this transport keeps no replies; make requests over memory://, sqlite:/// or redis://")
}

/// What a source waits for by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// Until then.
    pub until: Duration,
    /// Whether it takes what there is meanwhile.
    pub takes: bool,
    /// So many of the deliveries that it holds wait too.
    pub holds: usize,
}

/// Settings that transports share.
#[derive(Clone)]
pub struct Settings {
    /// Buses inside one store do not see each other.
    pub bus: Text,
    /// `full`, `normal`, or what the transport thinks best.
    pub durability: Durability,
    /// How long an event stays in the log after every group finished it; `None`: what suits the transport.
    pub retention: Option<Duration>,
    /// The user's own limit: events older than this are dropped even if a group has not finished them, and counted.
    pub max_age: Option<Duration>,
    /// The user's own limit on the number of events kept, likewise.
    pub max_events: Option<u64>,
    /// The user's own limit on the bytes of the log, likewise.
    pub max_bytes: Option<u64>,
    /// Where a publish must have arrived before it returns.
    pub confirm: Confirm,
    /// Parts that the log is split into; `None`: what the bus has, or 1.
    pub partitions: Option<u32>,
    /// How long the idempotency key of a published event is remembered; zero: not at all; `None`:
    /// [`IDEMPOTENCY_WINDOW`].
    pub idempotency_window: Option<Duration>,
    /// Largest payload accepted, in bytes, on publish and on consume.
    pub max_payload_bytes: usize,
    /// Bytes of publishes that may wait, to be written or, in memory, to be handled; `None`: what suits the transport.
    pub publish_buffer_bytes: Option<usize>,
    /// What becomes of a publish beyond that.
    pub when_full: WhenFull,
    /// Where time comes from; only the memory transport obeys a stopped clock.
    pub clock: crate::clock::Clock,
    /// Open a file on a file system that is known to break locks.
    pub allow_network_fs: bool,
}

/// How long the idempotency key of a published event is remembered unless the user says otherwise.
pub const IDEMPOTENCY_WINDOW: Duration = Duration::from_secs(3600);

impl Settings {
    /// The key under which the publish of `event` happens once, and for how long; `None` for one that is stored as it comes.
    fn once(&self, event: &Event) -> Option<(Text, Duration)> {
        let window = self.idempotency_window.unwrap_or(IDEMPOTENCY_WINDOW);
        let key = event.meta.idempotency_key.as_ref().filter(|key| !key.is_empty())?;
        (!window.is_zero()).then(|| (key.clone(), window))
    }
}

/// What a confirmed publish survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The transport's safest setting; a weaker store is warned about.
    #[default]
    Warn,
    /// As `Warn`, but a store that cannot keep a confirmed event is refused.
    Required,
    /// As `Warn`, silently.
    Off,
    /// Every commit reaches the disk.
    Full,
    /// A commit survives the process; the last ones may be lost with the power.
    Normal,
}

/// Where a publish must have arrived before it returns. A store that cannot tell refuses with `Unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Confirm {
    /// In the store, as safe as the store's own settings make it.
    #[default]
    Memory,
    /// On the store's disk.
    Disk,
    /// In at least one replica.
    Replica,
}

/// Schemes that [`connect`] knows.
pub const SCHEMES: [&str; 7] =
    ["memory", "sqlite", "redis", "rediss", "redis+sentinel", "redis+cluster", "redis+pubsub"];

/// Checks `url` without opening anything.
pub fn check_url(url: &str) -> Result<()> {
    let (scheme, rest) = split(url)?;
    match scheme {
        "memory" => memory::check_name(rest),
        _ if scheme.starts_with("redis") => redis::check(scheme, rest),
        _ => sqlite::path_of(rest).map(drop),
    }
}

/// Opens the backend that `url` names.
pub fn connect(url: &str, settings: Settings) -> Task<Result<Arc<dyn Transport>>> {
    let url = url.to_owned();
    Box::pin(async move {
        match split(&url)? {
            ("memory", name) => memory::open(name, &settings),
            ("redis+pubsub", rest) => redis::open_pubsub(rest, settings).await,
            (scheme, rest) if scheme.starts_with("redis") => redis::open(scheme, rest, settings).await,
            (_, rest) => sqlite::open(sqlite::path_of(rest)?, settings).await,
        }
    })
}

fn split(url: &str) -> Result<(&str, &str)> {
    let Some((scheme, rest)) = url.split_once("://") else {
        if url.contains('@') {
            // What stands before it may be a password.
            return Err(Error::invalid_config(
                "the bus URL lacks its \"://\"; write one like redis://user:password@host or sqlite:///events.db",
            ));
        }
        return Err(Error::invalid_config(format!(
            "{:?} is not a bus URL; write one like sqlite:///events.db or memory://",
            redact(url)
        )));
    };
    if SCHEMES.contains(&scheme) {
        return Ok((scheme, rest));
    }
    let hint = nearest(scheme, SCHEMES).map_or(String::new(), |near| format!("; did you mean {near}://?"));
    Err(Error::invalid_config(format!(
        "unknown URL scheme {scheme:?} in {:?}{hint} (known: {})",
        redact(url),
        SCHEMES.join(", ")
    )))
}

/// The URL with its password replaced by `***`, for messages and logs.
pub fn redact(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    match authority.rsplit_once('@') {
        Some((user, host)) => {
            let user = user.split_once(':').map_or(user.to_owned(), |(name, _)| format!("{name}:***"));
            format!("{scheme}://{user}@{host}{path}")
        }
        None => url.to_owned(),
    }
}
