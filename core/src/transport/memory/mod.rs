//! Events inside one process: every capability, nothing on disk. The worked example of a transport; read it first.
//!
//! ```text
//! Store (one for each name and bus)
//!   log      the last events, for groups that start at the beginning and for replay      bounded ring
//!   delayed  published with a delay, by due time
//!   dead     dead letters, by id
//!   mail     replies to requests, by mailbox, each with its time
//!   seen     idempotency keys of what was published                       bounded
//!   groups   each: ready ──take──► leased ──settle──► gone, waiting (by due time), or dead
//!                    ▲                                   │
//!                    └───────────────────────────────────┘
//! ```
//! In an ordered group at most one event of a partition key is in these three places; the others stand in the lane of
//! their key, and the first of them becomes ready when that one is gone or dead.
//!
//! Owner and store live and die together, so a lease ends only by settling or by closing its source; the token still
//! fences, because a closed source's deliveries are handed to somebody else.

mod group;
mod mail;
mod marks;
mod seen;
mod history;
mod store;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use super::{
    Begun, Capabilities, GroupSpec, GroupStats, Guarantees, Mailbox, Outgoing, Receipt, Rest, Result, Settings,
    Settlement, Source, Task, Transport,
};
use bytes::Bytes;

use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{Delivery, Lease};
use crate::error::Error;
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, ReplayBatch, ReplayStep};
use crate::process::PerProcess;
use store::{Limit, Store};

pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if name.len() <= 100 && name.chars().all(plain) {
        return Ok(());
    }
    Err(Error::invalid_config(format!(
        "memory://{name} is not a valid name; use up to 100 letters, digits, '_', '-' or '.', or memory:// for a private bus"
    )))
}

/// Opens the store of that name, making it when this process has none. The empty name is private.
pub(super) fn open(name: &str, settings: &Settings) -> Result<Arc<dyn Transport>> {
    if settings.durability == super::Durability::Required {
        return Err(Error::unsupported(
            "memory:// loses everything with the process, and durability=\"required\" forbids that; use sqlite:///events.db",
        ));
    }
    Ok(Arc::new(Memory::open(name, settings)))
}

/// A bus's hold on a store.
pub struct Memory {
    store: Arc<Store>,
    limit: Limit,
    settings: Arc<Settings>,
    sources: Mutex<Vec<Weak<MemorySource>>>,
}

type Named = HashMap<(String, Text), Weak<Store>>;

impl Memory {
    fn open(name: &str, settings: &Settings) -> Self {
        let clock = settings.clock.clone();
        static NAMED: PerProcess<Mutex<Named>> = PerProcess::new();
        let store = if name.is_empty() {
            Arc::new(Store::new(clock))
        } else {
            let mut named = NAMED.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
            named.retain(|_, store| store.strong_count() > 0);
            let key = (name.to_owned(), settings.bus.clone());
            named.get(&key).and_then(Weak::upgrade).unwrap_or_else(|| {
                let store = Arc::new(Store::new(clock));
                named.insert(key, Arc::downgrade(&store));
                store
            })
        };
        let limit = Limit::new(settings.publish_buffer_bytes, settings.when_full);
        store.limit(store::Limits::of(settings));
        Self { store, limit, settings: Arc::new(settings.clone()), sources: Mutex::default() }
    }
}

impl Transport for Memory {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable: false,
            cross_process: false,
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
        Box::pin(std::future::ready(Ok(Guarantees {
            transport: "memory",
            delivery: "at-least-once",
            durability: "none",
            ordering: "publish",
            details: vec![("history", format!("the last {} events", store::HISTORY))],
            warnings: vec!["events live in this process and die with it; use sqlite:///events.db to keep them".into()],
        })))
    }

    fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Result<Vec<Receipt>>> {
        let (store, limit, settings) = (self.store.clone(), self.limit, self.settings.clone());
        Box::pin(async move { store.publish(batch, limit, timeout, |event| settings.once(event)).await })
    }

    fn repeat(&self, batch: Vec<Outgoing>) -> Task<Result<Vec<Receipt>>> {
        let (store, limit) = (self.store.clone(), self.limit);
        Box::pin(async move { store.publish(batch, limit, Duration::ZERO, |_| None).await })
    }

    fn subscribe(&self, spec: GroupSpec) -> Task<Result<Arc<dyn Source>>> {
        let group = match self.store.join(spec) {
            Ok(group) => group,
            Err(refused) => return Box::pin(std::future::ready(Err(refused))),
        };
        let source =
            Arc::new(MemorySource { store: self.store.clone(), group, closed: tokio::sync::watch::Sender::new(false) });
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|source| source.strong_count() > 0);
        sources.push(Arc::downgrade(&source));
        Box::pin(std::future::ready(Ok(source as Arc<dyn Source>)))
    }

    fn group_stats(&self, group: Text) -> Task<Result<GroupStats>> {
        Box::pin(std::future::ready(self.store.stats(&group)))
    }

    fn delete_group(&self, group: Text) -> Task<Result<bool>> {
        Box::pin(std::future::ready(Ok(self.store.delete(&group))))
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<Text>,
        limit: usize,
    ) -> Task<Result<Vec<DeadLetter>>> {
        Box::pin(std::future::ready(Ok(self.store.dead_letters(&filter, after.as_deref(), limit))))
    }

    fn dead_count(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        Box::pin(std::future::ready(Ok(self.store.dead_letters(&filter, None, usize::MAX).len() as u64)))
    }

    fn dead_replay(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        Box::pin(std::future::ready(Ok(self.store.replay(&filter))))
    }

    fn dead_purge(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        Box::pin(std::future::ready(Ok(self.store.purge(&filter))))
    }

    fn responders(&self, event_type: Text) -> Task<Result<Option<bool>>> {
        Box::pin(std::future::ready(Ok(Some(self.store.has_responder(&event_type)))))
    }

    fn post(&self, mailbox: Text, letter: Bytes, ttl: Duration) -> Task<Result<()>> {
        let now = self.store.now();
        self.store.mail.post(mailbox, letter, now.saturating_add(ttl), now);
        Box::pin(std::future::ready(Ok(())))
    }

    fn mailbox(&self, name: Text) -> Result<Box<dyn Mailbox>> {
        Ok(Box::new(mail::MemoryMailbox { store: self.store.clone(), name }))
    }

    fn history(
        &self,
        filter: HistoryFilter,
        after: Option<Text>,
        limit: usize,
        records: bool,
    ) -> Task<Result<Vec<HistoryEntry>>> {
        Box::pin(std::future::ready(self.store.history(&filter, after.as_ref(), limit, records)))
    }

    fn replay(&self, step: ReplayStep) -> Task<Result<ReplayBatch>> {
        Box::pin(std::future::ready(self.store.replay_log(&step)))
    }

    fn idle(&self) -> Task<Result<Option<Duration>>> {
        let store = self.store.clone();
        Box::pin(async move { Ok(store.idle().await) })
    }

    fn close(&self) -> Task<()> {
        let sources = std::mem::take(&mut *self.sources.lock().unwrap_or_else(PoisonError::into_inner));
        Box::pin(async move {
            for source in sources.iter().filter_map(Weak::upgrade) {
                source.close().await;
            }
        })
    }
}

/// One subscription's hold on a group.
struct MemorySource {
    store: Arc<Store>,
    group: store::Member,
    closed: tokio::sync::watch::Sender<bool>,
}

impl Source for MemorySource {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let (store, group, mut closed) = (self.store.clone(), self.group.clone(), self.closed.subscribe());
        Box::pin(async move {
            tokio::select! {
                biased;
                () = ended(&mut closed) => Err(Error::bus_closed("the subscription is closed")),
                deliveries = store.take(&group, max) => Ok(deliveries),
            }
        })
    }

    fn settle(&self, settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        Box::pin(std::future::ready(Ok(self.store.settle(&self.group, settlements))))
    }

    fn begin(&self, wanted: Vec<(Lease, Text)>, keep: Duration) -> Task<Result<Vec<Begun>>> {
        Box::pin(std::future::ready(Ok(self.store.begin(&self.group, wanted, keep))))
    }

    fn heartbeat(&self, held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        Box::pin(std::future::ready(Ok(self.store.lost(&self.group, held))))
    }

    fn rest(&self, rest: Option<Rest>) {
        self.store.rest(&self.group, rest);
    }

    fn close(&self) -> Task<()> {
        if !self.closed.send_replace(true) {
            self.store.leave(&self.group);
        }
        Box::pin(std::future::ready(()))
    }
}

impl Drop for MemorySource {
    fn drop(&mut self) {
        drop(self.close());
    }
}

async fn ended(closed: &mut tokio::sync::watch::Receiver<bool>) {
    drop(closed.wait_for(|closed| *closed).await); // an error means that the source is gone: also ended
}
