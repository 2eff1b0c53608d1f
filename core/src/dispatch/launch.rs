//! From the buffer into the handler, one by one or in batches.

use std::time::Duration;

use super::once::own_key;
use super::{Call, Dispatcher, Held, Running};
use crate::batch::Batches;
use crate::breaker::Breaker;
use crate::delivery::{Body, DeadReason, Delivery, Failure};
use crate::event::Event;
use crate::handler::{Job, Outcome, Reporter};
use crate::metrics::{Origin, Status};
use crate::options::Key;
use crate::subscription::Wish;

/// A delivery whose process died is tried at least this often, however few retries the policy allows, before it is
/// taken for poison.
const POISON_ATTEMPTS: u32 = 3;

impl Dispatcher {
    pub(super) fn buffer(&self, held: &mut Held, deliveries: Vec<Delivery>) {
        if let Some(batches) = &mut held.batches {
            batches.arrived(deliveries.len(), self.clock.elapsed());
            held.wary = deliveries.iter().any(|delivery| self.is_last(delivery));
        }
        held.buffered.extend(deliveries);
    }

    /// How many deliveries more the source may give us.
    pub(super) fn room(&self, held: &Held) -> usize {
        let size = held.batches.as_ref().map_or(1, Batches::size);
        let ours = held.permits() + held.buffered.len() + held.settling + held.unsettled.len();
        if held.wary {
            return usize::from(ours == 0).min(self.admitted(held, Wish::Run));
        }
        let room = (self.rules.concurrency * size + self.rules.prefetch).saturating_sub(ours);
        room.min(self.admitted(held, Wish::Run).saturating_sub(held.buffered.len()))
    }

    /// How many deliveries may wait here: all, unless the breaker or the holder of the subscription stopped us. What a
    /// broadcast has taken nobody else can give it again: it waits.
    pub(super) fn admitted(&self, held: &Held, wish: Wish) -> usize {
        match (wish, &held.breaker) {
            (Wish::Run, None) => usize::MAX,
            (Wish::Run, Some(breaker)) => breaker.free().saturating_mul(held.batches.as_ref().map_or(1, Batches::size)),
            (Wish::Pause, _) if self.rules.broadcast => usize::MAX,
            (Wish::Pause | Wish::Drain(_), _) => 0,
        }
    }

    /// Moves buffered deliveries into the handler while there are permits.
    pub(super) fn launch(&self, held: &mut Held, reporter: &Reporter) {
        let now = self.clock.elapsed();
        if held.batches.is_some() {
            return self.launch_batches(held, reporter, now);
        }
        let mut jobs = Vec::new();
        while held.permits() < self.rules.concurrency && held.may_begin() {
            let Some(delivery) = held.buffered.pop_front() else { break };
            let Some(event) = self.admit(held, &delivery) else { continue };
            match self.rules.once.map(|once| once.key) {
                None => {
                    let call = held.single_call();
                    jobs.extend(self.begin(held, reporter, &delivery, event, call, now));
                }
                Some(Key::Event) => held.keyed.push((delivery, own_key(&event))),
                Some(Key::Handler) => jobs.push(self.ask(held, delivery, event, now)),
            }
        }
        if !jobs.is_empty() {
            self.handler.start(jobs, reporter);
        }
    }

    /// Whether a handler of batches gets this delivery alone.
    pub(super) fn is_last(&self, delivery: &Delivery) -> bool {
        delivery.attempt > 1 && delivery.attempt >= self.rules.retry.max_attempts()
    }

    /// As [`Dispatcher::launch`], many in one call. The last attempt of an event is a batch of its own, and nothing else is
    /// here meanwhile: what fails its batch, or ends its process, buries only itself.
    fn launch_batches(&self, held: &mut Held, reporter: &Reporter, now: Duration) {
        let alone = |delivery: &Delivery| self.is_last(delivery);
        loop {
            let last = held.buffered.front().is_some_and(alone);
            if last {
                // What is given back must be stored first: the process may not get to it any more.
                self.hand_back(held, 1);
                if held.permits() + held.settling + held.unsettled.len() > 0 {
                    return;
                }
            }
            let Some(batches) = &held.batches else { return };
            let ready = last || batches.is_ready(held.buffered.len(), now);
            if !ready || batches.calls() >= self.rules.concurrency || !held.may_begin() {
                return;
            }
            let size = batches.size();
            let mut batch: Vec<(Delivery, Event)> = Vec::new();
            while batch.len() < size
                && let Some(next) = held.buffered.front()
                && (batch.is_empty() || !alone(next))
                && let Some(delivery) = held.next_buffered()
            {
                let last = alone(&delivery);
                batch.extend(self.admit(held, &delivery).map(|event| (delivery, event)));
                if last {
                    break;
                }
            }
            if batch.is_empty() {
                continue;
            }
            let ticket = held.breaker.as_mut().map(Breaker::begin);
            let call = Call { ticket, batch: Some(held.next_id + 1) };
            if let (Some(batches), Some(number)) = (&mut held.batches, call.batch) {
                batches.begin(number, batch.len(), ticket);
            }
            let begin = |(delivery, event)| self.begin(held, reporter, &delivery, event, call, now);
            let jobs: Vec<_> = batch.into_iter().filter_map(begin).collect();
            if !jobs.is_empty() {
                self.handler.start_batch(jobs, reporter);
            }
        }
    }

    /// The event, if a handler may see it; otherwise the delivery is settled.
    fn admit(&self, held: &mut Held, delivery: &Delivery) -> Option<Event> {
        let (reason, failure) = match &delivery.body {
            Body::Undecodable { reason, .. } => {
                (DeadReason::Undecodable, Failure::new("InvalidEvent", reason.as_str(), ""))
            }
            Body::Event(_) if delivery.expired => {
                (DeadReason::Expired, Failure::new("Expired", "its time ran out before a handler got it", ""))
            }
            Body::Event(event) if delivery.attempt > self.rules.retry.max_attempts().max(POISON_ATTEMPTS) => {
                let attempts = &self.counters.attempts;
                attempts.change(Origin::of(event), |attempts| attempts.ended(Status::DeadLettered, None));
                let message = format!("taken {} times and never finished: it ends its process", delivery.attempt - 1);
                (DeadReason::Poison, Failure::new("Poison", message, ""))
            }
            Body::Event(event) => return Some(event.clone()),
        };
        held.unsettled.push(self.dead(delivery.lease, reason, failure));
        None
    }

    /// The job of a delivery that begins to run.
    pub(super) fn begin(
        &self,
        held: &mut Held,
        reporter: &Reporter,
        delivery: &Delivery,
        event: Event,
        call: Call,
        now: Duration,
    ) -> Option<Job> {
        held.next_id += 1;
        let id = held.next_id;
        let running = Running {
            lease: delivery.lease,
            attempt: delivery.attempt,
            event: event.clone(),
            started: now,
            call,
            asked: None,
        };
        held.running.insert(id, running);
        if self.faults.as_ref().is_some_and(|faults| faults.take_failure(&event)) {
            let failure = Failure::new("InjectedFault", "fail_next of the test kit", "");
            reporter.report([(id, Outcome::Failed(failure))]);
            return None;
        }
        if let Some(timeout) = self.rules.timeout {
            held.deadlines.push_back((now + timeout, id));
        }
        Some(Job::new(id, event, delivery))
    }

    /// The job that only asks for the key of an event; the attempt number 0 says so.
    fn ask(&self, held: &mut Held, delivery: Delivery, event: Event, now: Duration) -> Job {
        held.next_id += 1;
        let id = held.next_id;
        let job = Job { attempt: 0, ..Job::new(id, event.clone(), &delivery) };
        let call = Call { ticket: None, batch: None };
        let (lease, attempt) = (delivery.lease, delivery.attempt);
        let asked = Some(Box::new(delivery));
        held.running.insert(id, Running { lease, attempt, event, started: now, call, asked });
        if let Some(timeout) = self.rules.timeout {
            held.deadlines.push_back((now + timeout, id));
        }
        job
    }
}

impl Held {
    /// A call for one delivery.
    pub(super) fn single_call(&mut self) -> Call {
        Call { ticket: self.breaker.as_mut().map(Breaker::begin), batch: None }
    }

    /// Whether the breaker lets another call begin.
    pub(super) fn may_begin(&self) -> bool {
        self.breaker.as_ref().is_none_or(|breaker| breaker.free() > 0)
    }

    pub(super) fn next_buffered(&mut self) -> Option<Delivery> {
        let next = self.buffered.pop_front()?;
        if let Some(batches) = &mut self.batches {
            batches.left();
        }
        Some(next)
    }
}
