//! The bus: options, a transport that is opened on first use, and the subscriptions of this process.

mod kit;
mod requests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::{OnceCell, watch};

use crate::clock::Clock;
use crate::codec;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::dispatch::{Dispatcher, Once, Rules};
use crate::error::{Error, ErrorKind, Result, closed};
use crate::event::{Event, EventType, Meta, Text};
use crate::handler::Handler;
use crate::history::{HistoryEntry, ReplayBatch, ReplayStep};
use crate::metrics::{Ledger, Origin};
use crate::options::{BusOptions, HistoryQuery, IDEMPOTENT_RETENTION, SubscribeOptions};
use crate::pattern::Pattern;
use crate::process::{self, PerProcess};
use crate::request::{self, Desk};
use crate::subscription::{Counters, Facts, Subscription, Wish};
use crate::testkit::{Faults, Published};
use crate::transport::{self, Capabilities, GroupSpec, GroupStats, Guarantees, Outgoing, Receipt, Transport};

/// An event bus. Cheap to clone; clones share everything. Opens nothing until it is used, and may be used in a forked
/// child: the child connects anew and has no subscriptions until it makes its own.
#[derive(Clone)]
pub struct Bus(Arc<Inner>);

struct Inner {
    url: String,
    options: BusOptions,
    service: Text,
    clock: Clock,
    kit: Option<Kit>,
    state: PerProcess<State>,
}

struct Kit {
    faults: Arc<Faults>,
    published: Published,
}

struct State {
    /// Replaced by `start` after `close`.
    session: Mutex<Arc<Session>>,
    published: AtomicU64,
    publish_failed: AtomicU64,
    requests: Arc<request::Counts>,
    publish_duplicates: AtomicU64,
    by_origin: Ledger<u64>,
    sample: Mutex<Sample>,
}

/// The groups' numbers as they were counted last, for [`Bus::sampled_stats`].
#[derive(Default)]
struct Sample {
    stats: Vec<SubscriptionStats>,
    counting: bool,
}

/// From start to close.
#[derive(Default)]
struct Session {
    transport: OnceCell<Arc<dyn Transport>>,
    subscriptions: Mutex<Vec<Subscription>>,
    /// Where replies arrive; there since the first request.
    desk: std::sync::OnceLock<Arc<Desk>>,
    closed: watch::Sender<bool>,
}

/// What one subscription did and what its group has to do.
#[derive(Clone)]
#[allow(missing_docs, reason = "the names say it")]
pub struct SubscriptionStats {
    pub subscription: Subscription,
    /// Counted on the live store; `None` for a broadcast, which has no group.
    pub group: Option<GroupStats>,
}

impl Bus {
    /// A bus over the store that `url` names. Opens nothing. `InvalidConfig` for a URL that can never work.
    pub fn new(url: &str, options: BusOptions) -> Result<Self> {
        transport::check_url(url)?;
        let clock = if options.virtual_clock { Clock::stopped() } else { Clock::default() };
        let kit = options.virtual_clock.then(|| Kit { faults: Arc::default(), published: Published::default() });
        let service = options.service.as_str().into();
        Ok(Self(Arc::new(Inner { url: url.to_owned(), options, service, clock, kit, state: PerProcess::new() })))
    }

    /// The URL without its password.
    pub fn url(&self) -> String {
        transport::redact(&self.0.url)
    }

    /// The options it was made with.
    pub fn options(&self) -> &BusOptions {
        &self.0.options
    }

    fn state(&self) -> &State {
        self.0.state.get_or_init(|| State {
            session: Mutex::default(),
            published: AtomicU64::new(0),
            publish_failed: AtomicU64::new(0),
            requests: Arc::default(),
            publish_duplicates: AtomicU64::new(0),
            by_origin: Ledger::default(),
            sample: Mutex::default(),
        })
    }

    fn session(&self) -> Arc<Session> {
        lock(&self.state().session).clone()
    }

    /// Opens the transport. Needed after [`Bus::close`]; otherwise the first use does it.
    pub async fn start(&self) -> Result<()> {
        let session = {
            let mut current = lock(&self.state().session);
            if *current.closed.borrow() {
                *current = Arc::default();
            }
            current.clone()
        };
        self.transport(&session).await.map(drop)
    }

    async fn transport(&self, session: &Session) -> Result<Arc<dyn Transport>> {
        if *session.closed.borrow() {
            return Err(closed());
        }
        if let Some(transport) = session.transport.get() {
            return Ok(transport.clone());
        }
        let settings = self.0.options.settings(self.0.clock.clone());
        let opened = session.transport.get_or_try_init(|| transport::connect(&self.0.url, settings)).await;
        opened.cloned().map_err(|error| error.during("connect"))
    }

    async fn open(&self) -> Result<Arc<dyn Transport>> {
        self.transport(&self.session()).await
    }

    /// What the transport can do.
    pub async fn capabilities(&self) -> Result<Capabilities> {
        Ok(self.open().await?.capabilities())
    }

    /// What holds on the live store.
    pub async fn guarantees(&self) -> Result<Guarantees> {
        self.open().await?.guarantees().await
    }

    /// Stores the events in order, whole or not at all, and returns when they are as safe as the transport makes
    /// them. Fills in source and instance where the events have none. An event whose idempotency key was published before,
    /// within [`BusOptions::idempotency_window`], is not stored again: its receipt says `duplicate`.
    ///
    /// `BusClosed`, `PublishTimeout` (nothing stored), `PublishUnknown` (perhaps stored), `ConnectionFailed`,
    /// `BufferFull`, `PayloadTooLarge`. With `fail_open`, failures of the transport are logged and counted instead.
    pub async fn publish(&self, mut batch: Vec<Outgoing>) -> Result<Vec<Receipt>> {
        if *self.session().closed.borrow() {
            return Err(closed());
        }
        let limit = self.0.options.max_payload_bytes;
        let instance = &process::current().instance_id;
        let stamp = |(i, o)| Some((i, self.stamp(o, limit, instance).err()?));
        let failures: Vec<_> = batch.iter_mut().enumerate().filter_map(stamp).collect();
        if let Some((index, first)) = failures.first() {
            let kind = first.kind();
            let message = format!("event {index} of {}: {}; nothing was published", batch.len(), first.message());
            return Err(Error::new(kind, message).during("publish").listing(failures));
        }
        let copies = self.duplicate(&batch);
        // One by one where some may be absorbed, and then not counted.
        let singly = batch.iter().any(|outgoing| outgoing.event.meta.idempotency_key.is_some());
        let tally = match singly {
            true => batch.iter().map(|outgoing| (Origin::of(&outgoing.event), 1)).collect(),
            false => Origin::tally(batch.iter().map(|outgoing| &outgoing.event)),
        };
        let events: Vec<Event> = match &self.0.kit {
            Some(_) => batch.iter().map(|outgoing| outgoing.event.clone()).collect(),
            None => Vec::new(),
        };
        let ids: Vec<Text> = match self.0.options.fail_open {
            true => batch.iter().map(|outgoing| outgoing.event.meta.id.clone()).collect(),
            false => Vec::new(),
        };
        let count = batch.len() as u64;
        let published = async { self.open().await?.publish(batch, self.0.options.publish_timeout).await };
        match published.await {
            Ok(receipts) => {
                let duplicates = receipts.iter().filter(|receipt| receipt.duplicate).count() as u64;
                self.state().published.fetch_add(count - duplicates, Ordering::Relaxed);
                self.state().publish_duplicates.fetch_add(duplicates, Ordering::Relaxed);
                for (index, (origin, more)) in tally.into_iter().enumerate() {
                    if !singly || receipts.get(index).is_some_and(|receipt| !receipt.duplicate) {
                        self.state().by_origin.change(origin, |count| *count += more);
                    }
                }
                if let Some(kit) = &self.0.kit {
                    let stored = events.into_iter().zip(&receipts).filter(|(_, receipt)| !receipt.duplicate);
                    kit.published
                        .add(stored.map(|(event, _)| event).chain(copies.iter().map(|copy| copy.event.clone())));
                }
                if !copies.is_empty() {
                    self.open().await?.repeat(copies).await?;
                }
                Ok(receipts)
            }
            Err(error) => {
                self.state().publish_failed.fetch_add(count, Ordering::Relaxed);
                if !self.0.options.fail_open || error.kind() == ErrorKind::BusClosed {
                    return Err(error.during("publish"));
                }
                log::error!("{count} events were not published, fail_open is set: {error}");
                Ok(ids.into_iter().map(|id| Receipt { id, position: None, duplicate: false }).collect())
            }
        }
    }

    fn stamp(&self, outgoing: &mut Outgoing, limit: usize, instance: &Text) -> Result<()> {
        if outgoing.event.payload.len() > limit {
            codec::check_payload(&outgoing.event.payload, limit)?;
        }
        let meta = &outgoing.event.meta;
        if meta.source.is_none() || meta.instance_id.is_none() {
            let meta = outgoing.event.meta_mut();
            meta.source.get_or_insert_with(|| self.0.service.clone());
            meta.instance_id.get_or_insert_with(|| instance.clone());
        }
        Ok(())
    }

    /// What of `batch` is to be published twice.
    fn duplicate(&self, batch: &[Outgoing]) -> Vec<Outgoing> {
        let Some(kit) = &self.0.kit else { return Vec::new() };
        batch.iter().filter(|outgoing| kit.faults.take_duplicate(&outgoing.event)).cloned().collect()
    }

    /// Joins a group and hands its events to `handler`. Once this resolves every later publish is seen.
    ///
    /// `InvalidPattern`, `DuplicateSubscription` for a name that is in use on this bus, `ConnectionFailed`,
    /// `InvalidConfig` for an order that the group was not made with, or a batch that is larger than `buffer_size`.
    pub async fn subscribe(
        &self,
        pattern: &str,
        handler: Arc<dyn Handler>,
        options: SubscribeOptions,
    ) -> Result<Subscription> {
        let pattern = Pattern::new(pattern)?;
        options.check()?;
        let bus = &self.0.options;
        let concurrency = options.concurrency_on(bus);
        let size = options.batch.as_ref().map_or(1, |batch| batch.size);
        if size > bus.buffer_size {
            return Err(Error::invalid_config(format!(
                "a batch of {size} does not fit into the buffer of {}: make the batch smaller, or the buffer of the bus larger",
                bus.buffer_size
            )));
        }
        let name: Text = options.name.as_str().into();
        let group: Text = options.group_for(&bus.service).into();
        let session = self.session();
        let (wish, wishes) = watch::channel(Wish::Run);
        let (ended_tx, ended) = watch::channel(false);
        let counters = Arc::new(Counters::default());
        let facts = Facts {
            name: name.clone(),
            group: group.clone(),
            pattern: pattern.clone(),
            counters: counters.clone(),
            broadcast: options.broadcast,
            breaker: options.breaker.is_some(),
            source: OnceLock::new(),
        };
        let subscription = Subscription { facts: Arc::new(facts), wish, ended };
        {
            let mut known = lock(&session.subscriptions);
            known.retain(|other| !other.is_ended());
            if known.iter().any(|other| *other.name() == name) {
                return Err(Error::new(
                    ErrorKind::DuplicateSubscription,
                    format!("this bus has a subscription named {name:?}; pass another name="),
                ));
            }
            known.push(subscription.clone());
        }
        let spec = GroupSpec {
            group: group.clone(),
            subscription: name.clone(),
            service: self.0.service.clone(),
            pattern,
            start: options.start,
            broadcast: options.broadcast,
            ordered: options.ordered,
            lease: bus.lease,
            responder: options.respond,
            keep_expired: options.dead_letter_expired && !options.broadcast,
        };
        // Dropped on failure or cancellation: that ends the subscription and frees its name.
        let ending = EndGuard(ended_tx);
        let keep = options.idempotent_retention.unwrap_or(IDEMPOTENT_RETENTION);
        let retry = options.retry.clone().unwrap_or_else(|| bus.retry.clone());
        if options.idempotent.is_some() && keep < retry.longest() + bus.lease {
            log::warn!(
                "subscription {name:?} remembers what it handled for {keep:?}, and an event may come again {:?} after its first attempt (retries and lease): remember it for longer",
                retry.longest() + bus.lease
            );
        }
        let joined = async {
            let transport = self.transport(&session).await?;
            if spec.ordered && !transport.capabilities().ordered {
                return Err(Error::unsupported(
                    "this transport keeps no order per partition key; leave ordered out, or use sqlite:// or redis://",
                ));
            }
            if options.idempotent.is_some() && !transport.capabilities().idempotent {
                return Err(Error::unsupported(
                    "this transport remembers nothing, so it cannot tell what was handled before; leave idempotent out, or use redis:// or sqlite://",
                ));
            }
            if options.respond {
                requests::check_responder(&transport, &options)?;
            }
            Ok((transport.subscribe(spec).await?, transport))
        };
        let (source, transport) = joined.await.map_err(|error: Error| error.during("subscribe"))?;
        if self.0.clock.is_virtual() {
            subscription.facts.source.get_or_init(|| Arc::downgrade(&source));
        }
        if !options.broadcast {
            process::current().leases.keep(&source, bus.lease);
        }
        let retry = options.retry.unwrap_or_else(|| bus.retry.clone());
        let handler = match options.respond {
            false => handler,
            true => self.responder(handler, transport, &retry, options.timeout),
        };
        let dispatcher = Dispatcher {
            source,
            handler,
            rules: Rules {
                label: format!("{group} ({})", subscription.pattern()),
                concurrency,
                prefetch: options.prefetch.min(bus.buffer_size - concurrency * size),
                retry,
                timeout: options.timeout,
                dead_letter: !options.drop_dead,
                broadcast: options.broadcast,
                lease: bus.lease,
                breaker: options.breaker,
                batch: options.batch,
                once: options.idempotent.map(|key| Once { key, keep }),
            },
            clock: self.0.clock.clone(),
            faults: self.0.kit.as_ref().map(|kit| kit.faults.clone()),
            counters,
            wish: wishes,
        };
        process::current().runtime.spawn(async move {
            dispatcher.run().await;
            drop(ending);
        });
        Ok(subscription)
    }

    /// The subscriptions that run on this bus in this process, in order of subscription.
    pub fn subscriptions(&self) -> Vec<Subscription> {
        let session = self.session();
        let known = lock(&session.subscriptions);
        known.iter().filter(|subscription| !subscription.is_ended()).cloned().collect()
    }

    /// The subscriptions of this process that `event` matches, in order of subscription: those that
    /// [`Mode::Sync`](crate::options::Mode::Sync) runs. `BusClosed` after close.
    pub fn matching(&self, event: &Event) -> Result<Vec<Subscription>> {
        if self.is_closed() {
            return Err(closed());
        }
        let matches = |subscription: &Subscription| subscription.facts.pattern.matches(event.event_type.as_str());
        Ok(self.subscriptions().into_iter().filter(matches).collect())
    }

    /// Checks and completes `event` as [`Bus::publish`] does, for a publish that this process handles itself.
    pub fn prepare(&self, event: Event) -> Result<Event> {
        let mut outgoing = Outgoing { event, delay: None, expires_in: None };
        self.stamp(&mut outgoing, self.0.options.max_payload_bytes, &process::current().instance_id)?;
        Ok(outgoing.event)
    }

    /// Forgets a durable group, what it had not finished and its dead letters.
    pub async fn delete_group(&self, group: &str) -> Result<bool> {
        self.open().await?.delete_group(group.into()).await
    }

    /// Each subscription's numbers.
    pub async fn stats(&self) -> Result<Vec<SubscriptionStats>> {
        let transport = self.open().await?;
        let mut stats = Vec::new();
        for subscription in self.subscriptions() {
            let group = match subscription.facts.broadcast {
                true => None,
                false => Some(transport.group_stats(subscription.group().clone()).await?),
            };
            stats.push(SubscriptionStats { subscription, group });
        }
        Ok(stats)
    }

    /// One subscription's group, counted on the live store.
    pub async fn group_stats(&self, group: &str) -> Result<GroupStats> {
        self.open().await?.group_stats(group.into()).await
    }

    /// Published and failed to publish, in this process.
    pub fn publish_counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.published.load(Ordering::Relaxed), state.publish_failed.load(Ordering::Relaxed))
    }

    /// Publishes of this process that an event with the same idempotency key made needless.
    pub fn publish_duplicates(&self) -> u64 {
        self.state().publish_duplicates.load(Ordering::Relaxed)
    }

    /// Published by this process, by source and type.
    pub(crate) fn published_by_origin(&self) -> Vec<(Origin, u64)> {
        self.state().by_origin.entries()
    }

    /// Each subscription's numbers as they were the last time that somebody asked here; counts them anew in the background.
    /// Opens nothing.
    pub(crate) fn sampled_stats(&self) -> Vec<SubscriptionStats> {
        let mut sample = lock(&self.state().sample);
        if self.is_open() && !std::mem::replace(&mut sample.counting, true) {
            let bus = self.clone();
            process::current().runtime.spawn(async move {
                let counted =
                    bus.stats().await.inspect_err(|error| log::debug!("groups could not be counted: {error}"));
                *lock(&bus.state().sample) = Sample { stats: counted.unwrap_or_default(), counting: false };
            });
        }
        sample.stats.clone()
    }

    /// What happened to this process's hold on the store, by the names of metrics; nothing while it is not open.
    pub fn transport_counts(&self) -> Vec<(&'static str, u64)> {
        self.session().transport.get().map(|transport| transport.counts()).unwrap_or_default()
    }

    /// Dead letters in order of their ids, those after the record `after`, at most `limit`.
    pub async fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<Text>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.open().await?.dead_letters(filter, after, limit).await
    }

    /// One dead letter. `NotFound` for an unknown id.
    pub async fn dead_letter(&self, id: &str) -> Result<DeadLetter> {
        let filter = DeadLetterFilter { id: Some(id.into()), ..Default::default() };
        let found = self.dead_letters(filter, None, 1).await?.pop();
        found.ok_or_else(|| no_dead_letter(id))
    }

    /// How many there are.
    pub async fn dead_count(&self, filter: DeadLetterFilter) -> Result<u64> {
        self.open().await?.dead_count(filter).await
    }

    /// Hands them to their groups again: same event id, attempts from 1, once. `NotFound` for an unknown id.
    pub async fn dead_replay(&self, filter: DeadLetterFilter) -> Result<u64> {
        let id = filter.id.clone();
        found(id, self.open().await?.dead_replay(filter).await?)
    }

    /// Removes them. `NotFound` for an unknown id.
    pub async fn dead_purge(&self, filter: DeadLetterFilter) -> Result<u64> {
        let id = filter.id.clone();
        found(id, self.open().await?.dead_purge(filter).await?)
    }

    /// Events of the log in publish order, those after a position. `InvalidConfig` for a text that is no position, a
    /// limit of 0, or a time that ends before it begins.
    pub async fn history(&self, query: HistoryQuery) -> Result<Vec<HistoryEntry>> {
        query.filter.check()?;
        if query.limit == 0 {
            return Err(Error::invalid_config("limit=0 is not valid; give at least 1"));
        }
        let HistoryQuery { filter, after, limit, records } = query;
        let found = self.open().await?.history(filter, after, limit, records).await;
        found.map_err(|error| error.during("history"))
    }

    /// One step of a [`Replay`](crate::Replay).
    pub(crate) async fn replay_step(&self, step: ReplayStep) -> Result<ReplayBatch> {
        self.open().await?.replay(step).await.map_err(|error| error.during("replay"))
    }

    /// Stops intake, lets running handlers end for up to `timeout`, cancels the rest, hands their leases back
    /// without counting the attempt, and closes the transport. Idempotent; a second call may shorten the wait.
    /// Afterwards everything fails with `BusClosed` until [`Bus::start`].
    pub async fn close(&self, timeout: Duration) {
        let session = self.session();
        session.closed.send_replace(true);
        let subscriptions = lock(&session.subscriptions).clone();
        futures_util::future::join_all(subscriptions.iter().map(|subscription| subscription.drain(timeout))).await;
        if let Some(transport) = session.transport.get() {
            transport.close().await;
        }
    }

    /// Whether the transport is open in this process. Opens nothing, starts nothing.
    pub fn is_open(&self) -> bool {
        let state = self.0.state.get();
        state.is_some_and(|state| {
            let session = lock(&state.session);
            session.transport.initialized() && !*session.closed.borrow()
        })
    }

    /// Whether [`Bus::close`] was called.
    pub fn is_closed(&self) -> bool {
        *self.session().closed.borrow()
    }
}

/// Reports the end of a subscription when it is dropped.
struct EndGuard(watch::Sender<bool>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

fn found(id: Option<Text>, count: u64) -> Result<u64> {
    match id {
        Some(id) if count == 0 => Err(no_dead_letter(&id)),
        _ => Ok(count),
    }
}

fn no_dead_letter(id: &str) -> Error {
    Error::not_found(format!("there is no dead letter {id:?}; it was replayed or purged before, or its group is gone"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new event: type and payload checked, `meta` (a JSON object with the wire's member names) applied over fresh facts.
pub fn new_event(event_type: &str, payload: Bytes, meta: Option<&[u8]>, limit: usize) -> Result<Event> {
    build(event_type, payload, Meta::new(SystemTime::now()), meta, limit)
}

/// A child of `parent`: as [`new_event`], in the parent's chain.
pub fn child_event(
    parent: &Event,
    event_type: &str,
    payload: Bytes,
    meta: Option<&[u8]>,
    limit: usize,
) -> Result<Event> {
    build(event_type, payload, parent.child_meta(SystemTime::now()), meta, limit)
}

/// The same event with other members of `meta` (a JSON object with the wire's member names), checked.
pub fn with_meta(event: &Event, meta: &[u8]) -> Result<Event> {
    let changed = codec::apply_meta(event.meta.clone(), meta)?;
    Ok(event.clone().with_meta(|meta| *meta = changed))
}

fn build(event_type: &str, payload: Bytes, base: Meta, meta: Option<&[u8]>, limit: usize) -> Result<Event> {
    let event_type = EventType::new(event_type)?;
    codec::check_payload(&payload, limit)?;
    let meta = match meta {
        None => base,
        Some(json) => codec::apply_meta(base, json)?,
    };
    // Without white space around it, which the wire does not keep: the same bytes on every transport.
    let payload = payload.slice_ref(payload.trim_ascii());
    Ok(Event::new(event_type, payload, meta))
}
