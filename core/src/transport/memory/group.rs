//! One group: what is ready, leased and waiting.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ahash::AHashMap;
use tokio::sync::Notify;

use super::marks::Marks;
use crate::delivery::{Body, DeadReason, Delivery, Failure, Lease};
use crate::event::{Event, Text};
use crate::transport::{Begun, GroupSpec, GroupStats, Rest};

/// An event on its way through one group.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub position: i64,
    pub event: Event,
    /// When it was published.
    pub published: Duration,
    pub expires: Option<Duration>,
    /// Attempts that were taken and count.
    pub attempts: u32,
    pub redelivered: bool,
    pub first_failed: Option<SystemTime>,
    pub replayed_from: Option<Text>,
    /// What went wrong last.
    pub failure: Option<Box<Failure>>,
    /// It does not depend on the log, so limits on the log do not concern it.
    pub own: bool,
}

struct Leased {
    token: i64,
    owner: u64,
    pending: Pending,
}

/// See the module's page. All times are of the store's clock.
pub(super) struct Group {
    pub spec: GroupSpec,
    pub ready: VecDeque<Pending>,
    leased: AHashMap<i64, Leased>,
    waiting: BTreeMap<(Duration, i64), Pending>,
    /// Of an ordered group: each partition key that has an event in `ready`, `leased` or `waiting`, and those behind it, by
    /// position.
    lanes: AHashMap<Text, BTreeMap<i64, Pending>>,
    /// Rings when something became ready, or is due earlier than before.
    pub wake: Arc<Notify>,
    pub members: usize,
    /// Those that wait for a time, by owner.
    pub resting: AHashMap<u64, Rest>,
    /// Events at or before this were not for it.
    pub begin: i64,
    /// Published and not finished, whatever its state.
    pub load: Load,
    expired: u64,
    marks: Marks,
}

/// How much there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub events: usize,
    pub bytes: usize,
}

/// What a settlement did to a delivery that was ours.
pub(super) enum Ended {
    Gone,
    Dead(Pending),
}

impl Group {
    pub fn new(spec: GroupSpec, begin: i64) -> Self {
        Self {
            spec,
            ready: VecDeque::new(),
            leased: AHashMap::new(),
            waiting: BTreeMap::new(),
            lanes: AHashMap::new(),
            wake: Arc::new(Notify::new()),
            members: 0,
            resting: AHashMap::new(),
            begin,
            load: Load::default(),
            expired: 0,
            marks: Marks::default(),
        }
    }

    /// Adds an event at the end of the queue, or at its place in the lane of its key.
    pub fn push(&mut self, pending: Pending) {
        if let Some(pending) = self.enter(pending) {
            self.ready.push_back(pending);
            self.wake.notify_one();
        }
    }

    /// Adds events before all others, in their order, or at their places in the lanes of their keys.
    pub fn push_first(&mut self, events: Vec<Pending>) {
        let free: Vec<_> = events.into_iter().filter_map(|pending| self.enter(pending)).collect();
        for pending in free.into_iter().rev() {
            self.ready.push_front(pending);
        }
        self.wake.notify_one();
    }

    /// Counts an event that comes in. It comes back, unless it waits for its key now.
    fn enter(&mut self, pending: Pending) -> Option<Pending> {
        self.load.events += 1;
        self.load.bytes += pending.event.payload.len();
        if let (true, Some(key)) = (self.spec.ordered, pending.event.meta.lane()) {
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.insert(pending.position, pending);
                return None;
            }
            self.lanes.insert(key.clone(), BTreeMap::new());
        }
        Some(pending)
    }

    /// Lets go of an event, and the next one of its key goes. At the end of the queue, so that keys take turns.
    fn finish(&mut self, pending: &Pending) {
        self.load.events -= 1;
        self.load.bytes -= pending.event.payload.len();
        let Some(key) = pending.event.meta.lane().filter(|_| self.spec.ordered) else { return };
        match self.lanes.get_mut(key).and_then(BTreeMap::pop_first) {
            Some((_, next)) => {
                self.ready.push_back(next);
                self.wake.notify_one();
            }
            None => drop(self.lanes.remove(key)),
        }
    }

    fn parked(&self) -> impl Iterator<Item = &Pending> {
        self.lanes.values().flat_map(BTreeMap::values)
    }

    /// Moves what is due to the front of the queue and leases up to `max`.
    pub fn take(&mut self, now: Duration, wall: SystemTime, max: usize, owner: u64, token: &mut i64) -> Vec<Delivery> {
        while let Some(due) = self.waiting.first_entry().filter(|due| due.key().0 <= now) {
            self.ready.push_front(due.remove());
        }
        let mut taken = Vec::with_capacity(max.min(self.ready.len()));
        while taken.len() < max {
            let Some(mut pending) = self.ready.pop_front() else { break };
            let expired = pending.expires.is_some_and(|expires| expires <= now);
            if expired && !self.spec.keep_expired {
                self.expired += 1;
                self.finish(&pending);
                continue;
            }
            *token += 1;
            let lease = Lease { position: pending.position, token: *token };
            pending.attempts += 1;
            taken.push(Delivery {
                body: Body::Event(pending.event.clone()),
                lease,
                attempt: pending.attempts,
                redelivered: std::mem::replace(&mut pending.redelivered, true),
                received_at: wall,
                first_failed_at: pending.first_failed,
                expired,
            });
            self.leased.insert(lease.position, Leased { token: *token, owner, pending });
        }
        taken
    }

    /// Takes the delivery out of its lease, if `lease` still holds it.
    fn end(&mut self, lease: Lease) -> Option<Pending> {
        match self.leased.entry(lease.position) {
            std::collections::hash_map::Entry::Occupied(held) if held.get().token == lease.token => {
                Some(held.remove().pending)
            }
            _ => None,
        }
    }

    /// Marks the keys of what is leased.
    pub fn begin(&mut self, wanted: Vec<(Lease, Text)>, keep: Duration, now: Duration) -> Vec<Begun> {
        let leased = &self.leased;
        let lives = |lease: Lease| leased.get(&lease.position).is_some_and(|leased| leased.token == lease.token);
        wanted.into_iter().map(|(lease, key)| self.marks.begin(lease, key, keep, now, lives)).collect()
    }

    /// Ends the mark of a delivery; those that wait for its key are ready.
    fn unmark(&mut self, lease: Lease, handled: bool, now: Duration) {
        for place in self.marks.end(lease, handled, now) {
            if let Some(pending) = self.waiting.remove(&place) {
                self.ready.push_front(pending);
                self.wake.notify_one();
            }
        }
    }

    /// Done with it. What was not `handled` may come again under the same key.
    pub fn ack(&mut self, lease: Lease, handled: bool, now: Duration) -> Option<Ended> {
        let pending = self.end(lease)?;
        self.finish(&pending);
        self.unmark(lease, handled, now);
        Some(Ended::Gone)
    }

    pub fn postpone(&mut self, lease: Lease, due: Duration) -> Option<Ended> {
        let mut pending = self.end(lease)?;
        pending.attempts -= 1;
        if self.marks.block(lease, (due, pending.position)) {
            self.waiting.insert((due, pending.position), pending);
        } else {
            self.ready.push_front(pending);
        }
        self.wake.notify_one();
        Some(Ended::Gone)
    }

    pub fn retry(
        &mut self,
        lease: Lease,
        due: Duration,
        (now, wall): (Duration, SystemTime),
        failure: Failure,
    ) -> Option<Ended> {
        let mut pending = self.end(lease)?;
        self.unmark(lease, false, now);
        pending.first_failed.get_or_insert(wall);
        pending.failure = Some(Box::new(failure));
        self.waiting.insert((due, pending.position), pending);
        self.wake.notify_one();
        Some(Ended::Gone)
    }

    pub fn bury(&mut self, lease: Lease, reason: DeadReason, now: Duration) -> Option<Ended> {
        let mut pending = self.end(lease)?;
        self.unmark(lease, false, now);
        // No handler got it this time.
        pending.attempts -= u32::from(reason == DeadReason::Expired);
        self.finish(&pending);
        Some(Ended::Dead(pending))
    }

    pub fn release(&mut self, lease: Lease, now: Duration) -> Option<Ended> {
        let mut pending = self.end(lease)?;
        self.unmark(lease, false, now);
        pending.attempts -= 1;
        self.ready.push_front(pending);
        self.wake.notify_one();
        Some(Ended::Gone)
    }

    /// Hands back all that `owner` holds, oldest first in the queue.
    pub fn release_all(&mut self, owner: u64, now: Duration) {
        let held = self.leased.iter().filter(|(_, leased)| leased.owner == owner);
        let mut held: Vec<_> =
            held.map(|(position, leased)| Lease { position: *position, token: leased.token }).collect();
        held.sort_unstable_by_key(|lease| std::cmp::Reverse(lease.position));
        for lease in held {
            self.release(lease, now);
        }
    }

    pub fn holds(&self, lease: Lease) -> bool {
        self.leased.get(&lease.position).is_some_and(|leased| leased.token == lease.token)
    }

    pub fn next_due(&self) -> Option<Duration> {
        self.waiting.first_key_value().map(|((due, _), _)| *due)
    }

    /// When something is due for the first time after `now`.
    pub fn next_after(&self, now: Duration) -> Option<Duration> {
        let waiting = self.waiting.keys().map(|(due, _)| *due).find(|due| *due > now);
        self.resting.values().map(|rest| rest.until).filter(|until| *until > now).chain(waiting).min()
    }

    /// What is not finished: whether it is leased, and when it is due if it waits for a time.
    pub fn unfinished(&self) -> impl Iterator<Item = (&Pending, bool, Option<Duration>)> {
        let ready = self.ready.iter().map(|pending| (pending, false, None));
        let leased = self.leased.values().map(|leased| (&leased.pending, true, None));
        let waiting = self.waiting.iter().map(|((due, _), pending)| (pending, false, Some(*due)));
        let parked = self.parked().map(|pending| (pending, false, None));
        ready.chain(leased).chain(waiting).chain(parked)
    }

    /// Forgets what stood in the log at or before `floor` and is in no handler, because a limit removed it.
    pub fn drop_through(&mut self, floor: i64) {
        let gone = |pending: &Pending| pending.position <= floor && !pending.own;
        // The oldest are in front, but for a few that were given back or replayed: those go when they get there.
        let held = self.leased.values_mut().filter(|leased| leased.pending.position <= floor);
        held.for_each(|leased| leased.pending.own = true);
        // What waits for its key first, so that nothing of it goes on when the one before it is lost.
        for lane in self.lanes.values_mut() {
            let late: Vec<_> = lane.range(..=floor).filter(|(_, pending)| gone(pending)).map(|(at, _)| *at).collect();
            for pending in late.iter().filter_map(|at| lane.remove(at)) {
                self.expired += 1;
                self.load.events -= 1;
                self.load.bytes -= pending.event.payload.len();
            }
        }
        while let Some(pending) = self.ready.front().filter(|pending| gone(pending)).cloned() {
            self.ready.pop_front();
            self.lose(&pending);
        }
        let late: Vec<_> = self.waiting.iter().filter(|(_, pending)| gone(pending)).map(|(key, _)| *key).collect();
        for key in late {
            if let Some(pending) = self.waiting.remove(&key) {
                self.lose(&pending);
            }
        }
    }

    fn lose(&mut self, pending: &Pending) {
        self.expired += 1;
        self.finish(pending);
    }

    /// Nothing to run now: what is left waits for a time.
    pub fn is_idle(&self, now: Duration) -> bool {
        let resting = self.resting.values().filter(|rest| rest.until > now);
        let (held, away) =
            resting.fold((0, 0), |(held, away), rest| (held + rest.holds, away + usize::from(!rest.takes)));
        let nobody_takes = away >= self.members;
        let nothing_to_take = self.ready.is_empty() && self.next_due().is_none_or(|due| due > now);
        self.leased.len() <= held && (nobody_takes || nothing_to_take)
    }

    pub fn stats(&self, now: Duration, dead: u64) -> GroupStats {
        let all = self.ready.iter().chain(self.waiting.values()).chain(self.leased.values().map(|l| &l.pending));
        let all = all.chain(self.parked());
        GroupStats {
            lag: (self.ready.len() + self.parked().count()) as u64,
            in_flight: self.leased.len() as u64,
            retrying: self.waiting.len() as u64,
            dead,
            expired: self.expired,
            oldest: all.map(|pending| pending.published).min().map(|published| now.saturating_sub(published)),
        }
    }
}
