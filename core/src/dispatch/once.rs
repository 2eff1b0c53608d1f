//! Idempotent subscriptions: between the permit and the handler, the key of each delivery is marked in the store.

use std::time::Duration;

use super::{Dispatcher, Held};
use crate::delivery::{Body, Delivery, Verdict};
use crate::error::Result;
use crate::event::{Event, Text};
use crate::handler::Reporter;
use crate::metrics::{Origin, Status};
use crate::options::Key;
use crate::subscription::{Counters, Wish};
use crate::transport::{Begun, Settlement, Task};

/// How an idempotent subscription tells events, and for how long.
#[derive(Clone, Copy)]
pub(crate) struct Once {
    pub key: Key,
    pub keep: Duration,
}

/// What was to be marked, and what came of it.
pub(super) type Beginning = Task<(Vec<(Delivery, Text)>, Result<Vec<Begun>>)>;

impl Dispatcher {
    /// Marks the keys of what waits for its handler.
    pub(super) fn mark(&self, held: &mut Held, once: Once) -> Beginning {
        let batch = std::mem::take(&mut held.keyed);
        held.beginning = batch.len();
        let wanted = batch.iter().map(|(delivery, key)| (delivery.lease, key.clone())).collect();
        let begun = self.source.begin(wanted, once.keep);
        Box::pin(async move { (batch, begun.await) })
    }

    /// Runs what is ours now. A duplicate is absorbed, what somebody else handles waits in the store for a while.
    pub(super) fn run_marked(
        &self,
        held: &mut Held,
        batch: Vec<(Delivery, Text)>,
        begun: &[Begun],
        reporter: &Reporter,
    ) {
        let wish = *self.wish.borrow();
        let mut jobs = Vec::new();
        for ((delivery, _), begun) in batch.into_iter().zip(begun) {
            let lease = delivery.lease;
            let verdict = match (begun, delivery.body.clone()) {
                (Begun::Run, Body::Event(event)) if wish == Wish::Run && held.may_begin() => {
                    let call = held.single_call();
                    jobs.extend(self.begin(held, reporter, &delivery, event, call, self.clock.elapsed()));
                    continue;
                }
                (Begun::Run, _) => Verdict::Release,
                (Begun::Duplicate, body) => {
                    Counters::count(&self.counters.duplicates);
                    if let Body::Event(event) = &body {
                        let attempts = &self.counters.attempts;
                        attempts.change(Origin::of(event), |attempts| attempts.ended(Status::Duplicate, None));
                    }
                    log::debug!("{}: a delivery was absorbed, its key was handled before", self.rules.label);
                    Verdict::Ack
                }
                (Begun::Busy(since), _) => Verdict::Postpone { after: patience(*since, fastrand::f64()) },
            };
            held.unsettled.push(Settlement { lease, verdict });
        }
        if !jobs.is_empty() {
            self.handler.start(jobs, reporter);
        }
    }
}

/// The key of an event that is told by itself.
pub(super) fn own_key(event: &Event) -> Text {
    let meta = &event.meta;
    meta.idempotency_key.as_ref().filter(|key| !key.is_empty()).unwrap_or(&meta.id).clone()
}

/// How long a delivery waits whose key somebody else handles since `since`: longer, the longer that takes. `random` lies
/// in `0.0..1.0`.
fn patience(since: Duration, random: f64) -> Duration {
    const LEAST: Duration = Duration::from_millis(50);
    const MOST: Duration = Duration::from_secs(1);
    (since / 4).clamp(LEAST, MOST).mul_f64(0.75 + random / 2.0)
}
