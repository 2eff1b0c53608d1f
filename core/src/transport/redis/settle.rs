//! Ending leases, keeping them, and giving all of them back.
//!
//! A handled delivery whose lease cannot have been lost yet is acknowledged by a plain XACK, many in one command: nobody
//! else may take it before the lease has run out by the server's clock, and we counted from before the read was sent.
//! Everything else goes through the script `settle`, which looks before it acts. (A plain XACK that comes too late all
//! the same loses nothing: the event *was* handled, and the other's acknowledgement will find nothing.)

use redis::{Cmd, Pipeline, Value};

use super::fault::{self, Failure};
use super::hold::{Held, Place};
use super::marks::{Mark, Step};
use super::member::Member;
use super::scripts;
use super::value;
use crate::delivery::{DeadReason, Failure as HandlerFailure, Lease, Verdict};
use crate::error::Result;
use crate::transport::{Settlement, time};

/// Before the end of a lease, time in which the plain way is not taken any more.
const MARGIN: i64 = 200;

impl Member {
    /// Settles what is held in this partition. Returns the leases that were not ours any more.
    pub(super) async fn settle(&self, batch: Vec<(Lease, Held, Verdict)>) -> Result<Vec<Lease>, Failure> {
        if batch.iter().all(|(_, held, _)| held.mark.is_none()) {
            return self.settle_together(batch).await;
        }
        let (ends, rest): (Vec<_>, Vec<_>) = batch.into_iter().partition(|(_, _, verdict)| needs_no_room(verdict));
        let mut lost = match self.settle_together(ends.clone()).await {
            Err(failure) if failure.full => self.settle_in_turn(ends).await?,
            other => other?,
        };
        lost.extend(self.settle_together(rest).await?);
        Ok(lost)
    }

    /// The mark, and then the delivery: a server without memory refuses transactions, whatever is in them. A step that is
    /// lost in between leads to a duplicate that is absorbed.
    async fn settle_in_turn(&self, mut ends: Vec<(Lease, Held, Verdict)>) -> Result<Vec<Lease>, Failure> {
        let own = |mark: &Mark| mark.partition == self.index;
        let marks = ends.iter_mut().filter_map(|(_, held, verdict)| {
            let mark = held.mark.take_if(|mark| own(mark))?;
            Some((Step::of(verdict), *mark))
        });
        self.mark(&marks.collect::<Vec<_>>()).await?;
        self.settle_together(ends).await
    }

    /// With the marks that are in this partition, in one transaction.
    async fn settle_together(&self, batch: Vec<(Lease, Held, Verdict)>) -> Result<Vec<Lease>, Failure> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let safe_until = time::boot_ms() + MARGIN;
        let (mut plain, mut ack) = (Vec::new(), redis::cmd("XACK"));
        let (mut ends, mut rest) = (Vec::new(), Vec::new());
        ack.arg(&self.partition.keys.events).arg(&*self.group);
        let mut marks = Vec::new();
        for (lease, held, verdict) in batch {
            if let Some(mark) = held.mark.as_deref().filter(|mark| mark.partition == self.index) {
                marks.push((Step::of(&verdict), mark.clone()));
            }
            match (&held.place, &verdict) {
                (Place::Pending { id, .. }, Verdict::Ack | Verdict::Drop) if held.until > safe_until => {
                    ack.arg(id.to_string());
                    plain.push(lease);
                }
                _ if needs_no_room(&verdict) => ends.push((lease, held, verdict)),
                _ => rest.push((lease, held, verdict)),
            }
        }
        let mut commands = Pipeline::new();
        commands.ignore_errors();
        if !marks.is_empty() {
            commands.cmd("MULTI");
            commands.add_command(self.mark_command(&marks));
        }
        if !plain.is_empty() {
            commands.add_command(ack);
        }
        let fenced = [ends, rest].into_iter().filter(|part| !part.is_empty());
        let scripts: Vec<_> = fenced.map(|part| (self.settle_command(&part), part)).collect();
        for (script, _) in &scripts {
            commands.add_command(script.clone());
        }
        if !marks.is_empty() {
            commands.cmd("EXEC");
        }
        let mut answers = self.partition.work.run_all(&commands, self.partition.patience()).await?;
        if !marks.is_empty() {
            answers = executed(answers)?;
        }
        let mut answers = answers.into_iter();
        let mut answer = || answers.next().map_or(Ok(Value::Nil), fault::check);
        if !marks.is_empty() {
            answer()?;
        }
        let mut lost = Vec::new();
        if !plain.is_empty() {
            let acked = usize::try_from(value::number(answer()?)?).unwrap_or(0);
            // The server says how many it did not know, not which: the number is what is reported.
            lost.extend(plain.iter().skip(acked));
            self.done(&plain);
        }
        for (script, fenced) in scripts {
            let answer = match answer() {
                Err(failure) if failure.no_script => {
                    self.partition.work.script(self.settling().0, &script, self.partition.patience()).await?
                }
                other => other?,
            };
            for index in self.note_ended(answer)? {
                let index = usize::try_from(value::number(index)?).unwrap_or(usize::MAX);
                lost.extend(fenced.get(index).map(|(lease, ..)| *lease));
            }
            self.done(&fenced.iter().map(|(lease, ..)| *lease).collect::<Vec<_>>());
            let retries = fenced.iter().filter_map(|(_, _, verdict)| match verdict {
                Verdict::Retry { after, .. } | Verdict::Postpone { after } => Some(time::millis(*after)),
                Verdict::Release => Some(0),
                _ => None,
            });
            if let Some(after) = retries.min() {
                self.due_at(self.partition.now().saturating_add(after));
            }
        }
        Ok(lost)
    }

    fn done(&self, leases: &[Lease]) {
        leases.iter().for_each(|lease| drop(self.hold.remove(*lease)));
    }

    pub(super) fn settle_command(&self, fenced: &[(Lease, Held, Verdict)]) -> Cmd {
        let (script, keys) = self.settling();
        let mut command = script.call(&keys);
        command.arg(&*self.group).arg(&self.consumer).arg(self.subscription());
        let none = HandlerFailure::default();
        for (_, held, verdict) in fenced {
            match &held.place {
                Place::Pending { id, count } => command.arg("p").arg(id.to_string()).arg(count.to_string()),
                Place::Work { id, token } => command.arg("w").arg(&**id).arg(&**token),
            };
            let (letter, delay, attempt, reason, failure) = match verdict {
                Verdict::Ack | Verdict::Drop => ("a", 0, held.attempt, "", &none),
                Verdict::Retry { after, failure } => ("r", time::millis(*after), held.attempt, "", failure),
                Verdict::Release => ("b", 0, held.attempt.saturating_sub(1), "", &none),
                Verdict::Postpone { after } => ("l", time::millis(*after), held.attempt.saturating_sub(1), "", &none),
                // No handler got what had expired.
                Verdict::DeadLetter { reason: DeadReason::Expired, failure } => {
                    ("d", 0, held.attempt.saturating_sub(1), DeadReason::Expired.as_str(), failure)
                }
                Verdict::DeadLetter { reason, failure } => ("d", 0, held.attempt, reason.as_str(), failure),
            };
            command.arg(letter).arg(delay).arg(attempt);
            command.arg(held.first_failed.map_or(String::new(), |at| at.to_string()));
            // What lies in the store of work has its event there; an acknowledgement needs none.
            let copies =
                matches!(held.place, Place::Pending { .. }) && !matches!(verdict, Verdict::Ack | Verdict::Drop);
            let event: &[u8] = if copies { &held.event } else { b"" };
            command.arg(&held.event_type[..]).arg(event).arg(reason);
            command.arg(&failure.kind).arg(&failure.message).arg(&failure.stack);
            command.arg(held.expires.map_or(String::new(), |at| at.to_string()));
        }
        command
    }

    /// Keeps everything held in this partition for another lease; forgets what was lost.
    pub(super) async fn heartbeat(&self) -> Result<(), Failure> {
        let held = self.hold.in_partition(self.index);
        if held.is_empty() {
            return Ok(());
        }
        let keys = &self.partition.keys;
        let mut command = scripts::HEARTBEAT.call(&[&keys.events, &self.keys.held, &self.keys.work, &keys.counts]);
        command.arg(&*self.group).arg(&self.consumer).arg(self.lease);
        for (_, place) in &held {
            match place {
                Place::Pending { id, count } => command.arg("p").arg(id.to_string()).arg(count.to_string()),
                Place::Work { id, token } => command.arg("w").arg(&**id).arg(&**token),
            };
        }
        let sent = time::boot_ms();
        let answer = self.partition.work.script(&scripts::HEARTBEAT, &command, self.partition.patience()).await?;
        let mut kept = vec![true; held.len()];
        for index in value::list(answer)? {
            let index = usize::try_from(value::number(index)?).unwrap_or(usize::MAX);
            if let Some(kept) = kept.get_mut(index) {
                *kept = false;
            }
        }
        let (ours, lost): (Vec<_>, Vec<_>) = held.into_iter().zip(kept).partition(|(_, kept)| *kept);
        self.hold.renew(ours.into_iter().map(|((lease, _), _)| lease), sent + self.lease);
        // Settled while the heartbeat was under way: no loss, and already removed.
        lost.into_iter().for_each(|((lease, _), _)| drop(self.hold.remove(lease)));
        Ok(())
    }
}

/// What a full server refuses must not keep the others from it, so these go in a command of their own, first.
fn needs_no_room(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Ack | Verdict::Drop)
}

/// The answers of a transaction, each of which may be an error.
fn executed(mut answers: Vec<Value>) -> Result<Vec<Value>, Failure> {
    let done = answers.pop().unwrap_or(Value::Nil);
    // The first refusal says why; EXEC would only say that there was one.
    for queued in answers {
        fault::check(queued)?;
    }
    Ok(value::list(fault::check(done)?)?)
}

/// Gives back everything of `leases`: for the end of a subscription.
pub(super) fn releases(leases: impl IntoIterator<Item = Lease>) -> Vec<Settlement> {
    leases.into_iter().map(|lease| Settlement { lease, verdict: Verdict::Release }).collect()
}
