//! What holds deliveries back for a while: an open breaker, a batch that is not full.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Call, Dispatcher, Held};
use crate::batch::Batches;
use crate::breaker::{Breaker, Ended, Phase};
use crate::subscription::{Counters, Wish};
use crate::transport::Rest;

impl Dispatcher {
    /// One of a call's deliveries ended. Whether it was the last.
    pub(super) fn end(&self, held: &mut Held, call: Call, ended: Ended, now: Duration) -> bool {
        let (ticket, ended) = match (call.batch, &mut held.batches) {
            (Some(batch), Some(batches)) => match batches.end(batch, ended) {
                Some(whole) => whole,
                None => return false,
            },
            _ => (call.ticket, ended),
        };
        if let (Some(ticket), Some(breaker)) = (ticket, &mut held.breaker)
            && breaker.end(ticket, ended, now)
        {
            self.tell(breaker);
        }
        true
    }

    /// Lets the breaker try again when its time has come.
    pub(super) fn recover(&self, held: &mut Held) {
        if let Some(breaker) = &mut held.breaker
            && breaker.due().is_some()
            && breaker.advance(self.clock.elapsed())
        {
            self.tell(breaker);
        }
    }

    /// Says that the breaker's state changed.
    fn tell(&self, breaker: &Breaker) {
        let (label, options) = (&self.rules.label, breaker.options());
        self.counters.breaker_state.store(breaker.phase().number(), Ordering::Relaxed);
        match breaker.phase() {
            Phase::Open => {
                Counters::count(&self.counters.breaker_openings);
                log::warn!("{label}: the breaker is open, handlers fail: takes nothing for {:?}", options.recovery);
            }
            Phase::HalfOpen => log::info!("{label}: the breaker is half-open, tries {} calls", options.probes),
            Phase::Closed => log::info!("{label}: the breaker is closed, handlers work again"),
        }
    }

    /// When the loop has to look again: a job's time is up, the breaker recovers, a batch has waited long enough.
    pub(super) fn next_due(&self, held: &mut Held) -> Option<Duration> {
        let deadline = held.next_deadline();
        if held.breaker.is_none() && held.batches.is_none() {
            return deadline;
        }
        let recovery = held.breaker.as_ref().and_then(Breaker::due);
        // One that has to wait for a permit looks when a job ends.
        let free = held.batches.as_ref().filter(|batches| batches.calls() < self.rules.concurrency && held.may_begin());
        let flush = free.filter(|_| *self.wish.borrow() == Wish::Run).and_then(Batches::due);
        [deadline, recovery, flush].into_iter().flatten().min()
    }

    /// Tells the source of a test bus what only waits for the clock.
    pub(super) fn rest(&self, held: &Held) {
        if !self.clock.is_virtual() {
            return;
        }
        // Held while the source is told: who resumes the subscription meanwhile has the last word.
        let wish = self.wish.borrow();
        let open = held.breaker.as_ref().and_then(Breaker::due);
        let fills = held.buffered.front().is_none_or(|delivery| !self.is_last(delivery));
        let filling = held.batches.as_ref().filter(|_| fills).and_then(Batches::due);
        let rest = match (open, filling) {
            // There is nothing to do until somebody resumes it, who moves no clock.
            _ if *wish == Wish::Pause => Some(Rest { until: Duration::MAX, takes: false, holds: held.buffered.len() }),
            (Some(until), _) => Some(Rest { until, takes: false, holds: 0 }),
            (None, Some(until)) => Some(Rest { until, takes: true, holds: held.buffered.len() }),
            (None, None) => None,
        };
        self.source.rest(rest);
    }
}
