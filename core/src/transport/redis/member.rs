//! One subscription's part in one partition: what it reads, and what it knows of the group there.
//!
//! Work reaches a member in four ways, and [`Member::look`] tries them in this order:
//! 1. **due**: retries, what was given back, replays, and what dead owners held of these (script `due`);
//! 2. **recover**: entries of our own that a broken connection kept from us (`XPENDING`);
//! 3. **claim**: entries in the pending lists of consumers that stopped their heartbeat (script `claim`);
//! 4. **read**: new entries (`XREADGROUP … >`), directly or behind the doorbell.
//!
//! A group gets every entry of the log. Those that it does not want, by pattern or because they expired, are marked as
//! done by the script `skip`, which refuses if the group has a newer pattern than we thought: then they are looked at again.
//! All of that is in [`super::intake`].

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Value};
use tokio::sync::Notify;

use super::doorbell::Waiter;
use super::fault::{Failure, strange};
use super::group;
use super::hold::Hold;
use super::keys::GroupKeys;
use super::mail;
use super::partition::{Partition, lock};
use super::scripts;
use super::value::{self, Id};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, disagrees, time};

pub(super) struct Member {
    pub partition: Arc<Partition>,
    pub index: usize,
    pub group: Text,
    pub keys: GroupKeys,
    pub consumer: String,
    pub hold: Arc<Hold>,
    /// Milliseconds.
    pub lease: i64,
    pub spec: GroupSpec,
    pub max_payload: usize,
    pub state: Mutex<State>,
    pub takes: AtomicU64,
    is_armed: AtomicBool,
    disarmed: Notify,
}

pub(super) struct State {
    pub pattern: Pattern,
    /// The newest entry that this member was given, or where the group stood when it joined.
    pub cursor: Id,
    /// When it joined last. Not the partition's, which is new as soon as one of its groups was made again.
    pub epoch: String,
    /// The group was given everything at or before this.
    pub position: Id,
    /// There may be entries after `position`.
    pub fresh: bool,
    /// Entries of ours may be in the pending list without our knowledge.
    pub recover: bool,
    /// The group may have been changed or deleted.
    pub doubt: bool,
    /// By the server's clock.
    pub due: Option<i64>,
    /// By our boot clock.
    pub claim_at: i64,
    /// Most entries that the waiting `take` has room for.
    pub waiting: Option<usize>,
    pub skipped: Vec<Id>,
    pub expired: usize,
    /// The part of the recent entries that the group wanted.
    pub wanted: f64,
    /// Of an ordered group: types that came and that the pattern does not match.
    pub unwanted: BTreeSet<Bytes>,
    /// When the doorbell was armed last, by our boot clock: its reads are not older.
    pub armed_at: i64,
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
        let group::Joined { delivered: cursor, epoch } = group::join(&partition, &spec, None).await?;
        let lease = time::millis(spec.lease).max(1);
        let state = State {
            pattern: spec.pattern.clone(),
            cursor,
            epoch,
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
            unwanted: BTreeSet::new(),
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
        member.be_there().await?;
        Ok(member)
    }

    /// A sign of life, if it answers requests.
    pub async fn be_there(&self) -> Result<(), Failure> {
        if !self.spec.responder || self.index > 0 {
            return Ok(());
        }
        mail::be_there(&self.partition, &self.spec, &self.consumer, self.lease).await
    }

    /// Answers no more requests.
    pub async fn be_gone(&self) {
        if !self.spec.responder || self.index > 0 {
            return;
        }
        if let Err(failure) = mail::be_there(&self.partition, &self.spec, &self.consumer, 0).await {
            log::debug!("group {}: stays listed as a responder for a lease: {}", self.group, failure.error);
        }
    }

    /// Its name, kept with dead letters.
    pub fn subscription(&self) -> &str {
        &self.spec.subscription
    }

    /// Whether what has expired becomes a dead letter.
    pub fn keeps_expired(&self) -> bool {
        self.spec.keep_expired
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
        if self.spec.ordered {
            return self.look_in_order(room).await;
        }
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
        // What a read behind the doorbell is about to bring would look lost.
        if lock(&self.state).recover && !self.is_armed() {
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
            if state.fresh || state.doubt || !state.skipped.is_empty() {
                return false;
            }
            if state.recover {
                return self.is_armed(); // its end rings
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
        self.is_armed()
    }

    /// Resolves when no read of ours is under way.
    pub async fn quiet(&self) {
        loop {
            let disarmed = self.disarmed.notified();
            if !self.is_armed() {
                return;
            }
            disarmed.await;
        }
    }

    pub(super) fn is_armed(&self) -> bool {
        self.is_armed.load(Ordering::Acquire)
    }

    pub(super) fn read_command(&self, room: usize) -> Cmd {
        let mut command = redis::cmd("XREADGROUP");
        command.arg("GROUP").arg(&*self.group).arg(&self.consumer).arg("COUNT").arg(room.max(1));
        command.arg("STREAMS").arg(&self.partition.keys.events).arg(">");
        command
    }

    /// After a read that failed: makes the group again if the server has lost it.
    pub(super) async fn failed(&self, failure: Failure) -> Result<(), Failure> {
        if failure.unknown {
            let mut state = lock(&self.state);
            (state.recover, state.fresh) = (true, true);
        }
        if failure.no_group { self.join_again().await } else { Err(failure) }
    }

    /// Deleted by somebody, or lost by the server: joining again tells.
    async fn join_again(&self) -> Result<(), Failure> {
        let before = {
            let state = lock(&self.state);
            group::Joined { delivered: state.cursor, epoch: state.epoch.clone() }
        };
        let joined = group::join(&self.partition, &self.spec, Some(before)).await?;
        self.partition.reset(&self.group);
        {
            let mut state = lock(&self.state);
            (state.cursor, state.position, state.fresh) = (joined.delivered, joined.delivered, true);
            state.epoch = joined.epoch;
        }
        self.be_there().await
    }

    async fn settle_doubt(&self) -> Result<(), Failure> {
        if !lock(&self.state).doubt {
            return Ok(());
        }
        let mut ask = redis::cmd("HGET");
        ask.arg(&self.partition.keys.groups).arg(&*self.group);
        let facts = self.partition.work.run(&ask, self.partition.patience()).await?;
        if facts == Value::Nil {
            self.join_again().await?;
            lock(&self.state).doubt = false;
            return Ok(());
        }
        let pattern = group::pattern(&value::text(facts)?)?;
        let mut ask = redis::cmd("HEXISTS");
        ask.arg(&self.partition.keys.counts).arg(format!("{}:ordered", self.group));
        let ordered = value::number(self.partition.work.run(&ask, self.partition.patience()).await?)? == 1;
        if ordered != self.spec.ordered {
            return Err(disagrees(&self.group, self.spec.ordered).into()); // deleted, and made anew
        }
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
            // Under the same lock as `stop_reading`, which must not overlook a read that is about to be sent.
            state.armed_at = time::boot_ms();
            self.is_armed.store(true, Ordering::Release);
            room
        };
        // An ordered group reads by a script, when it is rung; a read behind the doorbell could lose its answer.
        Some(if self.spec.ordered { redis::cmd("PING") } else { self.read_command(self.ask(room)) })
    }

    fn waits(&self) -> bool {
        lock(&self.state).waiting.is_some()
    }

    fn position(&self) -> Id {
        lock(&self.state).position
    }

    fn answer(&self, answer: Result<Value, Failure>, seen: Option<Id>) -> bool {
        if self.spec.ordered && answer.is_ok() {
            if seen.is_none() {
                return false;
            }
            let mut state = lock(&self.state);
            (state.fresh, state.waiting) = (true, None);
            drop(state);
            self.hold.arrived.notify_one();
            return true;
        }
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
        if lock(&self.state).recover {
            self.hold.arrived.notify_one();
        }
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
