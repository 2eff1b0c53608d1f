//! Options as plain data, with their defaults in one place.
//!
//! They arrive from other languages as one JSON object with `snake_case` names and durations in milliseconds (`_ms`);
//! [`Naming`] turns these names back into the caller's own for messages.

mod outbox;
mod reader;
mod relay;

use std::time::{Duration, SystemTime};

use self::reader::Reader;
use crate::batch::BatchOptions;
use crate::breaker::BreakerOptions;
use crate::clock::Clock;
use crate::codec;
use crate::dead_letter::DeadLetterFilter;
use crate::error::{Error, Result};
use crate::event::Text;
use crate::history::HistoryFilter;
use crate::pattern::Pattern;
use crate::retry::RetryPolicy;
use crate::transport::{Confirm, Durability, Settings, Start, WhenFull};

/// Whose names a message uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Naming {
    /// `lease`, in seconds.
    #[default]
    Python,
    /// `leaseMs`, in milliseconds.
    TypeScript,
}

impl Naming {
    fn word(self, name: &str) -> String {
        match self {
            Self::Python => name.strip_suffix("_ms").unwrap_or(name).to_owned(),
            Self::TypeScript => {
                let mut up = false;
                let camel = name.chars().filter_map(|c| {
                    let upper = std::mem::replace(&mut up, c == '_');
                    (c != '_').then(|| if upper { c.to_ascii_uppercase() } else { c })
                });
                camel.collect()
            }
        }
    }
}

/// How events reach handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Through the transport; `publish` returns when the event is stored.
    #[default]
    Async,
    /// `publish` runs this process's matching handlers and returns when they ended.
    Sync,
}

/// What a second handler of the same name does. The bindings do it: they have the handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDuplicate {
    /// It is refused with `DuplicateSubscription`.
    Error,
    /// It takes the place of the first: a reloaded module.
    Replace,
}

/// Options of a bus.
#[derive(Clone)]
pub struct BusOptions {
    /// Name of the service: `source` of its events and prefix of its groups. Required.
    pub service: String,
    /// Buses inside one store do not see each other. Default `default`.
    pub bus: String,
    /// Default [`Mode::Async`].
    pub mode: Mode,
    /// Default concurrency of a subscription. Default 10.
    pub worker_count: usize,
    /// Most deliveries that one subscription holds in this process, running and buffered. Default 1000.
    pub buffer_size: usize,
    /// What a publish does when too many wait. Default [`WhenFull::Wait`].
    pub when_full: WhenFull,
    /// Bytes of publishes that may wait: to be written, or in memory to be handled. Default 64 MiB, 512 MiB in memory.
    pub publish_buffer_bytes: Option<usize>,
    /// A publish that fails in the transport is logged and counted, not raised. Default false.
    pub fail_open: bool,
    /// Largest payload in bytes, on publish and on consume. Default 1 MiB.
    pub max_payload_bytes: usize,
    /// Default policy of the subscriptions.
    pub retry: RetryPolicy,
    /// Default [`Durability::Warn`].
    pub durability: Durability,
    /// How long a delivery stays ours without a heartbeat; at least 1 s. Default 30 s.
    pub lease: Duration,
    /// Longest wait of one publish. Default 10 s.
    pub publish_timeout: Duration,
    /// How long an event stays in the log after every group finished it. Default what the transport says: 1 h in a
    /// SQLite file, 1 min in the memory of a Redis server.
    pub retention: Option<Duration>,
    /// Events older than this are dropped even if a group has not finished them. Default none.
    pub max_age: Option<Duration>,
    /// Most events kept, likewise. Default none.
    pub max_events: Option<u64>,
    /// Most bytes kept, likewise: of the events as stored, on Redis the memory of the log. Default none.
    pub max_bytes: Option<u64>,
    /// Where a publish must have arrived before it returns, on servers. Default [`Confirm::Memory`].
    pub confirm: Confirm,
    /// How long the idempotency key of a published event is remembered: another publish with it is absorbed. Zero turns
    /// it off. Default 1 h ([`IDEMPOTENCY_WINDOW`](crate::transport::IDEMPOTENCY_WINDOW)).
    pub idempotency_window: Option<Duration>,
    /// Parts that the log is split into, by partition key; fixed when the bus is made on a server. Default what the bus
    /// has, 1 for a new one.
    pub partitions: Option<u32>,
    /// Open a file on a network file system. Default false.
    pub allow_network_fs: bool,
    /// What a second handler of the same name does. Default what the binding finds: `Replace` under a development server.
    pub on_duplicate: Option<OnDuplicate>,
    /// Time stands still until the test kit moves it. Default false.
    pub virtual_clock: bool,
}

impl BusOptions {
    /// The defaults, for `service`.
    pub fn new(service: impl Into<String>) -> Self {
        Self {
            service: service.into(),
            bus: "default".into(),
            mode: Mode::Async,
            worker_count: 10,
            buffer_size: 1000,
            when_full: WhenFull::Wait,
            publish_buffer_bytes: None,
            fail_open: false,
            max_payload_bytes: codec::DEFAULT_MAX_PAYLOAD,
            retry: RetryPolicy::default(),
            durability: Durability::Warn,
            lease: Duration::from_secs(30),
            publish_timeout: Duration::from_secs(10),
            retention: None,
            max_age: None,
            max_events: None,
            max_bytes: None,
            confirm: Confirm::Memory,
            idempotency_window: None,
            partitions: None,
            allow_network_fs: false,
            on_duplicate: None,
            virtual_clock: false,
        }
    }

    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("bus", json, naming)?;
        let service = from.string("service")?;
        let missing = service.is_none();
        let base = Self::new(service.map_or(Ok(String::new()), |service| check_name("service", &service))?);
        let options = Self {
            bus: check_name("bus", &from.string("bus")?.unwrap_or(base.bus))?,
            mode: from.word("mode", &MODES)?.unwrap_or_default(),
            worker_count: from.integer("worker_count", 1..=100_000)?.map_or(base.worker_count, |n| n as usize),
            buffer_size: from.integer("buffer_size", 1..=1_000_000)?.map_or(base.buffer_size, |n| n as usize),
            when_full: from.word("when_full", &WHEN_FULL)?.unwrap_or_default(),
            publish_buffer_bytes: from.integer("publish_buffer_bytes", 1024..=4 << 30)?.map(|n| n as usize),
            fail_open: from.boolean("fail_open")?.unwrap_or(false),
            max_payload_bytes: from
                .integer("max_payload_bytes", 1..=512 << 20)?
                .map_or(base.max_payload_bytes, |n| n as usize),
            retry: from.retry("retry")?.unwrap_or(base.retry),
            durability: from.word("durability", &DURABILITIES)?.unwrap_or_default(),
            lease: from.duration("lease_ms", Duration::from_secs(1))?.unwrap_or(base.lease),
            publish_timeout: from
                .duration("publish_timeout_ms", Duration::from_millis(1))?
                .unwrap_or(base.publish_timeout),
            retention: from.duration("retention_ms", Duration::ZERO)?,
            max_age: from.duration("max_age_ms", Duration::from_millis(1))?,
            max_events: from.integer("max_events", 1..=u64::MAX)?,
            max_bytes: from.integer("max_bytes", 1..=u64::MAX)?,
            confirm: from.word("confirm", &CONFIRMS)?.unwrap_or_default(),
            idempotency_window: from.duration("idempotency_window_ms", Duration::ZERO)?,
            partitions: from.integer("partitions", 1..=256)?.map(|n| n as u32),
            allow_network_fs: from.boolean("allow_network_fs")?.unwrap_or(false),
            on_duplicate: from.word("on_duplicate", &ON_DUPLICATE)?,
            virtual_clock: from.boolean("virtual_clock")?.unwrap_or(false),
            service: base.service,
        };
        from.finish()?; // first, because a misspelt service is named there
        if missing {
            return Err(Error::invalid_config("service is missing: name the service, like service=\"shop\""));
        }
        Ok(options)
    }

    /// What of it concerns the transport.
    pub fn settings(&self, clock: Clock) -> Settings {
        Settings {
            bus: self.bus.as_str().into(),
            durability: self.durability,
            retention: self.retention,
            max_age: self.max_age,
            max_events: self.max_events,
            max_bytes: self.max_bytes,
            confirm: self.confirm,
            idempotency_window: self.idempotency_window,
            partitions: self.partitions,
            max_payload_bytes: self.max_payload_bytes,
            publish_buffer_bytes: self.publish_buffer_bytes,
            when_full: self.when_full,
            clock,
            allow_network_fs: self.allow_network_fs,
        }
    }
}

const MODES: [(&str, Mode); 2] = [("async", Mode::Async), ("sync", Mode::Sync)];

const ON_DUPLICATE: [(&str, OnDuplicate); 2] = [("error", OnDuplicate::Error), ("replace", OnDuplicate::Replace)];
const WHEN_FULL: [(&str, WhenFull); 2] = [("wait", WhenFull::Wait), ("error", WhenFull::Error)];

const CONFIRMS: [(&str, Confirm); 3] =
    [("memory", Confirm::Memory), ("disk", Confirm::Disk), ("replica", Confirm::Replica)];

const DURABILITIES: [(&str, Durability); 5] = [
    ("warn", Durability::Warn),
    ("required", Durability::Required),
    ("off", Durability::Off),
    ("full", Durability::Full),
    ("normal", Durability::Normal),
];

/// How long an idempotent subscription remembers what it handled, unless the user says otherwise.
pub const IDEMPOTENT_RETENTION: Duration = Duration::from_secs(7 * 86_400);

/// By which key a subscription tells that an event was handled before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// The event's idempotency key, or its id where it has none.
    Event,
    /// What the handler answers when it is asked: see [`Job::attempt`](crate::handler::Job::attempt).
    Handler,
}

/// Options of a subscription.
#[derive(Debug, Clone, Default)]
pub struct SubscribeOptions {
    /// Unique on the bus. The bindings default it to the handler's qualified name.
    pub name: String,
    /// Durable group. Default `<service>/<name>`.
    pub group: Option<String>,
    /// Handlers that run at once. Default the bus's `worker_count`, and 1 for a handler of batches.
    pub concurrency: Option<usize>,
    /// Deliveries leased ahead of a free handler. Default 0: nothing waits here that another process could do.
    pub prefetch: usize,
    /// Default the bus's policy.
    pub retry: Option<RetryPolicy>,
    /// A handler that runs longer is cancelled and its delivery retried. Default none.
    pub timeout: Option<Duration>,
    /// Where a new group begins. Default [`Start::New`].
    pub start: Start,
    /// Every process gets every event from now on; nothing is settled, retried or kept. Default false.
    pub broadcast: bool,
    /// Events of one partition key are handled one at a time and in order, over all processes of the group. Default
    /// false.
    pub ordered: bool,
    /// Keep what cannot be handled; otherwise it is logged, counted and dropped. Default true.
    pub drop_dead: bool,
    /// What the handler returns answers requests: see [`Bus::respond`](crate::Bus::respond). Changes the defaults: no
    /// retries, because somebody waits, and no dead letters. Default false.
    pub respond: bool,
    /// Stop taking while handlers keep failing. Default none.
    pub breaker: Option<BreakerOptions>,
    /// The handler takes many events at once. Default none.
    pub batch: Option<BatchOptions>,
    /// Handle events of one key once, in the whole group. Default none: an event that comes twice is handled twice.
    pub idempotent: Option<Key>,
    /// How long a handled key is remembered. Default 7 days ([`IDEMPOTENT_RETENTION`]).
    pub idempotent_retention: Option<Duration>,
    /// An event that expires before a handler got it becomes a dead letter; otherwise it is dropped and counted.
    /// Default false.
    pub dead_letter_expired: bool,
}

impl SubscribeOptions {
    /// Options of a subscription of that name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Options of a responder of that name.
    pub fn responder(name: impl Into<String>) -> Self {
        Self { respond: true, drop_dead: true, retry: Some(RetryPolicy::NONE), ..Self::new(name) }
    }

    /// Refuses options that exclude each other, whatever language they came from.
    pub(crate) fn check(&self) -> Result<()> {
        let batch = self.batch.is_some();
        let pairs = [
            (batch && self.ordered, "batch and ordered exclude each other"),
            (batch && self.idempotent.is_some(), "batch and idempotent exclude each other"),
            (batch && self.respond, "batch and respond exclude each other"),
            (
                self.broadcast && self.breaker.is_some(),
                "breaker and broadcast exclude each other: what a broadcast does not handle cannot be handed back",
            ),
            (
                self.broadcast && self.ordered,
                "ordered and broadcast exclude each other: a broadcast has no group whose processes could take turns",
            ),
        ];
        if let Some((_, why)) = pairs.iter().find(|(both, _)| *both) {
            return Err(Error::invalid_config(format!("{why}; leave one out")));
        }
        if self.broadcast && self.idempotent.is_some() {
            return Err(Error::invalid_config(
                "a broadcast has no group that could remember what it handled: leave out idempotent, or broadcast",
            ));
        }
        if self.idempotent.is_none() && self.idempotent_retention.is_some() {
            return Err(Error::invalid_config("the idempotent retention says nothing without idempotent set to true"));
        }
        Ok(())
    }

    /// The durable group of this subscription in `service`.
    pub fn group_for(&self, service: &str) -> String {
        self.group.clone().unwrap_or_else(|| format!("{service}/{}", self.name))
    }

    /// How many handlers run at once on a bus.
    pub fn concurrency_on(&self, bus: &BusOptions) -> usize {
        let (default, most) = match &self.batch {
            None => (bus.worker_count, bus.buffer_size),
            Some(batch) => (1, bus.buffer_size / batch.size.max(1)),
        };
        self.concurrency.unwrap_or(default).min(most.max(1))
    }

    /// Refuses what cannot go together. `InvalidConfig`.
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("subscription", json, naming)?;
        let Some(name) = from.string("name")? else {
            return Err(Error::invalid_config("the subscription has no name; pass one, like name=\"audit\""));
        };
        let respond = from.boolean("respond")?.unwrap_or(false);
        let options = Self {
            respond,
            name: check_label("name", &name)?,
            group: from.string("group")?.map(|group| check_label("group", &group)).transpose()?,
            concurrency: from.integer("concurrency", 1..=100_000)?.map(|n| n as usize),
            prefetch: from.integer("prefetch", 0..=100_000)?.map_or(0, |n| n as usize),
            retry: from.retry("retry")?.or(respond.then_some(RetryPolicy::NONE)),
            timeout: from.duration("timeout_ms", Duration::from_millis(1))?,
            start: from.start("start")?.unwrap_or_default(),
            broadcast: from.boolean("broadcast")?.unwrap_or(false),
            ordered: from.boolean("ordered")?.unwrap_or(false),
            drop_dead: !from.boolean("dead_letter")?.unwrap_or(!respond),
            dead_letter_expired: from.boolean("dead_letter_expired")?.unwrap_or(false),
            breaker: from.members("breaker", Reader::breaker)?,
            batch: from.members("batch", Reader::batch)?,
            idempotent: from.key("idempotent")?,
            idempotent_retention: from.duration("idempotent_retention_ms", Duration::from_millis(1))?,
        };
        if options.dead_letter_expired && (options.drop_dead || options.broadcast) {
            let other = from.naming.word(if options.broadcast { "broadcast" } else { "dead_letter" });
            let what = from.naming.word("dead_letter_expired");
            return Err(Error::invalid_config(format!(
                "{what} keeps dead letters and {other} says that there are none; leave one of them out"
            )));
        }
        from.finish()?;
        options.check()?;
        Ok(options)
    }
}

/// Options of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestOptions {
    /// How long to wait for the reply. Default 5 s.
    pub timeout: Duration,
}

impl Default for RequestOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(5) }
    }
}

impl RequestOptions {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("request", json, naming)?;
        let timeout = from.duration("timeout_ms", Duration::from_millis(1))?.unwrap_or(Self::default().timeout);
        from.finish()?;
        Ok(Self { timeout })
    }
}

/// Options of one publish.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// Not delivered before this much time has passed. Default none.
    pub delay: Option<Duration>,
    /// Not delivered after this much time has passed. Default none.
    pub expires_in: Option<Duration>,
    /// Default the bus's mode.
    pub mode: Option<Mode>,
}

impl PublishOptions {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("publish", json, naming)?;
        let options = Self {
            delay: from.duration("delay_ms", Duration::ZERO)?,
            expires_in: from.duration("expires_in_ms", Duration::from_millis(1))?,
            mode: from.word("mode", &MODES)?,
        };
        from.finish()?;
        Ok(options)
    }
}

/// Which dead letters a call is about, and how many.
#[derive(Debug, Clone, Default)]
pub struct DeadLetterQuery {
    /// Which.
    pub filter: DeadLetterFilter,
    /// Only those after this record. Default none.
    pub after: Option<Text>,
    /// At most this many. Default 100.
    pub limit: usize,
}

impl DeadLetterQuery {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    ///
    /// `since` and `before` are milliseconds since 1970; `older_than_ms` is counted back from `now`.
    pub fn from_json(json: &str, naming: Naming, now: SystemTime) -> Result<Self> {
        let mut from = Reader::new("dead letter", json, naming)?;
        let text = |text: Option<String>| text.map(Text::from);
        let older_than = from.duration("older_than_ms", Duration::ZERO)?;
        let filter = DeadLetterFilter {
            id: text(from.string("id")?),
            group: text(from.string("group")?),
            pattern: from.string("pattern")?.map(|pattern| Pattern::new(&pattern)).transpose()?,
            since: from.time("since")?,
            before: from.time("before")?.or_else(|| older_than.and_then(|age| now.checked_sub(age))),
        };
        let after = text(from.string("after")?);
        let limit = from.integer("limit", 1..=100_000)?.map_or(100, |limit| limit as usize);
        from.finish()?;
        Ok(Self { filter, after, limit })
    }
}

/// Which events of the log to read, and how many.
#[derive(Debug, Clone)]
pub struct HistoryQuery {
    /// Which.
    pub filter: HistoryFilter,
    /// Only those after this position. Default none.
    pub after: Option<Text>,
    /// At most this many. Default 100.
    pub limit: usize,
    /// With what each group did with them. Default false.
    pub records: bool,
}

impl HistoryQuery {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word. `since` and
    /// `until` are milliseconds since 1970.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("history", json, naming)?;
        let query = Self {
            filter: from.events()?,
            after: from.string("after")?.map(Text::from),
            limit: from.integer("limit", 1..=100_000)?.map_or(100, |limit| limit as usize),
            records: from.boolean("records")?.unwrap_or(false),
        };
        from.finish()?;
        query.filter.check()?;
        Ok(query)
    }
}

/// Which events of the log to hand to one group again.
#[derive(Debug, Clone)]
pub struct ReplayOptions {
    /// The only group that gets them.
    pub group: Text,
    /// Which; those that the group does not follow are left out.
    pub filter: HistoryFilter,
    /// Only those after this position. Default none.
    pub after: Option<Text>,
    /// Stop after this many. Default none.
    pub limit: Option<u64>,
}

impl ReplayOptions {
    /// All events that `group` follows.
    pub fn new(group: impl Into<Text>) -> Self {
        Self { group: group.into(), filter: HistoryFilter::default(), after: None, limit: None }
    }

    /// Reads a JSON object, as [`HistoryQuery::from_json`].
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("replay", json, naming)?;
        let Some(group) = from.string("group")? else {
            return Err(Error::invalid_config(
                "group is missing: name the one group that gets the events, like group=\"shop/mail\"",
            ));
        };
        let options = Self {
            group: group.into(),
            filter: from.events()?,
            after: from.string("after")?.map(Text::from),
            limit: from.integer("limit", 1..=u64::MAX)?,
        };
        from.finish()?;
        options.filter.check()?;
        Ok(options)
    }
}

impl RetryPolicy {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("retry policy", json, naming)?;
        let policy = from.policy()?;
        from.finish()?;
        Ok(policy)
    }
}

/// A name that goes into URLs, keys and labels.
fn check_name(what: &str, name: &str) -> Result<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !name.is_empty() && name.len() <= 100 && name.chars().all(plain) {
        return Ok(name.to_owned());
    }
    Err(Error::invalid_config(format!(
        "{what}={name:?} is not a valid name; use 1 to 100 letters, digits, '_', '-' or '.'"
    )))
}

/// A name for people and for groups: printable, without spaces at its ends.
fn check_label(what: &str, label: &str) -> Result<String> {
    let printable = label.chars().all(|c| !c.is_control()) && label.trim() == label;
    if !label.is_empty() && label.len() <= 200 && printable {
        return Ok(label.to_owned());
    }
    Err(Error::invalid_config(format!("{what}={label:?} is not valid; use 1 to 200 printable characters")))
}
