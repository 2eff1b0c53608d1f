//! The shared state behind all buses of one name, under one lock that is never held across an await.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use ahash::{AHashMap, AHashSet};
use tokio::sync::Notify;

use super::group::{Ended, Group, Load, Pending};
use super::mail::Mail;
use super::seen::Seen;
use crate::clock::Clock;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{DeadReason, Delivery, Failure, Lease, Verdict};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Text};
use crate::pattern::PatternIndex;
use crate::transport::{
    Begun, GroupSpec, GroupStats, Outgoing, Receipt, Rest, Settings, Settlement, Start, WhenFull, disagrees,
};

/// Events kept for groups that start in the past.
pub(super) const HISTORY: usize = 10_000;
/// The same in bytes of payload.
const HISTORY_BYTES: usize = 64 << 20;
/// Events that are published and not finished, over all groups; a publish beyond it waits for room.
const CAPACITY: usize = 200_000;
/// The same in bytes of payload.
const CAPACITY_BYTES: usize = 512 << 20;

/// When one bus's publish has to wait for room, and whether it does.
#[derive(Clone, Copy)]
pub(super) struct Limit {
    bytes: usize,
    when_full: WhenFull,
}

impl Limit {
    pub fn new(bytes: Option<usize>, when_full: WhenFull) -> Self {
        Self { bytes: bytes.unwrap_or(CAPACITY_BYTES), when_full }
    }

    fn full(self, load: Load) -> Error {
        let (events, kib) = (load.events, load.bytes.div_ceil(1024));
        let message = format!(
            "{events} events ({kib} KiB) wait for their handlers; nothing was published. Add workers, or publish slower"
        );
        Error::new(ErrorKind::BufferFull, message)
    }
}

/// The user's own limits on the log. Of several buses that share a store, the strictest hold.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Limits {
    age: Option<Duration>,
    events: Option<u64>,
    bytes: Option<u64>,
}

impl Limits {
    pub fn of(settings: &Settings) -> Self {
        Self { age: settings.max_age, events: settings.max_events, bytes: settings.max_bytes }
    }

    fn any(&self) -> bool {
        self.age.is_some() || self.events.is_some() || self.bytes.is_some()
    }
}

/// One name, one bus.
pub(super) struct Store {
    pub clock: Clock,
    state: Mutex<State>,
    pub mail: Mail,
    /// Rings when a delivery ended: there may be room, the store may be idle.
    ended: Notify,
    owners: AtomicU64,
}

/// A source's place in its group.
#[derive(Clone)]
pub(super) struct Member {
    group: u64,
    owner: u64,
    broadcast: bool,
}

/// A dead letter, and the place in its key's order that a replay gives it back.
pub(super) struct Buried {
    pub letter: DeadLetter,
    pub position: i64,
}

#[derive(Default)]
pub(super) struct State {
    pub position: i64,
    token: i64,
    next_group: u64,
    pub log: VecDeque<Pending>,
    delayed: BTreeMap<(Duration, i64), Outgoing>,
    pub groups: AHashMap<u64, Group>,
    pub names: AHashMap<Text, u64>,
    routes: PatternIndex<u64>,
    pub dead: BTreeMap<u64, Buried>,
    next_dead: u64,
    seen: Seen,
    /// Of all groups together.
    load: Load,
    /// Payload bytes in the log.
    bytes: usize,
    limits: Limits,
    /// Scratch space for the groups that an event goes to.
    matched: Vec<u64>,
}

impl Store {
    pub fn new(clock: Clock) -> Self {
        Self { clock, state: Mutex::default(), mail: Mail::default(), ended: Notify::new(), owners: AtomicU64::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Obeys these limits, too.
    pub fn limit(&self, limits: Limits) {
        let strictest = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        let mut state = self.state();
        let known = state.limits;
        state.limits = Limits {
            age: known.age.into_iter().chain(limits.age).min(),
            events: strictest(known.events, limits.events),
            bytes: strictest(known.bytes, limits.bytes),
        };
    }

    pub fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Whether a group with a responder among its members wants events of this type.
    pub fn has_responder(&self, event_type: &str) -> bool {
        let mut matched = Vec::new();
        let state = self.state();
        state.routes.matches(event_type, &mut matched);
        matched.iter().filter_map(|id| state.groups.get(id)).any(|group| group.spec.responder && group.members > 0)
    }

    /// `once` names the key of what is published once, and for how long it is remembered.
    pub async fn publish(
        &self,
        batch: Vec<Outgoing>,
        limit: Limit,
        timeout: Duration,
        once: impl Fn(&Event) -> Option<(Text, Duration)>,
    ) -> Result<Vec<Receipt>> {
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let room = self.ended.notified();
            let load = {
                let mut state = self.state();
                if state.has_room(batch.len(), limit.bytes) {
                    let now = self.clock.elapsed();
                    let accept = |outgoing: Outgoing| match once(&outgoing.event) {
                        None => state.accept(outgoing, now),
                        Some((key, window)) => state.accept_once(outgoing, key, window, now),
                    };
                    let receipts = batch.into_iter().map(accept).collect();
                    state.enforce(now);
                    return Ok(receipts);
                }
                state.load
            };
            if limit.when_full == WhenFull::Error || tokio::time::timeout_at(deadline, room).await.is_err() {
                return Err(limit.full(load));
            }
        }
    }

    pub fn join(&self, spec: GroupSpec) -> Result<Member> {
        let owner = self.owners.fetch_add(1, Ordering::Relaxed);
        let broadcast = spec.broadcast;
        let mut state = self.state();
        let known = if broadcast { None } else { state.names.get(&spec.group).copied() };
        if known.and_then(|id| state.groups.get(&id)).is_some_and(|group| group.spec.ordered != spec.ordered) {
            return Err(disagrees(&spec.group, spec.ordered));
        }
        let group = known.unwrap_or_else(|| state.add_group(spec.clone(), &self.clock));
        state.repattern(group, spec);
        if let Some(group) = state.groups.get_mut(&group) {
            group.members += 1;
        }
        Ok(Member { group, owner, broadcast })
    }

    pub async fn take(&self, member: &Member, max: usize) -> Vec<Delivery> {
        loop {
            let (wake, due) = {
                let mut state = self.state();
                let (now, wall) = (self.clock.elapsed(), self.clock.now());
                state.promote(now);
                state.enforce(now);
                let next_delayed = state.delayed.first_key_value().map(|((due, _), _)| *due);
                let mut token = state.token;
                let taken = state.on(member.group, |group| {
                    let taken = group.take(now, wall, max, member.owner, &mut token);
                    if !taken.is_empty() && !group.ready.is_empty() {
                        group.wake.notify_one(); // another member may be waiting
                    }
                    (taken, group.wake.clone(), group.next_due())
                });
                state.token = token;
                match taken {
                    Some((taken, ..)) if !taken.is_empty() => return taken,
                    Some((_, wake, due)) => (Some(wake), [next_delayed, due].into_iter().flatten().min()),
                    None => (None, None), // the group was deleted; only closing the source ends the wait
                }
            };
            let Some(wake) = wake else { return std::future::pending().await };
            match due {
                None => wake.notified().await,
                Some(due) => tokio::select! {
                    () = wake.notified() => {}
                    () = self.clock.sleep_until(due) => {}
                },
            }
        }
    }

    pub fn settle(&self, member: &Member, settlements: Vec<Settlement>) -> Vec<Lease> {
        let (now, wall) = (self.clock.elapsed(), self.clock.now());
        let mut state = self.state();
        let mut lost = Vec::new();
        for Settlement { lease, mut verdict } in settlements {
            let ended = state.on(member.group, |group| match &mut verdict {
                Verdict::Ack => group.ack(lease, true, now),
                Verdict::Drop => group.ack(lease, false, now),
                Verdict::Retry { after, failure } => {
                    group.retry(lease, now.saturating_add(*after), (now, wall), std::mem::take(failure))
                }
                Verdict::Release => group.release(lease, now),
                Verdict::Postpone { after } => group.postpone(lease, now.saturating_add(*after)),
                Verdict::DeadLetter { reason, .. } => group.bury(lease, *reason, now),
            });
            let ended = ended.flatten();
            match (ended, verdict) {
                (None, _) => lost.push(lease),
                (Some(Ended::Dead(pending)), Verdict::DeadLetter { reason, failure }) if !member.broadcast => {
                    state.bury(member.group, pending, reason, failure, wall);
                }
                (Some(_), _) => {}
            }
        }
        drop(state);
        self.ended.notify_waiters();
        lost
    }

    pub fn rest(&self, member: &Member, rest: Option<Rest>) {
        let mut state = self.state();
        let Some(group) = state.groups.get_mut(&member.group) else { return };
        match rest {
            Some(rest) => drop(group.resting.insert(member.owner, rest)),
            None => drop(group.resting.remove(&member.owner)),
        }
        drop(state);
        self.ended.notify_waiters();
    }

    /// In a group that was deleted everything may run: the verdict will be refused.
    pub fn begin(&self, member: &Member, wanted: Vec<(Lease, Text)>, keep: Duration) -> Vec<Begun> {
        let (now, count) = (self.clock.elapsed(), wanted.len());
        let begun = self.state().on(member.group, |group| group.begin(wanted, keep, now));
        begun.unwrap_or_else(|| vec![Begun::Run; count])
    }

    pub fn lost(&self, member: &Member, mut held: Vec<Lease>) -> Vec<Lease> {
        let state = self.state();
        let group = state.groups.get(&member.group);
        held.retain(|lease| !group.is_some_and(|group| group.holds(*lease)));
        held
    }

    pub fn leave(&self, member: &Member) {
        let mut state = self.state();
        let Some(group) = state.groups.get_mut(&member.group) else { return };
        group.release_all(member.owner, self.clock.elapsed());
        group.resting.remove(&member.owner);
        group.members -= 1;
        if member.broadcast {
            state.remove_group(member.group);
        }
        drop(state);
        self.ended.notify_waiters();
    }

    pub fn stats(&self, name: &Text) -> Result<GroupStats> {
        let mut state = self.state();
        state.enforce(self.clock.elapsed());
        let group = state.names.get(name).and_then(|id| state.groups.get(id));
        let group = group.ok_or_else(|| Error::not_found(format!("there is no group {name:?} on this bus")))?;
        let dead = state.dead.values().filter(|dead| dead.letter.group == *name).count();
        Ok(group.stats(self.clock.elapsed(), dead as u64))
    }

    pub fn delete(&self, name: &Text) -> bool {
        let mut state = self.state();
        state.dead.retain(|_, dead| dead.letter.group != *name);
        let known = state.names.get(name).copied();
        known.is_some_and(|id| state.remove_group(id).is_some())
    }

    pub fn dead_letters(&self, filter: &DeadLetterFilter, after: Option<&str>, limit: usize) -> Vec<DeadLetter> {
        let after = after.map_or(0, |id| id.parse().unwrap_or(u64::MAX));
        let state = self.state();
        let later = state.dead.range(after.saturating_add(u64::from(after > 0))..);
        later.map(|(_, dead)| &dead.letter).filter(|letter| filter.matches(letter)).take(limit).cloned().collect()
    }

    pub fn replay(&self, filter: &DeadLetterFilter) -> u64 {
        let mut state = self.state();
        let now = self.clock.elapsed();
        let chosen = state.dead.iter().filter(|(_, dead)| filter.matches(&dead.letter)).map(|(id, _)| *id);
        let chosen: Vec<_> = chosen.collect();
        // What a group has to do already, after a replay of the log, keeps its letter.
        let mut busy: AHashMap<Text, AHashSet<i64>> = AHashMap::new();
        let mut replayed = 0;
        for id in chosen {
            let Some(Buried { letter, position }) = state.dead.get(&id) else { continue };
            let (group, position) = (letter.group.clone(), *position);
            let busy = busy.entry(group).or_insert_with_key(|name| state.unfinished(name));
            if !busy.contains(&position) && state.replay(id, now) {
                busy.insert(position);
                replayed += 1;
            }
        }
        replayed
    }

    pub fn purge(&self, filter: &DeadLetterFilter) -> u64 {
        let mut state = self.state();
        let before = state.dead.len();
        state.dead.retain(|_, dead| !filter.matches(&dead.letter));
        (before - state.dead.len()) as u64
    }

    /// Waits until no group with a member has anything to run now. What waits for a time does not count; the first such
    /// time is the answer.
    pub async fn idle(&self) -> Option<Duration> {
        loop {
            let ended = self.ended.notified();
            let now = self.clock.elapsed();
            {
                let state = self.state();
                if state.is_idle(now) {
                    return state.next_due(now);
                }
            }
            ended.await;
        }
    }
}

/// For the parts of the store in other files.
pub(super) fn lock(store: &Store) -> MutexGuard<'_, State> {
    store.state()
}

impl State {
    /// Runs `change` on a group and keeps the sum of all loads right.
    pub fn on<R>(&mut self, group: u64, change: impl FnOnce(&mut Group) -> R) -> Option<R> {
        let group = self.groups.get_mut(&group)?;
        let before = group.load;
        let result = change(group);
        self.load.events = self.load.events + group.load.events - before.events;
        self.load.bytes = self.load.bytes + group.load.bytes - before.bytes;
        Some(result)
    }

    fn has_room(&self, wanted: usize, bytes: usize) -> bool {
        self.load.events == 0 || (self.load.events + wanted <= CAPACITY && self.load.bytes < bytes)
    }

    fn accept_once(&mut self, outgoing: Outgoing, key: Text, window: Duration, now: Duration) -> Receipt {
        if let Some(first) = self.seen.first(&key, now) {
            return Receipt { duplicate: true, ..first };
        }
        let receipt = self.accept(outgoing, now);
        self.seen.add(key, receipt.clone(), now, window);
        receipt
    }

    fn accept(&mut self, outgoing: Outgoing, now: Duration) -> Receipt {
        self.position += 1;
        let (id, position) = (outgoing.event.meta.id.clone(), self.position);
        match outgoing.delay {
            Some(delay) if !delay.is_zero() => {
                self.delayed.insert((now.saturating_add(delay), position), outgoing);
                self.groups.values().for_each(|group| group.wake.notify_one()); // an earlier timer for one of them
                Receipt { id, position: None, duplicate: false }
            }
            _ => {
                self.route(position, outgoing, now);
                Receipt { id, position: Some(position.to_string().into()), duplicate: false }
            }
        }
    }

    fn route(&mut self, position: i64, Outgoing { event, expires_in, .. }: Outgoing, now: Duration) {
        let pending = Pending {
            position,
            published: now,
            expires: expires_in.map(|after| now.saturating_add(after)),
            attempts: 0,
            redelivered: false,
            first_failed: None,
            replayed_from: None,
            failure: None,
            own: false,
            event,
        };
        let mut matched = std::mem::take(&mut self.matched);
        matched.clear();
        self.routes.matches(pending.event.event_type.as_str(), &mut matched);
        for id in &matched {
            self.on(*id, |group| group.push(pending.clone()));
        }
        self.matched = matched;
        self.bytes += pending.event.payload.len();
        self.log.push_back(pending);
        while (self.log.len() > HISTORY || self.bytes > HISTORY_BYTES)
            && let Some(oldest) = self.log.pop_front()
        {
            self.bytes -= oldest.event.payload.len();
        }
    }

    fn promote(&mut self, now: Duration) {
        while let Some(due) = self.delayed.first_entry().filter(|due| due.key().0 <= now) {
            let outgoing = due.remove();
            // Positions grow along the log, so it gets its own only now.
            self.position += 1;
            self.route(self.position, outgoing, now);
        }
    }

    /// Keeps the user's limits: what goes and was not finished is counted in its groups.
    pub fn enforce(&mut self, now: Duration) {
        let limits = self.limits;
        if !limits.any() {
            return;
        }
        let old = limits.age.and_then(|age| now.checked_sub(age));
        let mut floor = None;
        while let Some(oldest) = self.log.front() {
            let over = old.is_some_and(|old| oldest.published < old)
                || limits.events.is_some_and(|most| self.log.len() as u64 > most)
                || limits.bytes.is_some_and(|most| self.bytes as u64 > most);
            if !over {
                break;
            }
            floor = Some(oldest.position);
            self.bytes -= oldest.event.payload.len();
            self.log.pop_front();
        }
        if let Some(floor) = floor {
            for id in self.groups.keys().copied().collect::<Vec<_>>() {
                self.on(id, |group| group.drop_through(floor));
            }
        }
    }

    fn add_group(&mut self, spec: GroupSpec, clock: &Clock) -> u64 {
        self.next_group += 1;
        let id = self.next_group;
        let since = match spec.start {
            _ if spec.broadcast => None,
            Start::New => None,
            Start::Beginning => Some(SystemTime::UNIX_EPOCH),
            Start::At(time) => Some(time),
        };
        let born = clock.now() - clock.elapsed();
        let begin = match since {
            None => self.position,
            Some(since) => {
                let before = self.log.partition_point(|past| born + past.published < since);
                self.log.get(before).map_or(self.position, |first| first.position - 1)
            }
        };
        let mut group = Group::new(spec.clone(), begin);
        if let Some(since) = since {
            let past = self.log.iter().filter(|past| born + past.published >= since);
            past.filter(|past| spec.pattern.matches(past.event.event_type.as_str()))
                .for_each(|past| group.push(past.clone()));
        }
        self.load.events += group.load.events;
        self.load.bytes += group.load.bytes;
        self.routes.insert(&spec.pattern, id);
        if !spec.broadcast {
            self.names.insert(spec.group.clone(), id);
        }
        self.groups.insert(id, group);
        id
    }

    fn repattern(&mut self, id: u64, spec: GroupSpec) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        if group.spec.pattern.as_str() != spec.pattern.as_str() {
            log::warn!(
                "group {} now follows {} instead of {}",
                spec.group,
                spec.pattern.as_str(),
                group.spec.pattern.as_str()
            );
            self.routes.remove(&group.spec.pattern, id);
            self.routes.insert(&spec.pattern, id);
        }
        group.spec = spec;
    }

    fn remove_group(&mut self, id: u64) -> Option<Group> {
        let group = self.groups.remove(&id)?;
        self.load.events -= group.load.events;
        self.load.bytes -= group.load.bytes;
        self.routes.remove(&group.spec.pattern, id);
        if self.names.get(&group.spec.group) == Some(&id) {
            self.names.remove(&group.spec.group);
        }
        Some(group)
    }

    fn bury(&mut self, group: u64, pending: Pending, reason: DeadReason, error: Failure, now: SystemTime) {
        let Some(group) = self.groups.get(&group) else { return };
        self.next_dead += 1;
        let letter = DeadLetter {
            id: self.next_dead.to_string().into(),
            raw: crate::codec::encode(&pending.event).unwrap_or_default().into(),
            event: Some(pending.event),
            error,
            attempts: pending.attempts,
            first_failed_at: pending.first_failed.unwrap_or(now),
            last_failed_at: now,
            subscription: group.spec.subscription.clone(),
            group: group.spec.group.clone(),
            reason,
            replayed_from: pending.replayed_from,
        };
        self.dead.insert(self.next_dead, Buried { letter, position: pending.position });
    }

    /// Hands the letter to its group again and removes it; leaves it when the group is gone.
    fn replay(&mut self, id: u64, now: Duration) -> bool {
        let Some(Buried { letter, position }) = self.dead.get(&id) else { return false };
        let (Some(group), Some(event)) = (self.names.get(&letter.group).copied(), letter.event.clone()) else {
            return false;
        };
        let pending = Pending {
            position: *position,
            event,
            published: now,
            expires: None,
            attempts: 0,
            redelivered: true,
            first_failed: None,
            replayed_from: Some(letter.id.clone()),
            failure: None,
            own: true,
        };
        self.on(group, |group| group.push(pending));
        self.dead.remove(&id);
        true
    }

    /// The positions of what a group has to do.
    fn unfinished(&self, name: &Text) -> AHashSet<i64> {
        let group = self.names.get(name).and_then(|id| self.groups.get(id));
        group.into_iter().flat_map(Group::unfinished).map(|(pending, ..)| pending.position).collect()
    }

    fn is_idle(&self, now: Duration) -> bool {
        self.delayed.first_key_value().is_none_or(|((due, _), _)| *due > now)
            && self.groups.values().filter(|group| group.members > 0).all(|group| group.is_idle(now))
    }

    fn next_due(&self, now: Duration) -> Option<Duration> {
        let groups = self.groups.values().filter(|group| group.members > 0);
        let delayed = self.delayed.keys().map(|(due, _)| *due).find(|due| *due > now);
        groups.filter_map(|group| group.next_after(now)).chain(delayed).min()
    }
}
