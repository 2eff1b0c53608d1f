//! The handle of a running dispatcher.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use tokio::sync::watch;

use crate::breaker::Phase;
use crate::event::Text;
use crate::metrics::{Attempts, Ledger};
use crate::pattern::Pattern;
use crate::transport::Source;

/// What the holder wants of the dispatcher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Take and handle.
    Run,
    /// Handle what runs, take nothing, hand back what is buffered.
    Pause,
    /// Take nothing, hand back what is buffered, let running handlers end until the deadline, then cancel them and
    /// hand their leases back.
    Drain(tokio::time::Instant),
}

/// Counts since the subscription began, in this process.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Counters {
    pub completed: AtomicU64,
    pub failed: AtomicU64,
    pub retried: AtomicU64,
    pub dead_lettered: AtomicU64,
    pub dropped: AtomicU64,
    pub released: AtomicU64,
    pub timed_out: AtomicU64,
    /// Deliveries whose key was handled before, in an idempotent subscription.
    pub duplicates: AtomicU64,
    pub leases_lost: AtomicU64,
    pub running: AtomicU64,
    pub buffered: AtomicU64,
    /// Sum of handler times, in microseconds.
    pub busy_micros: AtomicU64,
    /// Attempts by event type and source.
    pub(crate) attempts: Ledger<Attempts>,
    /// Where the breaker stands, as a [`Phase`] number.
    pub breaker_state: AtomicU64,
    pub breaker_openings: AtomicU64,
}

impl Counters {
    /// Adds one.
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A running subscription. Cheap to clone; dropping it does not end the subscription.
#[derive(Clone)]
pub struct Subscription {
    pub(crate) facts: Arc<Facts>,
    pub(crate) wish: watch::Sender<Wish>,
    /// Becomes true when the dispatcher has ended and its source is closed.
    pub(crate) ended: watch::Receiver<bool>,
}

pub(crate) struct Facts {
    pub name: Text,
    pub group: Text,
    pub pattern: Pattern,
    pub counters: Arc<Counters>,
    pub broadcast: bool,
    pub breaker: bool,
    /// Of a test bus, which waits for a subscription from the moment it is resumed.
    pub source: OnceLock<Weak<dyn Source>>,
}

impl Subscription {
    /// Its name, unique on its bus.
    pub fn name(&self) -> &Text {
        &self.facts.name
    }

    /// Its durable group.
    pub fn group(&self) -> &Text {
        &self.facts.group
    }

    /// Its pattern, as written.
    pub fn pattern(&self) -> &str {
        self.facts.pattern.as_str()
    }

    /// What it did in this process.
    pub fn counters(&self) -> &Counters {
        &self.facts.counters
    }

    /// Starts nothing more until [`Subscription::resume`]; running handlers go on, what waits here is handed back.
    pub fn pause(&self) {
        self.change(|wish| matches!(wish, Wish::Run), Wish::Pause);
    }

    /// Takes again.
    pub fn resume(&self) {
        self.change(|wish| matches!(wish, Wish::Pause), Wish::Run);
    }

    fn change(&self, when: impl Fn(&Wish) -> bool, to: Wish) {
        self.wish.send_if_modified(|wish| {
            let change = when(wish);
            if change {
                *wish = to;
                if let (Wish::Run, Some(source)) = (to, self.facts.source.get().and_then(Weak::upgrade)) {
                    source.rest(None);
                }
            }
            change
        });
    }

    /// Stops taking, lets running handlers end for up to `timeout`, cancels the rest and hands their leases back
    /// without counting the attempt. The durable group stays. A second call may shorten the deadline, never extend it.
    pub async fn drain(&self, timeout: Duration) {
        let deadline = tokio::time::Instant::now() + timeout;
        self.wish.send_if_modified(|wish| {
            let sooner = !matches!(wish, Wish::Drain(at) if *at <= deadline);
            if sooner {
                *wish = Wish::Drain(deadline);
            }
            sooner
        });
        let mut ended = self.ended.clone();
        drop(ended.wait_for(|ended| *ended).await); // an error means that the dispatcher is gone: also ended
    }

    /// Whether it is a broadcast, which has no group on the store.
    pub fn is_broadcast(&self) -> bool {
        self.facts.broadcast
    }

    /// Where its breaker stands; `None` if it has none.
    pub fn breaker(&self) -> Option<Phase> {
        self.facts.breaker.then(|| Phase::of(self.facts.counters.breaker_state.load(Ordering::Relaxed)))
    }

    /// Whether it has ended.
    pub fn is_ended(&self) -> bool {
        *self.ended.borrow()
    }
}
