//! A Redis server, or Valkey, from version 7.0: Streams that keep events until every group has finished them, and
//! [`pubsub`], which keeps nothing.
//!
//! | part | its duty |
//! |---|---|
//! | [`address`], [`link`], [`fault`], [`value`] | from the URL to a connection that comes back; what errors and answers mean |
//! | [`keys`], [`scripts`] | the names of the keys; the atomic steps inside the server |
//! | [`partition`], [`doorbell`] | one part of the bus: its clock and its keeper; the one connection that waits |
//! | [`publish`], [`member`], [`intake`], [`hold`], [`marks`], [`settle`], [`source`] | the way of an event, in this order |
//! | [`ordered`] | the same way in a group that keeps order per partition key |
//! | [`mail`] | replies to requests, and who answers them |
//! | [`group`], [`dead`], [`history`], [`retention`], [`probe`] | groups, dead letters, the log, what is removed, what the server keeps |
//! | [`broadcast`], [`pubsub`] | the ways without a group |
//!
//! A group of ours is a consumer group of the stream, and each subscription in each process a consumer of its own name.
//! What is taken from the log for the first time lies in the server's pending list, fenced by consumer and delivery
//! count. Whatever comes back (a retry, a delivery given back, a replay) is copied into the group's own store of work, a
//! sorted set by due time, and leased there by a token. `docs/wire.md` describes the keys.

mod address;
mod broadcast;
mod dead;
mod direct;
mod doorbell;
mod each;
mod fault;
mod group;
mod history;
mod hold;
mod intake;
mod keys;
mod link;
mod mail;
mod marks;
mod member;
mod ordered;
mod partition;
mod probe;
mod publish;
mod pubsub;
mod resp;
mod retention;
mod scripts;
mod settle;
mod source;
mod value;
mod wire;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use bytes::Bytes;
use redis::Value;
use tokio::time::Instant;

use self::address::Address;
use self::dead::Change;
use self::doorbell::Doorbell;
use self::keys::Keys;
use self::link::{Link, Server};
use self::partition::{PATIENCE, Partition, lock};
use self::probe::Probe;
use self::publish::Publisher;
use self::retention::Limits;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, ReplayBatch, ReplayStep};
use crate::transport::room::Room;
use crate::transport::{
    Capabilities, Confirm, Durability, GroupSpec, GroupStats, Guarantees, Mailbox, Outgoing, Receipt, Settings, Source,
    Task, Transport, Watched,
};

pub(super) use self::pubsub::open as open_pubsub;

/// Longest time that a caller may wait, so that adding it to a clock cannot overflow.
const FOR_EVER: Duration = Duration::from_secs(86_400 * 365);

struct Redis(Arc<Shared>);

struct Shared {
    partitions: Vec<Arc<Partition>>,
    settings: Settings,
    room: Room,
    /// What a publish waits for.
    wanted: Confirm,
    /// Bytes of an event that the server takes.
    largest: usize,
    sources: Mutex<Vec<Weak<dyn Source>>>,
    seen: mail::Seen,
    closed: AtomicBool,
}

/// Checks the URL.
pub(super) fn check(scheme: &str, rest: &str) -> Result<()> {
    Address::parse(scheme, rest).map(drop)
}

/// Connects, measures the server and makes sure that the bus there is one we understand.
pub(super) fn open(scheme: &str, rest: &str, settings: Settings) -> Task<Result<Arc<dyn Transport>>> {
    let address = Address::parse(scheme, rest);
    Box::pin(async move {
        let server = Arc::new(Server::new(address?));
        let shared = Shared::open(server, settings).await.map_err(|cause| cause.during("open"))?;
        Ok(Arc::new(Redis(shared)) as Arc<dyn Transport>)
    })
}

impl Shared {
    async fn open(server: Arc<Server>, settings: Settings) -> Result<Arc<Self>> {
        let wanted = if settings.durability == Durability::Full && settings.confirm == Confirm::Memory {
            Confirm::Disk
        } else {
            settings.confirm
        };
        let link = Link::new(server.clone(), Keys::bus_meta(&settings.bus));
        link.check().await?;
        let probe = Probe::of(&link, Instant::now() + PATIENCE).await?;
        probe.judge(settings.durability, wanted)?;
        let count = agree(&link, &settings).await?;
        let partitions: Vec<_> = (0..count)
            .map(|number| Arc::new(Partition::new(number, Keys::new(&settings.bus, number, count), server.clone())))
            .collect();
        let limits = Limits {
            retention: settings.retention.unwrap_or(retention::RETENTION),
            max_age: settings.max_age,
            max_events: settings.max_events.map(|most| most.div_ceil(u64::from(count))),
            max_bytes: settings.max_bytes.map(|most| most.div_ceil(u64::from(count))),
        };
        for partition in &partitions {
            partition.look(&[]).await?;
            if limits.max_bytes.is_some() {
                retention::memory(partition).await?; // a user who may not ask could not keep the limit
            }
            let runtime = &crate::process::current().runtime;
            runtime.spawn(partition.clone().keep(limits.clone()));
            runtime.spawn(Doorbell::run(partition.clone()));
            let confirm = probe.confirm(wanted);
            partition.publisher.direct.confirm.get_or_init(|| confirm);
            runtime.spawn(Publisher::run(partition.clone(), confirm));
        }
        let room = Room::new(settings.publish_buffer_bytes, settings.when_full);
        Ok(Arc::new(Self {
            partitions,
            settings,
            room,
            wanted,
            largest: probe.largest,
            sources: Mutex::default(),
            seen: mail::Seen::default(),
            closed: AtomicBool::new(false),
        }))
    }

    fn check(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(fault::closed()) } else { Ok(()) }
    }

    async fn guarantees(&self) -> Result<Guarantees> {
        self.check()?;
        let partition = &self.partitions[0];
        let probe = Probe::of(&partition.work, partition.patience()).await?;
        let details =
            vec![("address", partition.server.address.describe()), ("partitions", self.partitions.len().to_string())];
        Ok(probe.guarantees(self.wanted, details))
    }

    async fn subscribe(&self, spec: GroupSpec) -> Result<Arc<dyn Source>> {
        self.check()?;
        let max_payload = self.settings.max_payload_bytes;
        let source: Arc<dyn Source> = match spec.broadcast {
            true => broadcast::join(&self.partitions, spec, max_payload).await?,
            false => source::join(&self.partitions, spec, max_payload).await?,
        };
        let mut sources = lock(&self.sources);
        sources.retain(|source| source.strong_count() > 0);
        sources.push(Arc::downgrade(&source));
        drop(sources);
        self.check()?; // closed meanwhile: dropping the source leaves the group
        Ok(source)
    }

    async fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Result<Vec<Receipt>> {
        self.check()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let deadline = Instant::now() + timeout.min(FOR_EVER);
        publish::publish(&self.partitions, &self.room, batch, deadline, (&self.settings, self.largest)).await
    }

    async fn publish_each(&self, batch: Vec<Outgoing>, timeout: Duration) -> Vec<Result<Receipt>> {
        if let Err(closed) = self.check() {
            return batch.iter().map(|_| Err(closed.clone())).collect();
        }
        let deadline = Instant::now() + timeout.min(FOR_EVER);
        each::publish(&self.partitions, &self.room, batch, deadline, (&self.settings, self.largest)).await
    }

    async fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let sources = std::mem::take(&mut *lock(&self.sources));
        let leaving = sources.iter().filter_map(Weak::upgrade).map(|source| async move { source.close().await });
        futures_util::future::join_all(leaving).await;
        self.partitions.iter().for_each(|partition| partition.close());
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.partitions.iter().for_each(|partition| partition.close());
    }
}

/// The number of partitions that the bus has; a new one gets what the settings say. `InvalidConfig` when they differ.
async fn agree(link: &Link, settings: &Settings) -> Result<u32> {
    let key = Keys::bus_meta(&settings.bus);
    let deadline = Instant::now() + PATIENCE;
    let mut get = redis::cmd("HMGET");
    get.arg(&key).arg("partitions").arg("format");
    let mut facts = value::list(link.run(&get, deadline).await?)?;
    // Not tried where it is there: a full server would refuse it.
    if facts.first() == Some(&Value::Nil) {
        let mut set = redis::cmd("HSETNX");
        link.run(set.arg(&key).arg("partitions").arg(settings.partitions.unwrap_or(1)), deadline).await?;
        facts = value::list(link.run(&get, deadline).await?)?;
    }
    let mut facts = facts.into_iter().map(value::text);
    let count = facts.next().transpose()?.and_then(|count| count.parse().ok()).unwrap_or(1);
    match facts.next().transpose()? {
        Some(format) if !format.is_empty() && format != "1" => {
            return Err(Error::invalid_config(format!(
                "bus {:?} has the format {format}, this polybus knows format 1; use the same version of polybus in all processes",
                settings.bus
            )));
        }
        _ => {}
    }
    match settings.partitions {
        Some(wanted) if wanted != count => Err(Error::invalid_config(format!(
            "bus {:?} was made with partitions={count} and cannot have {wanted}: its events would lose their order; leave the option out, or use another bus name",
            settings.bus
        ))),
        _ => Ok(count),
    }
}

/// A boxed future of the shared part, with the name of the call in its errors.
macro_rules! task {
    ($self:ident, $name:literal, |$shared:ident| $body:expr) => {{
        let $shared = $self.0.clone();
        Box::pin(async move {
            async {
                $shared.check()?;
                $body
            }
            .await
            .map_err(|cause: Error| cause.during($name))
        })
    }};
}

impl Transport for Redis {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable: true,
            cross_process: true,
            ack: true,
            delayed_retry: true,
            delayed_publish: true,
            dead_letters: true,
            start_position: true,
            broadcast: true,
            ordered: true,
            request: true,
            idempotent: true,
            publish_dedupe: true,
            history: true,
        }
    }

    fn guarantees(&self) -> Task<Result<Guarantees>> {
        task!(self, "guarantees", |shared| shared.guarantees().await)
    }

    fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Result<Vec<Receipt>>> {
        task!(self, "publish", |shared| shared.publish(batch, timeout).await)
    }

    fn publish_each(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Vec<Result<Receipt>>> {
        let shared = self.0.clone();
        Box::pin(async move {
            let stored = shared.publish_each(batch, timeout).await;
            stored.into_iter().map(|outcome| outcome.map_err(|cause| cause.during("publish"))).collect()
        })
    }

    fn watched(&self) -> Option<Arc<dyn Watched>> {
        let [only] = &self.0.partitions[..] else { return None };
        only.publishing.own().map(|(wire, _)| wire.watched())
    }

    fn subscribe(&self, spec: GroupSpec) -> Task<Result<Arc<dyn Source>>> {
        task!(self, "subscribe", |shared| shared.subscribe(spec).await)
    }

    fn group_stats(&self, group: Text) -> Task<Result<GroupStats>> {
        task!(self, "group stats", |shared| group::stats(&shared.partitions, &group).await)
    }

    fn delete_group(&self, group: Text) -> Task<Result<bool>> {
        task!(self, "delete group", |shared| group::delete(&shared.partitions, &group).await)
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<Text>,
        limit: usize,
    ) -> Task<Result<Vec<DeadLetter>>> {
        task!(self, "dead letters", |shared| {
            let max_payload = shared.settings.max_payload_bytes;
            dead::list(&shared.partitions, &filter, after, limit, max_payload).await
        })
    }

    fn dead_count(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "dead letters", |shared| {
            dead::count(&shared.partitions, &filter, shared.settings.max_payload_bytes).await
        })
    }

    fn dead_replay(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "replay", |shared| {
            dead::change(&shared.partitions, &filter, Change::Replay, shared.settings.max_payload_bytes).await
        })
    }

    fn dead_purge(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "purge", |shared| {
            dead::change(&shared.partitions, &filter, Change::Purge, shared.settings.max_payload_bytes).await
        })
    }

    fn responders(&self, event_type: Text) -> Task<Result<Option<bool>>> {
        task!(self, "request", |shared| mail::has_responder(&shared.partitions[0], &shared.seen, &event_type).await)
    }

    fn post(&self, mailbox: Text, letter: Bytes, ttl: Duration) -> Task<Result<()>> {
        task!(self, "reply", |shared| mail::post(&shared.partitions[0], &mailbox, &letter, ttl).await)
    }

    fn mailbox(&self, name: Text) -> Result<Box<dyn Mailbox>> {
        self.0.check()?;
        Ok(Box::new(mail::RedisMailbox::new(&self.0.partitions[0], &name)))
    }

    fn history(
        &self,
        filter: HistoryFilter,
        after: Option<Text>,
        limit: usize,
        records: bool,
    ) -> Task<Result<Vec<HistoryEntry>>> {
        task!(self, "history", |shared| {
            let max_payload = shared.settings.max_payload_bytes;
            history::list(&shared.partitions, &filter, after, limit, records, max_payload).await
        })
    }

    fn replay(&self, step: ReplayStep) -> Task<Result<ReplayBatch>> {
        task!(self, "replay", |shared| history::replay(&shared.partitions, &step).await)
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        let partitions = || self.0.partitions.iter();
        let resets = partitions().map(|partition| partition.resets.load(Ordering::Relaxed)).sum();
        let reconnects = self.0.partitions[0].server.reconnects.load(Ordering::Relaxed);
        vec![("stream_resets_total", resets), ("reconnects_total", reconnects)]
    }

    fn close(&self) -> Task<()> {
        let shared = self.0.clone();
        Box::pin(async move { shared.close().await })
    }
}
