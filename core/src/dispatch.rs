//! The life of a delivery: take → permit → (key) → handler with deadline → policy → settle.
//!
//! One task for each subscription owns all of its state; the handler reports from anywhere. This is the only place
//! that makes a verdict.

mod gate;
mod launch;
#[cfg(test)]
mod tests;
mod once;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ahash::AHashMap;
use tokio::sync::watch;

pub(crate) use self::once::Once;
use self::once::{Beginning, own_key};
use crate::batch::{BatchOptions, Batches};
use crate::breaker::{Breaker, BreakerOptions, Ended, Ticket};
use crate::clock::Clock;
use crate::delivery::{DeadReason, Delivery, Failure, Lease, Verdict};
use crate::error::{ErrorKind, Result};
use crate::event::{Event, Text};
use crate::handler::{CancelReason, Handler, Outcome, Reporter};
use crate::metrics::{Origin, Status};
use crate::retry::{Jitter, RetryPolicy};
use crate::subscription::{Counters, Wish};
use crate::testkit::Faults;
use crate::transport::{Settlement, Source, Task};

/// Back-off of the loop itself when the transport fails.
const RECONNECT: RetryPolicy = RetryPolicy {
    max_retries: u32::MAX,
    initial_delay: Duration::from_millis(100),
    max_delay: Duration::from_secs(5),
    factor: 2.0,
    jitter: Jitter::Full,
};

/// What decides about deliveries. Plain data.
#[derive(Clone)]
pub(crate) struct Rules {
    pub label: String,
    pub concurrency: usize,
    pub prefetch: usize,
    pub retry: RetryPolicy,
    pub timeout: Option<Duration>,
    /// Keep what cannot be handled; otherwise it is logged, counted and dropped.
    pub dead_letter: bool,
    /// Nothing is settled, so nothing is retried.
    pub broadcast: bool,
    pub lease: Duration,
    pub breaker: Option<BreakerOptions>,
    pub batch: Option<BatchOptions>,
    /// Events of one key are handled once.
    pub once: Option<Once>,
}

pub(crate) struct Dispatcher {
    pub source: Arc<dyn Source>,
    pub handler: Arc<dyn Handler>,
    pub rules: Rules,
    pub clock: Clock,
    pub faults: Option<Arc<Faults>>,
    pub counters: Arc<Counters>,
    pub wish: watch::Receiver<Wish>,
}

/// A delivery in the handler's hands.
struct Running {
    lease: Lease,
    attempt: u32,
    event: Event,
    started: Duration,
    call: Call,
    /// Only asked for its key: what is to be run afterwards.
    asked: Option<Box<Delivery>>,
}

/// The call of the handler that a delivery is part of.
#[derive(Clone, Copy)]
struct Call {
    ticket: Option<Ticket>,
    /// Several deliveries may share it.
    batch: Option<u64>,
}

/// What the loop holds between turns.
#[derive(Default)]
struct Held {
    next_id: u64,
    buffered: VecDeque<Delivery>,
    running: AHashMap<u64, Running>,
    /// In order of start; entries of ended jobs are skipped.
    deadlines: VecDeque<(Duration, u64)>,
    unsettled: Vec<Settlement>,
    /// Of an idempotent subscription: with a permit and a key, and not yet marked in the store.
    keyed: Vec<(Delivery, Text)>,
    /// How many are being marked.
    beginning: usize,
    /// How many of a settle are on their way.
    settling: usize,
    breaker: Option<Breaker>,
    batches: Option<Batches>,
    /// What was taken last has to run alone: one at a time, so that nothing goes down with it if it ends its process.
    wary: bool,
}

type Settling = Task<(Vec<Settlement>, Result<Vec<Lease>>)>;

impl Dispatcher {
    /// Runs until drained, then closes the source.
    pub async fn run(mut self) {
        let reporter = Reporter::default();
        let mut held = Held {
            breaker: self.rules.breaker.clone().map(Breaker::new),
            batches: self.rules.batch.clone().map(Batches::new),
            ..Held::default()
        };
        let mut taking: Option<Task<Result<Vec<Delivery>>>> = None;
        let mut settling: Option<Settling> = None;
        let mut beginning: Option<Beginning> = None;
        let mut checking: Option<Task<Result<Vec<Lease>>>> = None;
        let mut resume_at = None; // set while the transport fails
        let mut failures = 0;
        let check_every = self.rules.lease / 2;
        let mut next_check = tokio::time::Instant::now() + check_every;

        loop {
            let wish = *self.wish.borrow_and_update();
            self.recover(&mut held);
            let admitted = self.admitted(&held, wish);
            if held.buffered.len() > admitted || (admitted == 0 && !held.keyed.is_empty()) {
                self.hand_back(&mut held, admitted); // also what a take that was under way has brought
            }
            if let Wish::Drain(deadline) = wish {
                if tokio::time::Instant::now() >= deadline {
                    self.abandon(&mut held, CancelReason::Closing);
                }
                let idle = held.running.is_empty() && held.unsettled.is_empty();
                if idle && settling.is_none() && beginning.is_none() {
                    break;
                }
            }
            if wish == Wish::Run {
                self.launch(&mut held, &reporter);
            }
            self.publish_gauges(&held);
            self.rest(&held);
            let room = self.room(&held);
            if taking.is_none() && room > 0 && wish == Wish::Run && resume_at.is_none() {
                taking = Some(self.source.take(room));
            }
            if settling.is_none() && !held.unsettled.is_empty() && resume_at.is_none() {
                settling = Some(self.settle(&mut held));
            }
            if let Some(once) = self.rules.once
                && beginning.is_none()
                && !held.keyed.is_empty()
                && resume_at.is_none()
            {
                beginning = Some(self.mark(&mut held, once));
            }
            let draining = matches!(wish, Wish::Drain(_));

            tokio::select! {
                biased;
                outcomes = reporter.next() => for (id, outcome) in outcomes {
                    self.judge(&mut held, id, outcome);
                },
                (batch, settled) = maybe(&mut settling) => {
                    settling = None;
                    held.settling = 0;
                    match settled {
                        Ok(lost) => { failures = 0; self.count_lost(lost.len()); }
                        // The verdicts stay ours until they are stored or the lease is lost: nothing is forgotten.
                        Err(error) if error.kind() == ErrorKind::BusClosed => {}
                        Err(error) if draining => log::warn!("{}: not settled before close, will be redelivered: {error}", self.rules.label),
                        Err(error) => {
                            held.unsettled.splice(0..0, left(batch, &error));
                            resume_at = Some(self.back_off(&mut failures, "settle", &error));
                        }
                    }
                },
                (batch, begun) = maybe(&mut beginning) => {
                    beginning = None;
                    held.beginning = 0;
                    match begun {
                        Ok(begun) => {
                            failures = 0;
                            self.run_marked(&mut held, batch, &begun, &reporter);
                        }
                        Err(error) if error.kind() == ErrorKind::BusClosed => {}
                        Err(error) => {
                            held.keyed.splice(0..0, batch);
                            resume_at = Some(self.back_off(&mut failures, "begin", &error));
                        }
                    }
                },
                taken = maybe(&mut taking) => {
                    taking = None;
                    match taken {
                        Ok(deliveries) => { failures = 0; self.buffer(&mut held, deliveries); }
                        Err(error) if error.kind() == ErrorKind::BusClosed => break,
                        Err(error) => resume_at = Some(self.back_off(&mut failures, "take", &error)),
                    }
                },
                lost = maybe(&mut checking) => {
                    checking = None;
                    if let Ok(lost) = lost {
                        self.forget(&mut held, &lost);
                    }
                },
                () = until(self.next_due(&mut held), |due| self.clock.sleep_until(due)) => self.expire(&mut held),
                () = tokio::time::sleep_until(next_check) => {
                    next_check = tokio::time::Instant::now() + check_every;
                    if checking.is_none() && !held.running.is_empty() {
                        let leases = held.running.values().map(|running| running.lease).collect();
                        checking = Some(self.source.heartbeat(leases));
                    }
                },
                () = until(resume_at, tokio::time::sleep_until) => resume_at = None,
                () = until(wish.deadline(), tokio::time::sleep_until), if !held.running.is_empty() => {},
                changed = self.wish.changed() => if changed.is_err() { break },
            }
        }
        self.abandon(&mut held, CancelReason::Closing);
        self.source.close().await;
        self.publish_gauges(&Held::default());
    }

    /// Turns what the handler said into a verdict. Late reports of jobs that were timed out or lost are ignored.
    fn judge(&self, held: &mut Held, id: u64, outcome: Outcome) {
        let Some(Running { lease, attempt, event, started, call, asked }) = held.running.remove(&id) else { return };
        if let (Some(delivery), Outcome::Key(key)) = (asked, &outcome) {
            held.keyed.push((*delivery, key.clone().filter(|key| !key.is_empty()).unwrap_or_else(|| own_key(&event))));
            return;
        }
        let now = self.clock.elapsed();
        let ended = match &outcome {
            Outcome::Done | Outcome::Replied(_) => Ended::Succeeded,
            Outcome::Failed(_) | Outcome::RetryAfter(..) | Outcome::Key(_) => Ended::Failed,
            Outcome::Rejected(_) | Outcome::Abandoned => Ended::Neither,
        };
        let busy = now.saturating_sub(started);
        if self.end(held, call, ended, now) {
            self.counters.busy_micros.fetch_add(busy.as_micros() as u64, Ordering::Relaxed);
        }
        let done = matches!(outcome, Outcome::Done | Outcome::Replied(_));
        let settlement = match outcome {
            Outcome::Done | Outcome::Replied(_) => {
                Counters::count(&self.counters.completed);
                Settlement { lease, verdict: Verdict::Ack }
            }
            Outcome::Abandoned => {
                Counters::count(&self.counters.released);
                Settlement { lease, verdict: Verdict::Release }
            }
            Outcome::Key(_) => {
                let failure =
                    Failure::new("InvalidHandler", "the handler told a key where it was to handle an event", "");
                self.again(lease, attempt, None, failure, &event)
            }
            Outcome::Rejected(failure) => self.dead(lease, DeadReason::Rejected, failure),
            Outcome::Failed(failure) => self.again(lease, attempt, None, failure, &event),
            Outcome::RetryAfter(after, failure) => self.again(lease, attempt, Some(after), failure, &event),
        };
        let status = match settlement.verdict {
            Verdict::Ack if done => Status::Completed,
            Verdict::Ack | Verdict::Drop => Status::Dropped,
            Verdict::Retry { .. } => Status::Retried,
            Verdict::DeadLetter { .. } => Status::DeadLettered,
            Verdict::Release | Verdict::Postpone { .. } => Status::Released,
        };
        self.counters.attempts.change(Origin::of(&event), |attempts| attempts.ended(status, Some(busy)));
        held.unsettled.push(settlement);
    }

    /// Another attempt if the policy has one left, else a dead letter. `after` overrules the policy's delay.
    fn again(
        &self,
        lease: Lease,
        attempt: u32,
        after: Option<Duration>,
        failure: Failure,
        event: &Event,
    ) -> Settlement {
        Counters::count(&self.counters.failed);
        log::debug!(
            "{}: attempt {attempt} of {} {} failed: {}",
            self.rules.label,
            event.event_type,
            event.meta.id,
            failure.kind
        );
        if self.rules.broadcast {
            log::warn!(
                "{}: {} {} failed ({}); broadcast is not retried",
                self.rules.label,
                event.event_type,
                event.meta.id,
                failure.kind
            );
            return Settlement { lease, verdict: Verdict::Ack };
        }
        match self.rules.retry.delay(attempt, fastrand::f64()) {
            Some(delay) => {
                Counters::count(&self.counters.retried);
                Settlement { lease, verdict: Verdict::Retry { after: after.unwrap_or(delay), failure } }
            }
            None => self.dead(lease, DeadReason::Exhausted, failure),
        }
    }

    fn dead(&self, lease: Lease, reason: DeadReason, failure: Failure) -> Settlement {
        let label = &self.rules.label;
        if self.rules.dead_letter && !self.rules.broadcast {
            Counters::count(&self.counters.dead_lettered);
            log::warn!("{label}: dead letter ({}): {}: {}", reason.as_str(), failure.kind, failure.message);
            return Settlement { lease, verdict: Verdict::DeadLetter { reason, failure } };
        }
        Counters::count(&self.counters.dropped);
        log::warn!(
            "{label}: dropped ({}), dead letters are off: {}: {}",
            reason.as_str(),
            failure.kind,
            failure.message
        );
        Settlement { lease, verdict: Verdict::Drop }
    }

    /// Ends the jobs whose time is up: the policy decides at once, the handler is asked to stop.
    fn expire(&self, held: &mut Held) {
        let now = self.clock.elapsed();
        let mut late = Vec::new();
        while let Some((due, id)) = held.deadlines.front().copied() {
            let running = held.running.contains_key(&id);
            if running && due > now {
                break;
            }
            held.deadlines.pop_front();
            if running {
                late.push(id);
            }
        }
        for id in &late {
            Counters::count(&self.counters.timed_out);
            let timeout = self.rules.timeout.unwrap_or_default();
            let failure = Failure::new("HandlerTimeout", format!("the handler ran longer than {timeout:?}"), "");
            self.judge(held, *id, Outcome::Failed(failure));
        }
        if !late.is_empty() {
            self.handler.cancel(&late, CancelReason::Timeout);
        }
    }

    /// Hands back what no handler has seen, but the first `keep`.
    fn hand_back(&self, held: &mut Held, keep: usize) {
        if let Some(batches) = &mut held.batches {
            batches.keep(keep);
        }
        let keyed = if keep == 0 { std::mem::take(&mut held.keyed) } else { Vec::new() };
        let back =
            held.buffered.drain(keep.min(held.buffered.len())..).chain(keyed.into_iter().map(|(delivery, _)| delivery));
        held.unsettled.extend(back.map(|delivery| Settlement { lease: delivery.lease, verdict: Verdict::Release }));
    }

    /// Stops all running jobs and hands their leases back; the attempt does not count.
    fn abandon(&self, held: &mut Held, reason: CancelReason) {
        let ids: Vec<u64> = held.running.keys().copied().collect();
        for id in &ids {
            self.judge(held, *id, Outcome::Abandoned);
        }
        if !ids.is_empty() {
            self.handler.cancel(&ids, reason);
        }
    }

    /// Stops the jobs whose lease somebody else has: their outcome would be refused.
    fn forget(&self, held: &mut Held, lost: &[Lease]) {
        if lost.is_empty() {
            return;
        }
        // Those of jobs that ended meanwhile are settled, or their verdict tells.
        let ids: Vec<u64> =
            held.running.iter().filter(|(_, running)| lost.contains(&running.lease)).map(|(id, _)| *id).collect();
        self.count_lost(ids.len());
        let now = self.clock.elapsed();
        let ended = ids.iter().filter_map(|id| held.running.remove(id).map(|running| (*id, running.call)));
        let ended: Vec<_> = ended.collect();
        for (_, call) in &ended {
            self.end(held, *call, Ended::Neither, now);
        }
        // A batch goes on for those of its events that are still ours.
        let goes_on = |batch| held.batches.as_ref().is_some_and(|batches| batches.runs(batch));
        let ids: Vec<_> =
            ended.iter().filter(|(_, call)| !call.batch.is_some_and(goes_on)).map(|(id, _)| *id).collect();
        if !ids.is_empty() {
            self.handler.cancel(&ids, CancelReason::LeaseLost);
        }
    }

    fn count_lost(&self, lost: usize) {
        if lost > 0 {
            self.counters.leases_lost.fetch_add(lost as u64, Ordering::Relaxed);
            log::warn!("{}: {lost} leases were lost; other processes handle these deliveries again", self.rules.label);
        }
    }

    fn settle(&self, held: &mut Held) -> Settling {
        let batch = std::mem::take(&mut held.unsettled);
        held.settling = batch.len();
        let settled = self.source.settle(batch.clone());
        Box::pin(async move { (batch, settled.await) })
    }

    fn back_off(&self, failures: &mut u32, step: &str, error: &crate::Error) -> tokio::time::Instant {
        *failures = failures.saturating_add(1);
        let delay = RECONNECT.delay(*failures, fastrand::f64()).unwrap_or(RECONNECT.max_delay);
        log::warn!("{}: {step} failed, again in {delay:.1?}: {error}", self.rules.label);
        tokio::time::Instant::now() + delay
    }

    fn publish_gauges(&self, held: &Held) {
        self.counters.running.store(held.running.len() as u64, Ordering::Relaxed);
        self.counters.buffered.store(held.buffered.len() as u64, Ordering::Relaxed);
    }
}

impl Held {
    /// How many of the permits are taken.
    fn permits(&self) -> usize {
        self.running.len() + self.keyed.len() + self.beginning
    }

    /// The next deadline of a job that still runs.
    fn next_deadline(&mut self) -> Option<Duration> {
        while let Some((due, id)) = self.deadlines.front() {
            if self.running.contains_key(id) {
                return Some(*due);
            }
            self.deadlines.pop_front();
        }
        None
    }
}

impl Wish {
    fn deadline(self) -> Option<tokio::time::Instant> {
        match self {
            Self::Drain(at) => Some(at),
            _ => None,
        }
    }
}

/// What of `batch` has to be settled again after `error`.
fn left(batch: Vec<Settlement>, error: &crate::Error) -> Vec<Settlement> {
    if error.failures().is_empty() {
        return batch;
    }
    error.failures().iter().filter_map(|(index, _)| batch.get(*index).cloned()).collect()
}

/// The task's result, or never.
async fn maybe<T>(task: &mut Option<Task<T>>) -> T {
    match task {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

/// Waits for `due`, or for ever.
async fn until<D, F: Future<Output = ()>>(due: Option<D>, sleep: impl FnOnce(D) -> F) {
    match due {
        Some(due) => sleep(due).await,
        None => std::future::pending().await,
    }
}
