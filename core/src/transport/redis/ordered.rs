//! How a member of an ordered group gets work and ends leases.
//!
//! It does not read the log itself: reading and finding the lane of each event must be one step, or two processes that read
//! one after the other could begin in the other order. So one script reads, copies every entry into the group's own store of
//! work and leases there (`scripts/lanes.lua` says how), and nothing lies in the server's pending list. Behind the doorbell
//! stands nothing but a sign of life; who is rung looks.
//!
//! A script cannot match patterns. It is told the types that this member has seen and its group does not want; an event of
//! another type is leased, and acknowledged here if it turns out to be unwanted.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use redis::Value;

use super::fault::Failure;
use super::hold::{Held, Place};
use super::intake::BYTES;
use super::member::Member;
use super::partition::lock;
use super::scripts::{self, Script};
use super::value;
use crate::delivery::{Lease, Verdict};
use crate::error::Result;
use crate::pattern::Pattern;
use crate::transport::time;

/// Unwanted types that are remembered; beyond it they are learned anew.
const TYPES: usize = 256;

impl Member {
    /// Brings up to `room` deliveries into the hold, if there are any at the moment.
    pub(super) async fn look_in_order(&self, room: usize) -> Result<(), Failure> {
        {
            let mut state = lock(&self.state);
            // A lost answer left nothing in the pending list: what it leased comes back with its lease.
            state.recover = false;
            state.claim_at = time::boot_ms() + self.lease;
        }
        while !self.hold.has_ready() && self.has_to_look() {
            self.take_in_order(room).await?;
        }
        Ok(())
    }

    fn has_to_look(&self) -> bool {
        let state = lock(&self.state);
        state.fresh || state.due.is_some_and(|due| due <= self.partition.now())
    }

    async fn take_in_order(&self, room: usize) -> Result<(), Failure> {
        let (keys, own) = (&self.partition.keys, &self.keys);
        let sent = time::boot_ms();
        let prefix = format!("{}:{}:", self.consumer, self.takes.fetch_add(1, Ordering::Relaxed));
        let mut command = scripts::ORDERED_TAKE.call(&[
            &keys.events,
            &keys.groups,
            &keys.counts,
            &own.retry,
            &own.held,
            &own.work,
            &own.lanes,
        ]);
        command.arg(&*self.group).arg(&self.consumer).arg(prefix).arg(self.lease).arg(room.max(1)).arg(BYTES);
        command.arg(if self.keeps_expired() { "1" } else { "" });
        {
            let state = lock(&self.state);
            command.arg(state.pattern.as_str());
            for unwanted in &state.unwanted {
                command.arg(&unwanted[..]);
            }
        }
        let answer = match self.partition.work.script(&scripts::ORDERED_TAKE, &command, self.partition.patience()).await
        {
            Ok(answer) => answer,
            Err(failure) => return self.failed(failure).await,
        };
        let mut facts = value::list(answer)?.into_iter();
        let mut head = || facts.next().unwrap_or(Value::Nil);
        let (now, due, lost) = (value::number(head())?, value::number(head())?, value::number(head())?);
        let (more, upto, pattern) = (value::number(head())? == 1, value::text(head())?, value::text(head())?);
        self.partition.set_now(now);
        if lost > 0 {
            log::warn!("group {}: {lost} waiting deliveries had lost their events", self.group);
        }
        {
            let mut state = lock(&self.state);
            if state.pattern.as_str() != pattern {
                log::info!("group {} follows {pattern} now", self.group);
                state.pattern = Pattern::new(&pattern)?;
                state.unwanted.clear();
                return Ok(());
            }
            (state.due, state.fresh) = ((due >= 0).then_some(due), more);
            if let Some(id) = value::Id::parse(&upto) {
                (state.position, state.cursor) = (id, id);
            }
        }
        let mut unwanted = Vec::new();
        let mut rest: Vec<Value> = facts.collect();
        for delivery in rest.chunks_exact_mut(9) {
            let [id, event, attempt, failed, token, event_type, codec, redelivered, late] = delivery else { continue };
            let next = |part: &mut Value| std::mem::replace(part, Value::Nil);
            let held = Held {
                partition: self.index,
                place: Place::Work { id: value::text(next(id))?.into(), token: value::text(next(token))?.into() },
                event_type: value::bytes(next(event_type))?,
                event: value::bytes(next(event))?,
                attempt: u32::try_from(value::number(next(attempt))?).unwrap_or(u32::MAX),
                redelivered: value::number(next(redelivered))? == 1,
                first_failed: value::text(next(failed))?.parse().ok(),
                until: sent + self.lease,
                mark: None,
                expires: None,
                expired: value::number(next(late))? == 1,
            };
            let codec = Some(value::bytes(next(codec))?).filter(|codec| !codec.is_empty());
            if self.wants(&held.event_type) {
                self.hold.add(held, self.max_payload, codec.as_deref());
            } else {
                unwanted.push((Lease { position: 0, token: 0 }, held, Verdict::Ack));
            }
        }
        if !unwanted.is_empty() {
            self.end_in_order(&unwanted).await?;
        }
        Ok(())
    }

    /// Whether the group wants this type, which is empty for what was wanted before, and where the entry has none.
    fn wants(&self, event_type: &Bytes) -> bool {
        let mut state = lock(&self.state);
        let wanted =
            event_type.is_empty() || std::str::from_utf8(event_type).map_or(true, |found| state.pattern.matches(found));
        if !wanted {
            if state.unwanted.len() >= TYPES {
                state.unwanted.clear();
            }
            state.unwanted.insert(event_type.clone());
        }
        wanted
    }

    /// Ends leases by the script of ordered groups. The numbers of those that were not ours any more.
    pub(super) async fn end_in_order(&self, batch: &[(Lease, Held, Verdict)]) -> Result<Vec<Value>, Failure> {
        let command = self.settle_command(batch);
        let answer = self.partition.work.script(&scripts::ORDERED_SETTLE, &command, self.partition.patience()).await?;
        self.note_ended(answer)
    }

    /// Reads the answer of the script that ends leases.
    pub(super) fn note_ended(&self, answer: Value) -> Result<Vec<Value>, Failure> {
        let mut lost = value::list(answer)?;
        if self.spec.ordered && !lost.is_empty() && value::number(lost.remove(0))? > 0 {
            self.due_at(self.partition.now()); // we have room: it was in the lane of something that we held
        }
        Ok(lost)
    }

    /// The script that ends leases of this group, and its keys.
    pub(super) fn settling(&self) -> (&'static Script, Vec<&str>) {
        let (keys, own) = (&self.partition.keys, &self.keys);
        match self.spec.ordered {
            true => {
                (&scripts::ORDERED_SETTLE, vec![&own.retry, &own.held, &own.work, &own.dead, &keys.bell, &own.lanes])
            }
            false => (&scripts::SETTLE, vec![&keys.events, &own.retry, &own.held, &own.work, &own.dead, &keys.bell]),
        }
    }

    /// Rings for others of an ordered group if something is due that nobody here takes.
    pub(super) async fn pass_on(&self) {
        if self.spec.ordered && lock(&self.state).due.is_some_and(|due| due <= self.partition.now()) {
            let mut ring = redis::cmd("XADD");
            ring.arg(&self.partition.keys.bell).arg("MAXLEN").arg(1).arg("*").arg("why").arg("next of its key");
            drop(self.partition.work.run(&ring, self.partition.patience()).await);
        }
    }
}
