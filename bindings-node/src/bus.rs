//! The bound methods of a bus: take arguments, clone the handle, call the core, convert the result.
//!
//! A method with a `key` is an operation: it returns its JSON text if it is done at once, else `undefined`, and
//! `Bridge.take` hands the text out later under that key.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use napi::bindgen_prelude::{Float64ArraySlice, Uint8ArraySlice};
use napi_derive::napi;
use polybus_core::dead_letter::DeadLetter;
use polybus_core::error::{Error, Result};
use polybus_core::options::{BusOptions, DeadLetterQuery, Mode, Naming, OnDuplicate, PublishOptions};
use polybus_core::subscription::Counters;
use polybus_core::transport::{GroupStats, Outgoing};
use polybus_core::{Bus, Subscription, metrics, process};
use serde_json::{Value, json};

use crate::bridge::{Bridge, Output, Shared};
use crate::error::throw;
use crate::event;
use crate::history;
use crate::options;
use crate::receipts;
use crate::watch::Watcher;

/// A bus of the core.
#[napi]
pub struct NativeBus {
    id: u32,
    bus: Bus,
    bridge: Arc<Shared>,
    /// Held from the call of a publish until the transport has it.
    turn: Arc<tokio::sync::Mutex<()>>,
    watcher: Watcher,
}

/// From so many events on, a publish is read on another thread: this one has handlers to run.
const MANY: u32 = 512;

impl NativeBus {
    fn start_with<F>(&self, key: u32, operation: impl FnOnce(Bus) -> F) -> napi::Result<Option<String>>
    where
        F: Future<Output = Output> + Send + 'static,
    {
        self.bridge.opened(self.id, &self.bus);
        self.bridge.start(key, operation(self.bus.clone()))
    }
}

impl NativeBus {
    /// The core's bus.
    pub(crate) fn core(&self) -> &Bus {
        &self.bus
    }

    /// The bridge that it belongs to.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.bridge.clone()
    }
}

#[napi]
impl NativeBus {
    /// `options` is a JSON object, with the names of TypeScript, or from `configOf…` with those of the core. Opens
    /// nothing.
    #[napi(constructor)]
    pub fn new(bridge: &Bridge, url: String, options: String, from_config: bool) -> napi::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let options = if from_config { Ok(options) } else { options::snake(&options) };
        let options = options.and_then(|json| BusOptions::from_json(&json, Naming::TypeScript));
        let bus = options.and_then(|options| Bus::new(&url, options)).map_err(throw)?;
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            bus,
            bridge: bridge.shared(),
            turn: Arc::default(),
            watcher: Watcher::new(bridge.watching()),
        })
    }

    /// The URL without its password.
    #[napi(getter)]
    pub fn url(&self) -> String {
        self.bus.url()
    }

    /// Name of the service.
    #[napi(getter)]
    pub fn service(&self) -> String {
        self.bus.options().service.clone()
    }

    /// Whether `publish` runs the handlers of this process itself, unless told otherwise.
    #[napi(getter)]
    pub fn is_sync(&self) -> bool {
        self.bus.options().mode == Mode::Sync
    }

    /// Whether a second handler of the same name takes the place of the first, if the options say.
    #[napi(getter)]
    pub fn replaces(&self) -> Option<bool> {
        self.bus.options().on_duplicate.map(|choice| choice == OnDuplicate::Replace)
    }

    /// Whether it was closed.
    #[napi(getter)]
    pub fn is_closed(&self) -> bool {
        self.bus.is_closed()
    }

    #[napi]
    pub fn start(&self, key: u32) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move { bus.start().await.map(nothing) })
    }

    #[napi]
    pub fn close(&self, key: u32, timeout_ms: f64) -> napi::Result<Option<String>> {
        let (bridge, id) = (self.bridge.clone(), self.id);
        self.watcher.end();
        self.start_with(key, |bus| async move {
            bus.close(Duration::from_secs_f64((timeout_ms / 1000.0).clamp(0.0, 1e9))).await;
            bridge.closed(id);
            Ok(String::new())
        })
    }

    /// Publishes the events in `texts`, cut by `lengths`. The output is a list of receipts. Publishes happen in the order
    /// of the calls.
    #[napi]
    pub fn publish(
        &self,
        key: u32,
        texts: Uint8ArraySlice,
        lengths: Float64ArraySlice,
        count: u32,
    ) -> napi::Result<Option<String>> {
        let lengths = &lengths[..count as usize * event::DRAFT];
        let texts = &texts[..event::size(lengths).min(texts.len())];
        let limit = self.bus.options().max_payload_bytes;
        let turn = self.turn.clone().lock_owned();
        if count < MANY {
            let batch = outgoing(event::drafts(texts, lengths, limit)).map_err(throw)?;
            return self.start_with(key, |bus| async move {
                drop(turn.await);
                bus.publish(batch).await.map(|receipts| receipts::text(&receipts))
            });
        }
        let (texts, lengths) = (texts.to_vec(), lengths.to_vec());
        self.start_with(key, |bus| async move {
            let turn = turn.await;
            let elsewhere = process::current().runtime.spawn(async move {
                let read = move || outgoing(event::drafts(&texts, &lengths, limit));
                let read = tokio::task::spawn_blocking(read);
                let mut publishing = pin!(bus.publish(read.await.map_err(ended)??));
                // Whoever is next may go as soon as the transport has seen this one.
                let first = poll_fn(|context| Poll::Ready(publishing.as_mut().poll(context))).await;
                drop(turn);
                let receipts = match first {
                    Poll::Ready(receipts) => receipts,
                    Poll::Pending => publishing.await,
                };
                receipts.map(|receipts| receipts::text(&receipts))
            });
            elsewhere.await.map_err(ended)?
        })
    }

    /// Publishes the events in `texts`, each for itself, in order. The output tells what became of each: receipts as
    /// [`receipts::text`] writes them.
    #[napi]
    pub fn publish_each(
        &self,
        key: u32,
        texts: Uint8ArraySlice,
        lengths: Float64ArraySlice,
        count: u32,
    ) -> napi::Result<Option<String>> {
        let lengths = &lengths[..count as usize * event::DRAFT];
        let texts = &texts[..event::size(lengths).min(texts.len())];
        let turn = self.turn.clone().lock_owned();
        let (mut good, mut outcomes) = (Vec::with_capacity(count as usize), Vec::with_capacity(count as usize));
        for draft in event::drafts(texts, lengths, self.bus.options().max_payload_bytes) {
            outcomes.push(draft.map(|(outgoing, _)| good.push(outgoing)));
        }
        let published = self.start_with(key, |bus| async move {
            drop(turn.await);
            let mut stored = bus.publish_each(good).await.into_iter();
            let outcomes = outcomes.into_iter().map(|valid| match valid {
                Ok(()) => stored.next().unwrap_or_else(|| Err(Error::connection_failed("there is no receipt"))),
                Err(error) => Err(error),
            });
            Ok(receipts::of_each(&outcomes.collect::<Vec<_>>()))
        });
        self.watcher.after(count == 1, &self.bus, &self.bridge);
        published
    }

    /// One request, given as an event is published. The output is the reply, as in `decodeEvent`.
    #[napi]
    pub fn request(
        &self,
        key: u32,
        texts: Uint8ArraySlice,
        lengths: Float64ArraySlice,
        options: String,
    ) -> napi::Result<Option<String>> {
        let options = options::request(&options).map_err(throw)?;
        let lengths: &[f64] = &lengths;
        let drafts = event::drafts(&texts, &lengths[..event::DRAFT], self.bus.options().max_payload_bytes);
        let request = all(drafts).map_err(throw)?.swap_remove(0).0.event;
        self.start_with(key, |bus| async move { Ok(event::value(&bus.request(request, options).await?).to_string()) })
    }

    /// For a synchronous publish of one event: `[[wire, payload length, meta length], [subscription, …]]`.
    #[napi]
    pub fn matching(&self, texts: Uint8ArraySlice, lengths: Float64ArraySlice) -> napi::Result<String> {
        let lengths: &[f64] = &lengths;
        let drafts = event::drafts(&texts, &lengths[..event::DRAFT], self.bus.options().max_payload_bytes);
        let matching = all(drafts).and_then(|mut drafts| {
            let event = self.bus.prepare(drafts.swap_remove(0).0.event)?;
            let names: Vec<_> = self.bus.matching(&event)?.iter().map(|found| found.name().to_string()).collect();
            Ok(json!([event::value(&event), names]).to_string())
        });
        matching.map_err(throw)
    }

    /// `id` marks the jobs. The output is `{name, group, pattern, timeoutMs}`.
    #[napi]
    pub fn subscribe(&self, key: u32, id: u32, pattern: String, options: String) -> napi::Result<Option<String>> {
        let options = options::subscribe(&options).map_err(throw)?;
        let timeout = options.timeout;
        let handler = self.bridge.handler(id);
        let bridge = self.bridge.clone();
        self.start_with(key, |bus| async move {
            let subscription = bus.subscribe(&pattern, handler, options).await?;
            let facts = json!({
                "name": &**subscription.name(),
                "group": &**subscription.group(),
                "pattern": subscription.pattern(),
                "timeoutMs": timeout.map(|timeout| timeout.as_secs_f64() * 1000.0),
            });
            bridge.subscribed(id, subscription);
            Ok(facts.to_string())
        })
    }

    #[napi]
    pub fn guarantees(&self, key: u32) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move {
            let found = bus.guarantees().await?;
            let can = bus.capabilities().await?;
            let details: serde_json::Map<_, _> =
                found.details.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
            Ok(json!({
                "transport": found.transport,
                "delivery": found.delivery,
                "durability": found.durability,
                "ordering": found.ordering,
                "details": details,
                "warnings": found.warnings,
                "capabilities": {
                    "durable": can.durable,
                    "crossProcess": can.cross_process,
                    "ack": can.ack,
                    "delayedRetry": can.delayed_retry,
                    "delayedPublish": can.delayed_publish,
                    "deadLetters": can.dead_letters,
                    "startPosition": can.start_position,
                    "broadcast": can.broadcast,
                    "ordered": can.ordered,
                    "request": can.request,
                    "idempotent": can.idempotent,
                    "publishDedupe": can.publish_dedupe,
                    "history": can.history,
                },
            })
            .to_string())
        })
    }

    #[napi]
    pub fn stats(&self, key: u32) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move {
            let stats: Vec<_> =
                bus.stats().await?.into_iter().map(|stats| stats_value(&stats.subscription, stats.group)).collect();
            let (published, failed) = bus.publish_counts();
            Ok(json!({"published": published, "publishFailed": failed, "subscriptions": stats}).to_string())
        })
    }

    /// One subscription's numbers.
    #[napi]
    pub fn subscription_stats(&self, key: u32, id: u32) -> napi::Result<Option<String>> {
        let subscription = self.bridge.subscription(id);
        self.start_with(key, |bus| async move {
            let Some(subscription) = subscription else {
                return Err(Error::not_found("the subscription has ended"));
            };
            let stats = bus.stats().await?.into_iter().find(|stats| stats.subscription.name() == subscription.name());
            let group = stats.and_then(|stats| stats.group);
            Ok(stats_value(&subscription, group).to_string())
        })
    }

    /// Counts of this process as Prometheus text.
    #[napi]
    pub fn metrics(&self) -> String {
        metrics::render(&self.bus)
    }

    /// The same as JSON, for a registry of the host.
    #[napi]
    pub fn metric_families(&self) -> String {
        metrics::to_json(&self.bus)
    }

    #[napi]
    pub fn delete_group(&self, key: u32, group: String) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move { Ok(bus.delete_group(&group).await?.to_string()) })
    }

    #[napi]
    pub fn dead_list(&self, key: u32, query: String) -> napi::Result<Option<String>> {
        let query = dead_query(&query)?;
        self.start_with(key, |bus| async move {
            let letters = bus.dead_letters(query.filter, query.after, query.limit).await?;
            Ok(Value::from_iter(letters.iter().map(letter_value)).to_string())
        })
    }

    #[napi]
    pub fn dead_count(&self, key: u32, query: String) -> napi::Result<Option<String>> {
        let query = dead_query(&query)?;
        self.start_with(key, |bus| async move { Ok(bus.dead_count(query.filter).await?.to_string()) })
    }

    #[napi]
    pub fn dead_replay(&self, key: u32, query: String) -> napi::Result<Option<String>> {
        let query = dead_query(&query)?;
        self.start_with(key, |bus| async move { Ok(bus.dead_replay(query.filter).await?.to_string()) })
    }

    #[napi]
    pub fn dead_purge(&self, key: u32, query: String) -> napi::Result<Option<String>> {
        let query = dead_query(&query)?;
        self.start_with(key, |bus| async move { Ok(bus.dead_purge(query.filter).await?.to_string()) })
    }

    /// A page of the log.
    #[napi]
    pub fn history(&self, key: u32, query: String) -> napi::Result<Option<String>> {
        let query = history::query(&query).map_err(throw)?;
        self.start_with(key, |bus| history::page(bus, query))
    }

    /// A replay that has not begun.
    #[napi]
    pub fn replay(&self, options: String) -> napi::Result<history::NativeReplay> {
        self.bridge.opened(self.id, &self.bus);
        history::NativeReplay::of(self.bus.clone(), self.bridge.clone(), &options)
    }

    /// Test kit: the events published, each as in `decodeEvent`.
    #[napi]
    pub fn published(&self, pattern: String) -> napi::Result<String> {
        let events = self.bus.published(&pattern).map_err(throw)?;
        Ok(Value::from_iter(events.iter().map(event::value)).to_string())
    }

    /// Test kit: the first event that matches, as in `decodeEvent`.
    #[napi]
    pub fn wait_for(&self, key: u32, pattern: String) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move { Ok(event::value(&bus.wait_for(&pattern).await?).to_string()) })
    }

    /// Test kit.
    #[napi]
    pub fn fail_next(&self, pattern: String, times: u32) -> napi::Result<()> {
        self.bus.fail_next(&pattern, times).map_err(throw)
    }

    /// Test kit.
    #[napi]
    pub fn duplicate_next(&self, pattern: String, times: u32) -> napi::Result<()> {
        self.bus.duplicate_next(&pattern, times).map_err(throw)
    }

    /// Test kit.
    #[napi]
    pub fn advance(&self, key: u32, by_ms: f64) -> napi::Result<Option<String>> {
        let by = Duration::from_secs_f64((by_ms / 1000.0).clamp(0.0, 1e12));
        self.start_with(key, move |bus| async move { bus.advance(by).await.map(nothing) })
    }

    /// Test kit.
    #[napi]
    pub fn idle(&self, key: u32) -> napi::Result<Option<String>> {
        self.start_with(key, |bus| async move { bus.idle().await.map(nothing) })
    }
}

/// The schedule and mode of a publish, checked: whether it is synchronous, or `null` if it does not say.
#[napi]
pub fn check_publish_options(json: String) -> napi::Result<Option<bool>> {
    let options = options::publish(&json).map_err(throw)?;
    Ok(options.mode.map(|mode| mode == Mode::Sync))
}

fn dead_query(json: &str) -> napi::Result<DeadLetterQuery> {
    let query =
        options::snake(json).and_then(|json| DeadLetterQuery::from_json(&json, Naming::TypeScript, SystemTime::now()));
    query.map_err(throw)
}

fn outgoing(drafts: Vec<Result<(Outgoing, PublishOptions)>>) -> Result<Vec<Outgoing>> {
    Ok(all(drafts)?.into_iter().map(|(outgoing, _)| outgoing).collect())
}

/// All of them, or an error that lists which are not valid.
fn all<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    let count = results.len();
    let (mut good, mut failures) = (Vec::with_capacity(count), Vec::new());
    for (index, result) in results.into_iter().enumerate() {
        match result {
            Ok(value) => good.push(value),
            Err(error) => failures.push((index, error)),
        }
    }
    match failures.first() {
        None => Ok(good),
        Some((_, error)) if count == 1 => Err(error.clone()),
        Some((index, first)) => {
            let message = format!("event {index} of {count}: {}; nothing was published", first.message());
            Err(Error::new(first.kind(), message).during("publish").listing(failures))
        }
    }
}

/// The runtime ended under an operation: the process is exiting.
fn ended(cause: tokio::task::JoinError) -> Error {
    Error::bus_closed("the process is ending").caused_by(cause)
}

fn nothing((): ()) -> String {
    String::new()
}

fn stats_value(subscription: &Subscription, group: Option<GroupStats>) -> Value {
    let count = |counter: fn(&Counters) -> &std::sync::atomic::AtomicU64| {
        counter(subscription.counters()).load(Ordering::Relaxed)
    };
    let (running, buffered) = (count(|c| &c.running), count(|c| &c.buffered));
    let group = group.unwrap_or_default();
    json!({
        "name": &**subscription.name(),
        "group": &**subscription.group(),
        "pattern": subscription.pattern(),
        "pending": group.lag + group.in_flight + group.retrying,
        "lag": group.lag,
        "inFlight": group.in_flight,
        "retrying": group.retrying,
        "dead": group.dead,
        "expired": group.expired,
        "oldestAgeMs": group.oldest.map(|age| age.as_millis() as u64),
        "running": running,
        "buffered": buffered,
        "completed": count(|c| &c.completed),
        "failed": count(|c| &c.failed),
        "retried": count(|c| &c.retried),
        "deadLettered": count(|c| &c.dead_lettered),
        "dropped": count(|c| &c.dropped),
        "released": count(|c| &c.released),
        "timedOut": count(|c| &c.timed_out),
        "duplicates": count(|c| &c.duplicates),
        "leasesLost": count(|c| &c.leases_lost),
        "breaker": subscription.breaker().map(polybus_core::breaker::Phase::as_str),
        "busyMs": count(|c| &c.busy_micros) as f64 / 1000.0,
    })
}

fn letter_value(letter: &DeadLetter) -> Value {
    let millis = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    json!({
        "id": &*letter.id,
        "event": letter.event.as_ref().map(event::value),
        "raw": letter.raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
        "error": {"type": letter.error.kind, "message": letter.error.message, "stack": letter.error.stack},
        "attempts": letter.attempts,
        "firstFailedAt": millis(letter.first_failed_at),
        "lastFailedAt": millis(letter.last_failed_at),
        "subscription": &*letter.subscription,
        "group": &*letter.group,
        "reason": letter.reason.as_str(),
        "replayedFrom": letter.replayed_from.as_deref(),
    })
}
