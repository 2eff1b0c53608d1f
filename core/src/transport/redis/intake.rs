//! The four ways on which work reaches a [`Member`], and the way out for what its group does not want.

use std::sync::atomic::Ordering;

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};

use super::fault::{self, Failure};
use super::hold::{Held, Place};
use super::member::{Member, State};
use super::partition::lock;
use super::scripts;
use super::value::{self, Entry, Id};
use crate::error::Result;
use crate::pattern::Pattern;
use crate::transport::time;

/// Entries that one read asks for at most, beyond the room there is: see [`Member::ask`].
const MOST: usize = 512;
/// Bytes of events that one step takes from the group's store of work.
pub(super) const BYTES: usize = 4 << 20;
/// Entries that one claim takes over at most.
const CLAIM: usize = 100;

impl Member {
    /// One read of new entries. An empty one is repeated behind a look at the end of the log, so that we know up to where
    /// it was empty.
    pub(super) async fn read(&self, room: usize) -> Result<(), Failure> {
        let sent = time::boot_ms();
        let room = self.ask(room);
        let command = self.read_command(room);
        let entries = match self.partition.work.run(&command, self.partition.patience()).await {
            Ok(answer) => value::read(answer)?,
            Err(failure) => return self.failed(failure).await,
        };
        if !entries.is_empty() {
            self.receive(entries, room, sent, None);
            return Ok(());
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
            Ok(answer) => self.receive(value::read(answer)?, room, sent, Some(look.last)),
            Err(failure) => return self.failed(failure).await,
        }
        Ok(())
    }

    /// How many entries to ask for, so that about `room` of them are wanted: a group that wants one event in a hundred
    /// should not need a hundred reads, and one that wants all should not take more than it can handle.
    pub(super) fn ask(&self, room: usize) -> usize {
        let wanted = lock(&self.state).wanted.max(0.01);
        ((room as f64 / wanted) as usize).min(MOST).max(room)
    }

    /// Sorts what a read brought: wanted ones into the hold, the rest to be skipped. `seen` is the end of the log before
    /// the read, if that is known.
    pub(super) fn receive(&self, entries: Vec<Entry>, asked: usize, sent: i64, seen: Option<Id>) {
        let mut state = lock(&self.state);
        state.fresh = entries.len() >= asked;
        match entries.last() {
            Some(last) => {
                state.position = last.id;
                state.cursor = last.id;
            }
            None => state.position = state.position.max(seen.unwrap_or_default()),
        }
        for entry in entries {
            let wanted = self.sort(&mut state, entry, 1, sent);
            state.wanted += (f64::from(u8::from(wanted)) - state.wanted) / 32.0;
        }
    }

    /// Keeps an entry of ours, delivered `count` times, if the group wants it. Whether it does.
    fn sort(&self, state: &mut State, mut entry: Entry, count: u64, sent: i64) -> bool {
        let expires = entry.number("x");
        let expired = expires.is_some_and(|at| at <= self.partition.now());
        let event_type = entry.take("t");
        let wanted = event_type
            .as_ref()
            .is_none_or(|found| std::str::from_utf8(found).map_or(true, |found| state.pattern.matches(found)));
        if wanted && (!expired || self.keeps_expired()) {
            self.keep(entry, event_type, count, sent, (expires, expired));
        } else {
            state.expired += usize::from(wanted);
            state.skipped.push(entry.id);
        }
        wanted
    }

    fn keep(
        &self,
        mut entry: Entry,
        event_type: Option<Bytes>,
        count: u64,
        sent: i64,
        (expires, expired): (Option<i64>, bool),
    ) {
        let codec_name = entry.take("c");
        // Without the event, whatever is there stands for it in the dead letter.
        let event = entry.take("e").unwrap_or_else(|| {
            let rest = entry.fields.iter().flat_map(|(name, value)| [&name[..], b"=", value, b"\n"].concat());
            rest.collect::<Vec<u8>>().into()
        });
        let held = Held {
            partition: self.index,
            place: Place::Pending { id: entry.id, count },
            event_type: event_type.unwrap_or_default(),
            event,
            attempt: u32::try_from(count).unwrap_or(u32::MAX),
            redelivered: count > 1,
            first_failed: None,
            until: sent + self.lease,
            mark: None,
            expires,
            expired,
        };
        self.hold.add(held, self.max_payload, codec_name.as_deref());
    }

    pub(super) async fn take_due(&self, room: usize) -> Result<(), Failure> {
        let sent = time::boot_ms();
        let prefix = format!("{}:{}:", self.consumer, self.takes.fetch_add(1, Ordering::Relaxed));
        let mut command =
            scripts::DUE.call(&[&self.keys.retry, &self.keys.held, &self.keys.work, &self.partition.keys.counts]);
        command.arg(prefix).arg(self.lease).arg(room).arg(BYTES);
        command.arg(&*self.group).arg(if self.keeps_expired() { "1" } else { "" });
        let answer = self.partition.work.script(&scripts::DUE, &command, self.partition.patience()).await;
        let mut facts = value::list(answer.inspect_err(|_| lock(&self.state).due = Some(0))?)?.into_iter();
        let mut head = || facts.next().map_or(Ok(0), value::number);
        let (now, due, lost) = (head()?, head()?, head()?);
        self.partition.set_now(now);
        lock(&self.state).due = (due >= 0).then_some(due);
        if lost > 0 {
            log::warn!("group {}: {lost} waiting deliveries had lost their events", self.group);
        }
        while let (Some(id), Some(event), Some(attempt), Some(failed), Some(token), Some(late)) =
            (facts.next(), facts.next(), facts.next(), facts.next(), facts.next(), facts.next())
        {
            let event = value::bytes(event)?;
            let held = Held {
                partition: self.index,
                place: Place::Work { id: value::text(id)?.into(), token: value::text(token)?.into() },
                event_type: Bytes::new(),
                event,
                attempt: u32::try_from(value::number(attempt)?).unwrap_or(u32::MAX),
                redelivered: true,
                first_failed: value::text(failed)?.parse().ok(),
                until: sent + self.lease,
                mark: None,
                expires: None,
                expired: value::number(late)? == 1,
            };
            self.hold.add(held, self.max_payload, None);
        }
        Ok(())
    }

    /// Finds entries of ours that we do not know: a read was executed and its answer lost. Not by `XREADGROUP … 0`: it
    /// counts another delivery of all that it shows, and what handlers have would lose its fence.
    pub(super) async fn recover(&self) -> Result<(), Failure> {
        let mut from = "-".to_owned();
        loop {
            let sent = time::boot_ms();
            let command = self.pending_command(&from, "+", 1000);
            let rows = match self.partition.work.run(&command, self.partition.patience()).await {
                Ok(rows) => value::pending(rows)?,
                Err(failure) => return self.failed(failure).await,
            };
            let Some((last, _)) = rows.last() else { break };
            from = format!("({last}");
            for (id, _) in rows.into_iter().filter(|(id, _)| !self.hold.holds_entry(self.index, *id)) {
                // Again, with the entry: it may have been settled a moment ago.
                let mut commands = Pipeline::new();
                commands.add_command(self.pending_command(&id.to_string(), &id.to_string(), 1));
                commands.cmd("XRANGE").arg(&self.partition.keys.events).arg(id.to_string()).arg(id.to_string());
                let mut answers = self.partition.work.run_all(&commands, self.partition.patience()).await?.into_iter();
                let mut answer = || answers.next().map_or(Ok(Value::Nil), fault::check);
                let Some((_, count)) = value::pending(answer()?)?.pop() else { continue };
                let mut state = lock(&self.state);
                let Some(entry) = value::entries(answer()?)?.pop() else {
                    state.skipped.push(id); // a limit of the user removed it
                    state.expired += 1;
                    continue;
                };
                // It may have been idle for long: not ours to settle without a fence until the next heartbeat.
                self.sort(&mut state, entry, count, sent - self.lease);
            }
        }
        lock(&self.state).recover = false;
        Ok(())
    }

    fn pending_command(&self, from: &str, to: &str, count: usize) -> Cmd {
        let mut command = redis::cmd("XPENDING");
        command.arg(&self.partition.keys.events).arg(&*self.group).arg(from).arg(to).arg(count).arg(&self.consumer);
        command
    }

    pub(super) async fn claim(&self, room: usize) -> Result<(), Failure> {
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
            self.sort(&mut lock(&self.state), value::entry_of(id, fields)?, count, sent);
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
    pub(super) async fn skip(&self) -> Result<(), Failure> {
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
}
