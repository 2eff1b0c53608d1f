//! Handlers that take many events at once: when a batch is full, and which of its events still run. Time is an argument.
//!
//! Only the call is shared. Attempts, leases, retries and dead letters stay with each event.

use std::collections::VecDeque;
use std::time::Duration;

use ahash::AHashMap;

use crate::breaker::{Ended, Ticket};

/// How events are gathered for a handler that takes many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchOptions {
    /// Most events of one batch. Default 100.
    pub size: usize,
    /// How long the first one waits for the others. Default 50 ms.
    pub wait: Duration,
}

impl Default for BatchOptions {
    fn default() -> Self {
        Self { size: 100, wait: Duration::from_millis(50) }
    }
}

/// What waits for its batch to be full, and the batches that run.
pub(crate) struct Batches {
    options: BatchOptions,
    /// When those that wait arrived, and how many at a time: the sum is what the dispatcher has buffered.
    arrivals: VecDeque<(Duration, usize)>,
    running: AHashMap<u64, Call>,
}

/// A batch in the handler's hands.
struct Call {
    ticket: Option<Ticket>,
    left: usize,
    ended: Ended,
}

impl Batches {
    pub fn new(options: BatchOptions) -> Self {
        Self { options, arrivals: VecDeque::new(), running: AHashMap::new() }
    }

    pub fn size(&self) -> usize {
        self.options.size
    }

    /// How many batches run.
    pub fn calls(&self) -> usize {
        self.running.len()
    }

    /// Whether events of that batch still run.
    pub fn runs(&self, batch: u64) -> bool {
        self.running.contains_key(&batch)
    }

    /// So many joined the end of the queue.
    pub fn arrived(&mut self, count: usize, now: Duration) {
        if count > 0 {
            self.arrivals.push_back((now, count));
        }
    }

    /// One left the front of the queue.
    pub fn left(&mut self) {
        if let Some((_, count)) = self.arrivals.front_mut() {
            *count -= 1;
            if *count == 0 {
                self.arrivals.pop_front();
            }
        }
    }

    /// All left the queue but the first `keep`.
    pub fn keep(&mut self, keep: usize) {
        let mut room = keep;
        self.arrivals.retain_mut(|(_, count)| {
            *count = room.min(*count);
            room -= *count;
            *count > 0
        });
    }

    /// When the oldest has waited long enough.
    pub fn due(&self) -> Option<Duration> {
        self.arrivals.front().map(|(arrived, _)| arrived.saturating_add(self.options.wait))
    }

    /// Whether a batch may go out with `buffered` events in the queue.
    pub fn is_ready(&self, buffered: usize, now: Duration) -> bool {
        buffered >= self.options.size || self.due().is_some_and(|due| due <= now)
    }

    /// A batch of so many events begins.
    pub fn begin(&mut self, batch: u64, count: usize, ticket: Option<Ticket>) {
        self.running.insert(batch, Call { ticket, left: count, ended: Ended::Neither });
    }

    /// One event of a batch ended. With the last one: what the call as a whole says, one failure being enough.
    pub fn end(&mut self, batch: u64, ended: Ended) -> Option<(Option<Ticket>, Ended)> {
        let call = self.running.get_mut(&batch)?;
        call.left = call.left.saturating_sub(1);
        call.ended = match (call.ended, ended) {
            (Ended::Failed, _) | (_, Ended::Failed) => Ended::Failed,
            (Ended::Succeeded, _) | (_, Ended::Succeeded) => Ended::Succeeded,
            (Ended::Neither, Ended::Neither) => Ended::Neither,
        };
        if call.left > 0 {
            return None;
        }
        self.running.remove(&batch).map(|call| (call.ticket, call.ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn goes_out_full_or_when_the_first_has_waited() {
        let mut batches = Batches::new(BatchOptions { size: 3, wait: ms(50) });
        assert!(!batches.is_ready(0, ms(99)));
        batches.arrived(1, ms(10));
        batches.arrived(1, ms(40));
        assert!(!batches.is_ready(2, ms(59)));
        assert!(batches.is_ready(2, ms(60)), "the first has waited");
        batches.left();
        assert_eq!(batches.due(), Some(ms(90)), "the second waits from its own arrival");
        batches.arrived(2, ms(41));
        assert!(batches.is_ready(3, ms(41)), "full");
        batches.keep(2);
        batches.left();
        assert_eq!(batches.due(), Some(ms(91)));
        batches.keep(0);
        assert_eq!(batches.due(), None);
    }

    #[test]
    fn a_call_ends_with_its_last_event() {
        let mut batches = Batches::new(BatchOptions::default());
        batches.begin(7, 3, None);
        assert_eq!(batches.end(7, Ended::Succeeded), None);
        assert_eq!(batches.end(7, Ended::Failed), None);
        assert!(batches.runs(7));
        assert_eq!(batches.end(7, Ended::Neither), Some((None, Ended::Failed)));
        assert!(!batches.runs(7));
    }
}
