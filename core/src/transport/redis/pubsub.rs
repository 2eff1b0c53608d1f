//! Pub/Sub: fire and forget. What is published reaches the processes that listen at that moment, once at most.
//!
//! Each event type has its channel, `polybus:{<bus>}:<type>`; a subscription listens to the channels that begin as its
//! pattern does, up to the first wildcard, and the pattern decides about the rest. One connection serves all subscriptions
//! of the bus in this process. When it was lost, what was published meanwhile is lost too: the log says `gap_possible`,
//! and the metrics count it. So they do with what a subscription that is too slow had no room for.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::address::Address;
use super::fault::{Failure, closed};
use super::hold::decode;
use super::link::{Link, RECONNECT, Server};
use super::partition::{PATIENCE, lock};
use super::value;
use crate::codec;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{Delivery, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, ReplayBatch, ReplayStep};
use crate::pattern::Pattern;
use crate::transport::room::Room;
use crate::transport::{
    Capabilities, Confirm, Durability, GroupSpec, GroupStats, Guarantees, Outgoing, Receipt, Settings, Settlement,
    Source, Start, Task, Transport,
};

/// Events that wait for one subscription's handlers; more are dropped and counted.
const CAPACITY: usize = 10_000;
/// A listener that hears nothing for so long asks whether the server is there.
const SILENCE: Duration = Duration::from_secs(10);

struct PubSub(Arc<Shared>);

struct Shared {
    server: Arc<Server>,
    link: Link,
    prefix: String,
    settings: Settings,
    room: Room,
    listeners: Mutex<Vec<Weak<Listener>>>,
    /// The channel patterns changed.
    changed: watch::Sender<u64>,
    /// The version of the channel patterns that the server has confirmed.
    confirmed: watch::Sender<u64>,
    /// Why the last attempt to listen failed.
    refused: watch::Sender<Option<Error>>,
    gaps: AtomicU64,
    dropped: AtomicU64,
    closed: AtomicBool,
    ended: watch::Sender<bool>,
}

/// One subscription.
struct Listener {
    pattern: Pattern,
    channels: String,
    ready: Mutex<VecDeque<Delivery>>,
    arrived: Notify,
    next: AtomicI64,
    closed: watch::Sender<bool>,
}

/// Connects.
pub(in crate::transport) fn open(rest: &str, settings: Settings) -> Task<Result<Arc<dyn Transport>>> {
    let address = Address::parse("redis+pubsub", rest);
    Box::pin(async move {
        if matches!(settings.durability, Durability::Required | Durability::Full) || settings.confirm != Confirm::Memory
        {
            return Err(Error::unsupported(
                "redis+pubsub:// keeps nothing, and the options demand that it does; use redis://",
            ));
        }
        if settings.idempotency_window.is_some_and(|window| !window.is_zero()) {
            return Err(Error::unsupported(
                "redis+pubsub:// keeps nothing, not even the keys of what was published; leave out the idempotency window, or use redis://",
            ));
        }
        let server = Arc::new(Server::new(address?));
        let prefix = format!("polybus:{{{}}}:", settings.bus);
        let link = Link::new(server.clone(), prefix.clone());
        link.check().await.map_err(|failure| failure.error.during("open"))?;
        let room = Room::new(settings.publish_buffer_bytes, settings.when_full);
        let shared = Arc::new(Shared {
            server,
            link,
            prefix,
            settings,
            room,
            listeners: Mutex::default(),
            changed: watch::Sender::new(0),
            confirmed: watch::Sender::new(0),
            refused: watch::Sender::new(None),
            gaps: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            ended: watch::Sender::new(false),
        });
        crate::process::current().runtime.spawn(Shared::listen(shared.clone()));
        Ok(Arc::new(PubSub(shared)) as Arc<dyn Transport>)
    })
}

/// The channels that can carry what `pattern` wants: the fixed text before its first wildcard, and anything after it.
fn channels(prefix: &str, pattern: &str) -> String {
    let fixed = pattern.find(['*', '?', '[', '{', '\\']).map_or(pattern, |end| &pattern[..end]);
    let all = if fixed.len() < pattern.len() { "*" } else { "" };
    // `**` may stand for no segment at all, so the separator before it need not be there.
    let fixed = if all == "*" { fixed.trim_end_matches(['.', ':', '/']) } else { fixed };
    format!("{prefix}{fixed}{all}")
}

impl Shared {
    fn check(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(closed()) } else { Ok(()) }
    }

    fn listeners(&self) -> Vec<Arc<Listener>> {
        let mut listeners = lock(&self.listeners);
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.iter().filter_map(Weak::upgrade).collect()
    }

    async fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Result<Vec<Receipt>> {
        if batch.iter().any(|outgoing| outgoing.delay.is_some() || outgoing.expires_in.is_some()) {
            return Err(Error::unsupported(
                "redis+pubsub:// delivers at once or never: no delay, no expires_in; use redis://",
            ));
        }
        let deadline = Instant::now() + timeout.min(super::FOR_EVER);
        let mut commands = redis::Pipeline::new();
        let (mut receipts, atomic) = (Vec::with_capacity(batch.len()), batch.len() > 1);
        let mut bytes = 0;
        if atomic {
            commands.cmd("MULTI");
        }
        for Outgoing { event, .. } in &batch {
            let channel = format!("{}{}", self.prefix, event.event_type);
            let event_bytes = codec::encode(event)?;
            bytes += event_bytes.len();
            commands.cmd("PUBLISH").arg(channel).arg(event_bytes);
            receipts.push(Receipt { id: event.meta.id.clone(), position: None, duplicate: false });
        }
        if atomic {
            commands.cmd("EXEC");
        }
        commands.ignore_errors();
        let _room = self.room.enter(batch.len(), bytes, deadline).await?;
        for answer in self.link.run_all(&commands, deadline).await.map_err(super::publish::explain)? {
            super::fault::check(answer)?;
        }
        Ok(receipts)
    }

    async fn subscribe(&self, spec: GroupSpec) -> Result<Arc<Listener>> {
        if !spec.broadcast {
            return Err(Error::unsupported(
                "redis+pubsub:// has no groups: every process gets every event, at most once; subscribe with broadcast set to true, or use redis://",
            ));
        }
        if spec.start != Start::New {
            return Err(Error::unsupported(
                "redis+pubsub:// has no past to start from; leave start out, or use redis://",
            ));
        }
        let listener = Arc::new(Listener {
            channels: channels(&self.prefix, spec.pattern.as_str()),
            pattern: spec.pattern,
            ready: Mutex::default(),
            arrived: Notify::new(),
            next: AtomicI64::new(0),
            closed: watch::Sender::new(false),
        });
        lock(&self.listeners).push(Arc::downgrade(&listener));
        let (mut confirmed, mut refused) = (self.confirmed.subscribe(), self.refused.subscribe());
        refused.mark_unchanged();
        let mut version = 0;
        self.changed.send_modify(|changed| {
            *changed += 1;
            version = *changed;
        });
        let hopeless = |failure: &Option<Error>| {
            failure.as_ref().is_some_and(|failure| failure.kind() != ErrorKind::ConnectionFailed)
        };
        tokio::select! {
            heard = confirmed.wait_for(|confirmed| *confirmed >= version) => {
                heard.map_err(|_| closed())?;
                return Ok(listener);
            }
            failure = async { refused.changed().await.and(refused.wait_for(hopeless).await.map(|failure| failure.clone())) } => {
                if let Ok(Some(failure)) = failure {
                    return Err(failure);
                }
            }
            () = tokio::time::sleep(PATIENCE) => {}
        }
        let failure = self.refused.borrow().clone();
        Err(failure.unwrap_or_else(|| Error::connection_failed("the server did not confirm the subscription in time")))
    }

    /// Keeps one connection that listens, until the bus is closed.
    async fn listen(self: Arc<Self>) {
        let mut ended = self.ended.subscribe();
        let (mut failures, mut heard) = (0, false);
        while !self.closed.load(Ordering::Acquire) {
            let outcome = tokio::select! {
                outcome = self.hear(&mut heard, &mut failures) => outcome,
                _ = ended.changed() => return,
            };
            if std::mem::take(&mut heard) {
                self.gaps.fetch_add(1, Ordering::Relaxed);
                log::warn!("gap_possible: the Pub/Sub connection was lost; events published meanwhile do not arrive");
            }
            failures += 1;
            let pause = RECONNECT.delay(failures, fastrand::f64()).unwrap_or(RECONNECT.max_delay);
            if let Err(cause) = outcome {
                self.refused.send_replace(Some(cause.clone()));
                log::debug!("listening failed, again in {pause:.1?}: {cause}");
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Listens on one connection until it ends. `heard` becomes true once subscriptions stand on it.
    async fn hear(&self, heard: &mut bool, failures: &mut u32) -> Result<()> {
        let mut changed = self.changed.subscribe();
        changed.wait_for(|version| *version > 0).await.map_err(|_| closed())?;
        let broken = |cause: redis::RedisError| Failure::from(cause).error;
        let silent = |_| Error::connection_failed("the server is silent");
        let client = self.server.address.server(&self.server.place(&self.prefix).await?)?;
        let (mut sink, mut stream) =
            tokio::time::timeout(PATIENCE, client.get_async_pubsub()).await.map_err(silent)?.map_err(broken)?.split();
        let mut standing: Vec<String> = Vec::new();
        loop {
            let version = *changed.borrow_and_update();
            let mut wanted: Vec<String> = self.listeners().iter().map(|listener| listener.channels.clone()).collect();
            wanted.sort_unstable();
            wanted.dedup();
            for channels in wanted.iter().filter(|channels| !standing.contains(channels)) {
                tokio::time::timeout(PATIENCE, sink.psubscribe(channels)).await.map_err(silent)?.map_err(broken)?;
            }
            for channels in standing.iter().filter(|channels| !wanted.contains(channels)) {
                sink.punsubscribe(channels).await.map_err(broken)?;
            }
            standing = wanted;
            self.confirmed.send_replace(version);
            self.refused.send_replace(None);
            *heard = !standing.is_empty();
            *failures = 0;
            loop {
                tokio::select! {
                    message = stream.next() => match message {
                        Some(message) => {
                            // Overlapping channel patterns bring one event once for each: only its own counts.
                            let by: String = message.get_pattern().unwrap_or_default();
                            self.hand_out(&by, &message.get_channel_name()[self.prefix.len()..], message.get_payload_bytes());
                        }
                        None => return Err(Error::connection_failed("the server closed the connection")),
                    },
                    _ = changed.changed() => break,
                    () = tokio::time::sleep(SILENCE) => {
                        tokio::time::timeout(PATIENCE, sink.ping::<redis::Value>()).await
                            .map_err(silent)?.map_err(broken)?;
                    }
                }
            }
        }
    }

    fn hand_out(&self, by: &str, event_type: &str, raw: &[u8]) {
        let raw = Bytes::copy_from_slice(raw);
        for listener in self.listeners() {
            if listener.channels != by || !listener.pattern.matches(event_type) {
                continue;
            }
            if !listener.add(decode(&raw, self.settings.max_payload_bytes, None)) {
                let dropped = self.dropped.fetch_add(1, Ordering::Relaxed);
                if dropped.is_multiple_of(1000) {
                    log::warn!(
                        "handlers of {} are too slow: {} events were dropped so far",
                        listener.pattern.as_str(),
                        dropped + 1
                    );
                }
            }
        }
    }
}

impl Listener {
    fn add(&self, body: crate::delivery::Body) -> bool {
        let mut ready = lock(&self.ready);
        if ready.len() >= CAPACITY {
            return false;
        }
        let lease = Lease { position: self.next.fetch_add(1, Ordering::Relaxed), token: 0 };
        ready.push_back(Delivery {
            body,
            lease,
            attempt: 1,
            redelivered: false,
            received_at: SystemTime::now(),
            first_failed_at: None,
            expired: false,
        });
        drop(ready);
        self.arrived.notify_one();
        true
    }
}

/// A subscription as the dispatcher holds it.
struct Hearing {
    listener: Arc<Listener>,
    shared: Arc<Shared>,
}

impl Source for Hearing {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let listener = self.listener.clone();
        Box::pin(async move {
            let mut closing = listener.closed.subscribe();
            loop {
                if *closing.borrow() {
                    return Err(closed());
                }
                let arrived = listener.arrived.notified();
                {
                    let mut ready = lock(&listener.ready);
                    let count = ready.len().min(max.max(1));
                    if count > 0 {
                        return Ok(ready.drain(..count).collect());
                    }
                }
                tokio::select! {
                    () = arrived => {}
                    _ = closing.changed() => {}
                }
            }
        })
    }

    fn settle(&self, _settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn heartbeat(&self, _held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn close(&self) -> Task<()> {
        self.listener.closed.send_replace(true);
        lock(&self.shared.listeners).retain(|other| !std::ptr::eq(other.as_ptr(), &*self.listener));
        self.shared.changed.send_modify(|version| *version += 1);
        Box::pin(async {})
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        drop(self.close());
    }
}

/// What this transport cannot do.
fn keeps_nothing<T: Send + 'static>() -> Task<Result<T>> {
    Box::pin(async {
        Err(Error::unsupported(
            "redis+pubsub:// keeps nothing: no groups, no dead letters, no history, no replay; use redis://",
        ))
    })
}

impl Transport for PubSub {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable: false,
            cross_process: true,
            ack: false,
            delayed_retry: false,
            delayed_publish: false,
            dead_letters: false,
            start_position: false,
            broadcast: true,
            ordered: false,
            request: false,
            idempotent: false,
            publish_dedupe: false,
            history: false,
        }
    }

    fn guarantees(&self) -> Task<Result<Guarantees>> {
        let shared = self.0.clone();
        Box::pin(async move {
            shared.check()?;
            let deadline = Instant::now() + PATIENCE;
            let info = value::text(shared.link.run(redis::cmd("INFO").arg("server"), deadline).await?)?;
            let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or_default();
            Ok(Guarantees {
                transport: "redis+pubsub",
                delivery: "at-most-once",
                durability: "none",
                ordering: "publish",
                details: vec![
                    ("version", version.trim().to_owned()),
                    ("address", shared.server.address.describe()),
                    ("gaps", shared.gaps.load(Ordering::Relaxed).to_string()),
                    ("dropped", shared.dropped.load(Ordering::Relaxed).to_string()),
                ],
                warnings: vec![
                    "events reach only who listens at the moment, at most once; use redis:// to keep them".to_owned(),
                ],
            })
        })
    }

    fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Result<Vec<Receipt>>> {
        let shared = self.0.clone();
        Box::pin(async move {
            shared.check()?;
            shared.publish(batch, timeout).await.map_err(|cause| cause.during("publish"))
        })
    }

    fn subscribe(&self, spec: GroupSpec) -> Task<Result<Arc<dyn Source>>> {
        let shared = self.0.clone();
        Box::pin(async move {
            shared.check()?;
            let listener = shared.subscribe(spec).await.map_err(|cause| cause.during("subscribe"))?;
            Ok(Arc::new(Hearing { listener, shared }) as Arc<dyn Source>)
        })
    }

    fn group_stats(&self, group: Text) -> Task<Result<GroupStats>> {
        Box::pin(async move {
            Err(Error::new(ErrorKind::NotFound, format!("there is no group {group:?}: redis+pubsub:// has none")))
        })
    }

    fn delete_group(&self, _group: Text) -> Task<Result<bool>> {
        keeps_nothing()
    }

    fn dead_letters(
        &self,
        _filter: DeadLetterFilter,
        _after: Option<Text>,
        _limit: usize,
    ) -> Task<Result<Vec<DeadLetter>>> {
        keeps_nothing()
    }

    fn dead_count(&self, _filter: DeadLetterFilter) -> Task<Result<u64>> {
        keeps_nothing()
    }

    fn dead_replay(&self, _filter: DeadLetterFilter) -> Task<Result<u64>> {
        keeps_nothing()
    }

    fn dead_purge(&self, _filter: DeadLetterFilter) -> Task<Result<u64>> {
        keeps_nothing()
    }

    fn history(
        &self,
        _filter: HistoryFilter,
        _after: Option<Text>,
        _limit: usize,
        _records: bool,
    ) -> Task<Result<Vec<HistoryEntry>>> {
        keeps_nothing()
    }

    fn replay(&self, _step: ReplayStep) -> Task<Result<ReplayBatch>> {
        keeps_nothing()
    }

    fn counts(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("gaps_total", self.0.gaps.load(Ordering::Relaxed)),
            ("too_slow_total", self.0.dropped.load(Ordering::Relaxed)),
        ]
    }

    fn close(&self) -> Task<()> {
        self.0.closed.store(true, Ordering::Release);
        for listener in self.0.listeners() {
            listener.closed.send_replace(true);
        }
        self.0.ended.send_replace(true);
        self.0.link.cut();
        Box::pin(async {})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_cover_the_pattern() {
        for (pattern, expected) in [
            ("order.placed", "p:order.placed"),
            ("order.*", "p:order*"),
            ("shipment.**", "p:shipment*"),
            ("*", "p:*"),
            ("ord[ae]r.x", "p:ord*"),
            ("{a,b}.c", "p:*"),
        ] {
            assert_eq!(channels("p:", pattern), expected);
        }
    }
}
