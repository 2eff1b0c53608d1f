//! What one subscription holds in this process, over all partitions: deliveries that were taken, and the right to settle
//! them.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::Notify;

use super::marks::Mark;
use super::partition::lock;
use super::value::Id;
use crate::codec;
use crate::delivery::{Body, Delivery, Lease};
use crate::event::Text;
use crate::transport::time;

/// Where the server keeps a delivery that we hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    /// In the group's pending list; fenced by the delivery count.
    Pending { id: Id, count: u64 },
    /// In the group's own store of work; fenced by a token.
    Work { id: Text, token: Text },
}

/// One delivery that we hold.
#[derive(Debug, Clone)]
pub(super) struct Held {
    /// Index of the partition.
    pub partition: usize,
    pub place: Place,
    pub event_type: Bytes,
    pub event: Bytes,
    pub attempt: u32,
    /// Somebody took it before.
    pub redelivered: bool,
    /// Milliseconds of the server's clock.
    pub first_failed: Option<i64>,
    /// By our boot clock: until then nobody else can have taken it.
    pub until: i64,
    /// Of an idempotent subscription.
    pub mark: Option<Box<Mark>>,
    /// As the entry of the log says, by the server's clock; the store of work keeps it with the event.
    pub expires: Option<i64>,
    /// Its time ran out before a handler got it.
    pub expired: bool,
}

/// Shared by the members of a subscription.
#[derive(Default)]
pub(super) struct Hold {
    held: Mutex<HashMap<i64, Held, ahash::RandomState>>,
    ready: Mutex<VecDeque<Delivery>>,
    next: AtomicI64,
    pub arrived: Notify,
}

impl Hold {
    /// Keeps a delivery for the next `take`.
    pub fn add(&self, mut held: Held, max_payload: usize, codec_name: Option<&[u8]>) {
        let position = self.next.fetch_add(1, Ordering::Relaxed);
        let body = decode(&held.event, max_payload, codec_name);
        if let (true, Body::Event(event)) = (held.event_type.is_empty(), &body) {
            held.event_type = Bytes::copy_from_slice(event.event_type.as_str().as_bytes());
        }
        let delivery = Delivery {
            body,
            lease: Lease { position, token: 1 },
            attempt: held.attempt,
            redelivered: held.redelivered,
            received_at: SystemTime::now(),
            first_failed_at: held.first_failed.map(time::from_ms),
            expired: held.expired,
        };
        lock(&self.held).insert(position, held);
        lock(&self.ready).push_back(delivery);
    }

    pub fn ready(&self, max: usize) -> Vec<Delivery> {
        let mut ready = lock(&self.ready);
        let count = ready.len().min(max);
        ready.drain(..count).collect()
    }

    pub fn has_ready(&self) -> bool {
        !lock(&self.ready).is_empty()
    }

    pub fn get(&self, lease: Lease) -> Option<Held> {
        lock(&self.held).get(&lease.position).cloned()
    }

    /// It is settled, or somebody else's.
    pub fn remove(&self, lease: Lease) -> Option<Held> {
        lock(&self.held).remove(&lease.position)
    }

    /// Everything held in one partition.
    pub fn in_partition(&self, partition: usize) -> Vec<(Lease, Place)> {
        let held = lock(&self.held);
        let ours = held.iter().filter(|(_, held)| held.partition == partition);
        ours.map(|(position, held)| (Lease { position: *position, token: 1 }, held.place.clone())).collect()
    }

    /// The key of a delivery that we hold is marked, or perhaps.
    pub fn mark(&self, lease: Lease, mark: Option<Mark>) {
        if let Some(held) = lock(&self.held).get_mut(&lease.position) {
            held.mark = mark.map(Box::new);
        }
    }

    /// All keys that we handle.
    pub fn marks(&self) -> Vec<Mark> {
        lock(&self.held).values().filter_map(|held| held.mark.as_deref().cloned()).collect()
    }

    pub fn all(&self) -> Vec<Lease> {
        lock(&self.held).keys().map(|position| Lease { position: *position, token: 1 }).collect()
    }

    pub fn holds_entry(&self, partition: usize, entry: Id) -> bool {
        lock(&self.held)
            .values()
            .any(|held| held.partition == partition && matches!(held.place, Place::Pending { id, .. } if id == entry))
    }

    /// The heartbeat of these succeeded; it was sent when `until` was one lease away.
    pub fn renew(&self, leases: impl Iterator<Item = Lease>, until: i64) {
        let mut held = lock(&self.held);
        for lease in leases {
            if let Some(held) = held.get_mut(&lease.position) {
                held.until = until;
            }
        }
    }

    /// Nothing of what waits here was seen by a handler: it is given back with the rest.
    pub fn clear_ready(&self) {
        lock(&self.ready).clear();
    }

    /// What waits here and another could handle. An event that cannot be decoded, or has expired, needs no handler, and the
    /// group's store of work would not tell its codec.
    pub fn surplus(&self) -> Vec<Delivery> {
        let mut ready = lock(&self.ready);
        let (surplus, rest): (Vec<_>, Vec<_>) =
            ready.drain(..).partition(|delivery| matches!(delivery.body, Body::Event(_)) && !delivery.expired);
        ready.extend(rest);
        surplus
    }

    /// After all: for the next `take`.
    pub fn put_ready(&self, deliveries: Vec<Delivery>) {
        let ours = deliveries.into_iter().filter(|delivery| self.get(delivery.lease).is_some());
        lock(&self.ready).extend(ours);
        self.arrived.notify_one();
    }
}

/// The event in `raw`, or why it is none.
pub(super) fn decode(raw: &Bytes, max_payload: usize, codec_name: Option<&[u8]>) -> Body {
    let unknown = codec_name.map(|name| {
        let name = String::from_utf8_lossy(name);
        format!("the event is written with the codec {name:?}, which this version of polybus does not know; update it")
    });
    match unknown.map_or_else(|| codec::decode(raw, max_payload).map_err(|cause| cause.to_string()), Err) {
        Ok(event) => Body::Event(event),
        Err(reason) => Body::Undecodable { raw: raw.clone(), reason },
    }
}
