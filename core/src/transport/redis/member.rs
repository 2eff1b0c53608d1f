//! One subscription's part in one partition: what it reads, and what it knows of the group there.
//!
//! Work reaches a member in four ways, and [`Member::look`] tries them in this order:
//! 1. **due**: retries, what was given back, replays, and what dead owners held of these (script `due`);
//! 2. **recover**: entries of our own that a broken connection kept from us (`XREADGROUP … 0`);
//! 3. **claim**: entries in the pending lists of consumers that stopped their heartbeat (script `claim`);
//! 4. **read**: new entries (`XREADGROUP … >`), directly or behind the doorbell.
//!
//! A group gets every entry of the log. Those that it does not want, by pattern or because they expired, are marked as
//! done by the script `skip`, which refuses if the group has a newer pattern than we thought: then they are looked at again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};
use tokio::sync::Notify;

use super::doorbell::Waiter;
use super::fault::{self, Failure, strange};
use super::group;
use super::hold::{Held, Hold, Place};
use super::keys::GroupKeys;
use super::partition::{Partition, lock};
use super::scripts;
use super::value::{self, Entry, Id};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, time};

/// Entries that one read asks for at most, beyond the room there is: see [`Member::ask`].
const MOST: usize = 512;
/// Bytes of events that one step takes from the group's store of work.
const BYTES: usize = 4 << 20;
/// Entries that one claim takes over at most.
const CLAIM: usize = 100;

pub(super) struct Member {
    pub partition: Arc<Partition>,
    pub index: usize,
    pub group: Text,
    pub keys: GroupKeys,
    pub consumer: String,
    pub hold: Arc<Hold>,
    /// Milliseconds.
    pub lease: i64,
    spec: GroupSpec,
    max_payload: usize,
    state: Mutex<State>,
    takes: AtomicU64,
    is_armed: AtomicBool,
    disarmed: Notify,
}

struct State {
    pattern: Pattern,
    /// Of the server's data when this member joined.
    epoch: String,
    /// The newest entry that this member was given, or where the group stood when it joined.
    cursor: Id,
    /// The group was given everything at or before this.
    position: Id,
    /// There may be entries after `position`.
    fresh: bool,
    /// Entries of ours may be in the pending list without our knowledge.
    recover: bool,
    /// The group may have been changed or deleted.
    doubt: bool,
    /// By the server's clock.
    due: Option<i64>,
    /// By our boot clock.
    claim_at: i64,
    /// Most entries that the waiting `take` has room for.
    waiting: Option<usize>,
    skipped: Vec<Id>,
    expired: usize,
    /// The part of the recent entries that the group wanted.
    wanted: f64,
    /// When the doorbell was armed last, by our boot clock: its reads are not older.
    armed_at: i64,
}

impl Member {
    /// Joins the group in one partition.
    pub async fn join(
        partition: Arc<Partition>,
        index: usize,
        spec: GroupSpec,
        consumer: String,
        hold: Arc<Hold>,
        max_payload: usize,
    ) -> Result<Arc<Self>> {
        let group::Joined { epoch, cursor } = group::join(&partition, &spec, None).await?;
        let lease = time::millis(spec.lease).max(1);
        let state = State {
            pattern: spec.pattern.clone(),
            epoch,
            cursor,
            position: cursor,
            fresh: true,
            recover: false,
            doubt: false,
            due: Some(0),
            claim_at: 0,
            waiting: None,
            skipped: Vec::new(),
            expired: 0,
            wanted: 1.0,
            armed_at: 0,
        };
        let member = Arc::new(Self {
            keys: partition.keys.group(&spec.group),
            group: spec.group.clone(),
            partition,
            index,
            consumer,
            hold,
            lease,
            spec,
            max_payload,
            state: Mutex::new(state),
            takes: AtomicU64::new(0),
            is_armed: AtomicBool::new(false),
            disarmed: Notify::new(),
        });
        member.partition.enter(&member);
        Ok(member)
    }

    /// Its name, kept with dead letters.
    pub fn subscription(&self) -> &str {
        &self.spec.subscription
    }

    /// The keys whose first entries say when something is due.
    pub fn timers(&self) -> [&str; 2] {
        [&self.keys.retry, &self.keys.held]
    }

    /// What the keeper saw: the end of the log and the next due time.
    pub fn pulse(&self, last: Id, due: Option<i64>) {
        let now = self.partition.now();
        let mut state = lock(&self.state);
        // A shorter log than ours is another log.
        let strange = last < state.cursor;
        state.fresh |= strange;
        state.due = due;
        let act = strange || due.is_some_and(|due| due <= now);
        drop(state);
        if act || due.is_some() {
            self.hold.arrived.notify_one();
        }
    }

    /// Something may be due.
    pub fn ring(&self) {
        lock(&self.state).due = Some(0);
        self.hold.arrived.notify_one();
    }

    /// The group may have been changed or deleted.
    pub fn doubt(&self) {
        lock(&self.state).doubt = true;
        self.hold.arrived.notify_one();
    }

    /// A retry of ours is due then, by the server's clock.
    pub fn due_at(&self, due: i64) {
        let mut state = lock(&self.state);
        state.due = Some(state.due.map_or(due, |known| known.min(due)));
        drop(state);
        self.hold.arrived.notify_one();
    }

    /// How long until this member has to look even if nobody rings.
    pub fn rest(&self) -> Duration {
        let state = lock(&self.state);
        let claim = state.claim_at - time::boot_ms();
        let due = state.due.map_or(claim, |due| due - self.partition.now());
        Duration::from_millis(claim.min(due).max(0).unsigned_abs())
    }

    /// Brings up to about `room` deliveries into the hold, if there are any at the moment.
    pub async fn look(&self, room: usize) -> Result<(), Failure> {
        lock(&self.state).waiting = None;
        self.settle_doubt().await?;
        self.skip().await?;
        if lock(&self.state).due.is_some_and(|due| due <= self.partition.now()) {
            match self.take_due(room).await {
                // A full server refuses to lease them; new events can be taken all the same.
                Err(failure) if !failure.unknown => {
                    log::debug!("group {}: what is due stays where it is: {}", self.group, failure.error);
                    lock(&self.state).due = Some(self.partition.now() + 1000);
                }
                other => other?,
            }
        }
        if lock(&self.state).recover {
            self.recover().await?;
        }
        if lock(&self.state).claim_at <= time::boot_ms() {
            self.claim(room).await?;
        }
        while !self.hold.has_ready() && lock(&self.state).fresh {
            self.read(room).await?;
            self.skip().await?;
        }
        Ok(())
    }

    /// Waits behind the doorbell with this much room. False when there is something to look at first.
    pub fn wait(self: &Arc<Self>, room: usize) -> bool {
        {
            let mut state = lock(&self.state);
            if state.fresh || state.recover || state.doubt || !state.skipped.is_empty() {
                return false;
            }
            state.waiting = Some(room);
        }
        let waiter: Arc<dyn Waiter> = self.clone();
        let waits = self.partition.doorbell.wait(&waiter);
        if !waits {
            lock(&self.state).fresh = true;
        }
        waits
    }

    /// Reads no more. Whether a read of ours is under way.
    pub fn stop_reading(&self) -> bool {
        let mut state = lock(&self.state);
        state.waiting = None;
        self.is_armed.load(Ordering::Acquire)
    }

    /// Resolves when no read of ours is under way.
    pub async fn quiet(&self) {
        loop {
            let disarmed = self.disarmed.notified();
            if !self.is_armed.load(Ordering::Acquire) {
                return;
            }
            disarmed.await;
        }
    }

    fn read_command(&self, room: usize, from: &str) -> Cmd {
        let mut command = redis::cmd("XREADGROUP");
        command.arg("GROUP").arg(&*self.group).arg(&self.consumer).arg("COUNT").arg(room.max(1));
        command.arg("STREAMS").arg(&self.partition.keys.events).arg(from);
        command
    }

    /// One read of new entries. An empty one is repeated behind a look at the end of the log, so that we know up to where
    /// it was empty.
    async fn read(&self, room: usize) -> Result<(), Failure> {
        let sent = time::boot_ms();
        let room = self.ask(room);
        let command = self.read_command(room, ">");
        let entries = match self.partition.work.run(&command, self.partition.patience()).await {
            Ok(answer) => value::read(answer)?,
            Err(failure) => return self.failed(failure).await,
        };
        if !entries.is_empty() {
            return Ok(self.receive(entries, room, sent, None));
        }
        let keys = &self.partition.keys;
        let mut commands = Pipeline::new();
        commands.add_command(scripts::PULSE.call(&[&keys.events, &keys.delayed, &keys.meta])).add_command(command);
        commands.ignore_errors();
        let sent = time::boot_ms();
        let answers = match self.partition.work.run_all(&commands, self.partition.patience()).await {
            Ok(answers) => answers,
            Err(failure) => return self.failed(failure).await,
        };
        let mut answers = answers.into_iter();
        let look = match answers.next().map_or(Ok(Value::Nil), fault::check) {
            Ok(look) => self.partition.note(look)?,
            Err(failure) if failure.no_script => self.partition.look(&[]).await.map(|mut look| {
                look.last = Id::default(); // seen after the read, so it says nothing about it
                look
            })?,
            Err(failure) => return Err(failure),
        };
        match answers.next().map_or(Ok(Value::Nil), fault::check) {
            Ok(answer) => Ok(self.receive(value::read(answer)?, room, sent, Some(look.last))),
            Err(failure) => self.failed(failure).await,
        }
    }

    /// How many entries to ask for, so that about `room` of them are wanted: a group that wants one event in a hundred
    /// should not need a hundred reads, and one that wants all should not take more than it can handle.
    fn ask(&self, room: usize) -> usize {
        let wanted = lock(&self.state).wanted.max(0.01);
        ((room as f64 / wanted) as usize).min(MOST).max(room)
    }

    /// After a read that failed: makes the group again if the server has lost it.
    async fn failed(&self, failure: Failure) -> Result<(), Failure> {
        if failure.unknown {
            let mut state = lock(&self.state);
            (state.recover, state.fresh) = (true, true);
        }
        if !failure.no_group {
            return Err(failure);
        }
        self.join_again().await
    }

    async fn join_again(&self) -> Result<(), Failure> {
        let before = {
            let state = lock(&self.state);
            group::Joined { epoch: state.epoch.clone(), cursor: state.cursor }
        };
        let group::Joined { epoch, cursor } = group::join(&self.partition, &self.spec, Some(before)).await?;
        self.partition.reset(&self.group);
        let mut state = lock(&self.state);
        (state.epoch, state.cursor, state.position, state.fresh) = (epoch, cursor, cursor, true);
        Ok(())
    }

    /// Sorts what a read brought: wanted ones into the hold, the rest to be skipped. `seen` is the end of the log before
    /// the read, if that is known.
    fn receive(&self, entries: Vec<Entry>, asked: usize, sent: i64, seen: Option<Id>) {
        let now = self.partition.now();
        let mut state = lock(&self.state);
        state.fresh = entries.len() >= asked;
        match entries.last() {
            Some(last) => {
                state.position = last.id;
                state.cursor = last.id;
            }
            None => state.position = state.position.max(seen.unwrap_or_default()),
        }
        for mut entry in entries {
            let expired = entry.number("x").is_some_and(|at| at <= now);
            let event_type = entry.take("t");
            let wanted = event_type
                .as_ref()
                .is_none_or(|found| std::str::from_utf8(found).map_or(true, |found| state.pattern.matches(found)));
            state.wanted += (f64::from(u8::from(wanted)) - state.wanted) / 32.0;
            if !wanted || expired {
                state.expired += usize::from(wanted);
                state.skipped.push(entry.id);
                continue;
            }
            let place = Place::Pending { id: entry.id, count: 1 };
            self.keep(entry, event_type, place, 1, sent);
        }
    }

    fn keep(&self, mut entry: Entry, event_type: Option<Bytes>, place: Place, attempt: u32, sent: i64) {
        let codec_name = entry.take("c");
        // Without the event, whatever is there stands for it in the dead letter.
        let event = entry.take("e").unwrap_or_else(|| {
            let rest = entry.fields.iter().flat_map(|(name, value)| [&name[..], b"=", value, b"\n"].concat());
            rest.collect::<Vec<u8>>().into()
        });
        let held = Held {
            partition: self.index,
            place,
            event_type: event_type.unwrap_or_default(),
            event,
            attempt,
            first_failed: None,
            until: sent + self.lease,
        };
        self.hold.add(held, self.max_payload, codec_name.as_deref());
    }

    async fn take_due(&self, room: usize) -> Result<(), Failure> {
        let sent = time::boot_ms();
        let prefix = format!("{}:{}:", self.consumer, self.takes.fetch_add(1, Ordering::Relaxed));
        let mut command = scripts::DUE.call(&[&self.keys.retry, &self.keys.held, &self.keys.work]);
        command.arg(prefix).arg(self.lease).arg(room).arg(BYTES);
        let answer = self.partition.work.script(&scripts::DUE, &command, self.partition.patience()).await;
        let mut facts = value::list(answer.inspect_err(|_| lock(&self.state).due = Some(0))?)?.into_iter();
        let mut head = || facts.next().map_or(Ok(0), value::number);
        let (now, due, lost) = (head()?, head()?, head()?);
        self.partition.set_now(now);
        lock(&self.state).due = (due >= 0).then_some(due);
        if lost > 0 {
            log::warn!("group {}: {lost} waiting deliveries had lost their events", self.group);
        }
        while let (Some(id), Some(event), Some(attempt), Some(failed), Some(token)) =
            (facts.next(), facts.next(), facts.next(), facts.next(), facts.next())
        {
            let event = value::bytes(event)?;
            let held = Held {
                partition: self.index,
                place: Place::Work { id: value::text(id)?.into(), token: value::text(token)?.into() },
                event_type: Bytes::new(),
                event,
                attempt: u32::try_from(value::number(attempt)?).unwrap_or(u32::MAX),
                first_failed: value::text(failed)?.parse().ok(),
                until: sent + self.lease,
            };
            self.hold.add(held, self.max_payload, None);
        }
        Ok(())
    }

    /// Finds entries of ours that we do not know: a read was executed and its answer lost.
    async fn recover(&self) -> Result<(), Failure> {
        let mut from = Id::default();
        loop {
            let sent = time::boot_ms();
            let command = self.read_command(1000, &from.to_string());
            let entries = match self.partition.work.run(&command, self.partition.patience()).await {
                Ok(answer) => value::read(answer)?,
                Err(failure) => return self.failed(failure).await,
            };
            let Some(last) = entries.last().map(|entry| entry.id) else { break };
            for mut entry in entries.into_iter().filter(|entry| !self.hold.holds_entry(self.index, entry.id)) {
                let mut pending = redis::cmd("XPENDING");
                pending.arg(&self.partition.keys.events).arg(&*self.group);
                pending.arg(entry.id.to_string()).arg(entry.id.to_string()).arg(1);
                let rows = value::list(self.partition.work.run(&pending, self.partition.patience()).await?)?;
                let Some(row) = rows.into_iter().next() else { continue };
                let count = value::list(row)?.into_iter().nth(3).map_or(Ok(1), value::number)?.max(1).unsigned_abs();
                if entry.fields.is_empty() {
                    lock(&self.state).skipped.push(entry.id); // a limit of the user removed it
                    lock(&self.state).expired += 1;
                    continue;
                }
                let event_type = entry.take("t");
                let place = Place::Pending { id: entry.id, count };
                // It may have been idle for long: not ours to settle without a fence until the next heartbeat.
                self.keep(entry, event_type, place, u32::try_from(count).unwrap_or(u32::MAX), sent - self.lease);
            }
            from = last;
        }
        lock(&self.state).recover = false;
        Ok(())
    }

    async fn claim(&self, room: usize) -> Result<(), Failure> {
        let sent = time::boot_ms();
        let every = self.lease / 4;
        lock(&self.state).claim_at = sent + every + fastrand::i64(0..=every / 4);
        let mut command = scripts::CLAIM.call(&[&self.partition.keys.events, &self.partition.keys.counts]);
        command.arg(&*self.group).arg(&self.consumer).arg(self.lease).arg(room.clamp(1, CLAIM));
        let answer = match self.partition.work.script(&scripts::CLAIM, &command, self.partition.patience()).await {
            Ok(answer) => answer,
            Err(failure) => return self.failed(failure).await,
        };
        let mut facts = value::list(answer)?.into_iter();
        let lost = facts.next().map_or(Ok(0), value::number)?;
        let mut claimed = 0;
        while let (Some(id), Some(count), Some(fields)) = (facts.next(), facts.next(), facts.next()) {
            let (id, count) = (value::id(id)?, value::number(count)?.max(1).unsigned_abs());
            let mut entry = value::entry_of(id, fields)?;
            let event_type = entry.take("t");
            let attempt = u32::try_from(count).unwrap_or(u32::MAX);
            self.keep(entry, event_type, Place::Pending { id, count }, attempt, sent);
            claimed += 1;
        }
        if claimed > 0 {
            log::info!("group {}: {claimed} deliveries of a member that stopped are delivered again", self.group);
            lock(&self.state).claim_at = 0; // there may be more
        }
        if lost > 0 {
            log::warn!(
                "group {}: {lost} deliveries were removed by a limit on the log before they were handled",
                self.group
            );
        }
        Ok(())
    }

    /// Marks as done what the group does not want.
    async fn skip(&self) -> Result<(), Failure> {
        let (ids, expired, pattern) = {
            let mut state = lock(&self.state);
            if state.skipped.is_empty() {
                return Ok(());
            }
            (std::mem::take(&mut state.skipped), std::mem::take(&mut state.expired), state.pattern.clone())
        };
        let keys = &self.partition.keys;
        let mut command = scripts::SKIP.call(&[&keys.events, &keys.groups, &keys.counts]);
        command.arg(&*self.group).arg(pattern.as_str()).arg(expired);
        for id in &ids {
            command.arg(id.to_string());
        }
        let answer = self.partition.work.script(&scripts::SKIP, &command, self.partition.patience()).await;
        let again = match answer {
            Ok(answer) => value::text(answer)?,
            Err(failure) => {
                {
                    let mut state = lock(&self.state);
                    state.skipped.extend(ids);
                    state.expired += expired;
                }
                return self.failed(failure).await;
            }
        };
        if again.is_empty() {
            return Ok(());
        }
        // They are ours and unknown to us now, as after a lost answer: recover them under the new pattern.
        let pattern = Pattern::new(&again)?;
        let mut state = lock(&self.state);
        log::info!("group {} follows {} now", self.group, pattern.as_str());
        (state.pattern, state.recover) = (pattern, true);
        Ok(())
    }

    async fn settle_doubt(&self) -> Result<(), Failure> {
        if !lock(&self.state).doubt {
            return Ok(());
        }
        let mut ask = redis::cmd("HGET");
        ask.arg(&self.partition.keys.groups).arg(&*self.group);
        let facts = self.partition.work.run(&ask, self.partition.patience()).await?;
        if facts == Value::Nil {
            // Deleted by somebody, or lost by the server: joining again tells.
            self.join_again().await?;
            lock(&self.state).doubt = false;
            return Ok(());
        }
        let pattern = group::pattern(&value::text(facts)?)?;
        let mut state = lock(&self.state);
        if state.pattern.as_str() != pattern.as_str() {
            log::info!("group {} follows {} now", self.group, pattern.as_str());
            state.pattern = pattern;
        }
        state.doubt = false;
        Ok(())
    }

    /// Removes this consumer if it is `own`, and those that were silent for `idle`, as far as they hold nothing.
    pub async fn forget_consumers(&self, idle: Duration, own: bool) {
        let mut command = scripts::FORGET.call(&[&self.partition.keys.events]);
        command.arg(&*self.group).arg(if own { &self.consumer } else { "" }).arg(time::millis(idle));
        let done = self.partition.work.script(&scripts::FORGET, &command, self.partition.patience()).await;
        if let Err(failure) = done {
            log::debug!("group {}: consumers stay listed: {}", self.group, failure.error);
        }
    }

    /// At the end: what nobody wants is marked as done.
    pub async fn finish(&self) {
        if let Err(failure) = self.skip().await {
            log::debug!("group {}: leaving: {}", self.group, failure.error);
        }
    }
}

impl Waiter for Member {
    fn command(&self) -> Option<Cmd> {
        let room = {
            let mut state = lock(&self.state);
            let room = state.waiting?;
            // Under the same lock as `quiet`, which must not overlook a read that is about to be sent.
            state.armed_at = time::boot_ms();
            self.is_armed.store(true, Ordering::Release);
            room
        };
        Some(self.read_command(self.ask(room), ">"))
    }

    fn waits(&self) -> bool {
        lock(&self.state).waiting.is_some()
    }

    fn position(&self) -> Id {
        lock(&self.state).position
    }

    fn answer(&self, answer: Result<Value, Failure>, seen: Option<Id>) -> bool {
        let (room, armed_at) = {
            let state = lock(&self.state);
            (state.waiting, state.armed_at)
        };
        let entries = answer.and_then(|answer| value::read(answer).map_err(|_| strange("no entries").into()));
        match entries {
            Ok(entries) if entries.is_empty() => {
                let mut state = lock(&self.state);
                state.position = state.position.max(seen.unwrap_or_default());
                return false;
            }
            Ok(entries) => self.receive(entries, self.ask(room.unwrap_or(1)), armed_at, seen),
            Err(failure) => {
                let mut state = lock(&self.state);
                state.fresh = true;
                state.recover |= failure.unknown;
            }
        }
        lock(&self.state).waiting = None;
        self.hold.arrived.notify_one();
        true
    }

    fn disarmed(&self) {
        self.is_armed.store(false, Ordering::Release);
        self.disarmed.notify_waiters();
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.partition.leave(self);
    }
}

/// The group is gone on purpose.
pub(super) fn deleted(group: &str) -> Error {
    Error::not_found(format!("group {group:?} was deleted while this process was subscribed"))
}
