//! What a group handles and has handled, by key: for idempotent subscriptions.

use std::collections::VecDeque;
use std::time::Duration;

use ahash::AHashMap;

use crate::delivery::Lease;
use crate::event::Text;
use crate::transport::Begun;

/// Handled keys that a group remembers; beyond it the oldest are forgotten.
pub(super) const MARKS: usize = 200_000;

enum Mark {
    Handling { by: Lease, since: Duration },
    Handled { until: Duration },
}

/// Where a delivery waits in its group: due time and position.
pub(super) type Place = (Duration, i64);

#[derive(Default)]
pub(super) struct Marks {
    marks: AHashMap<Text, Mark>,
    /// The deliveries that handle a key, and for how long it is to be remembered.
    holders: AHashMap<Lease, (Text, Duration)>,
    /// When handled keys are forgotten, about in that order.
    forget: VecDeque<(Duration, Text)>,
    /// Deliveries that found their key with somebody else.
    refused: AHashMap<Lease, Text>,
    /// Where they wait.
    blocked: AHashMap<Text, Vec<Place>>,
}

impl Marks {
    /// Marks `key` for the delivery that `lease` holds. `lives` says whether another one is still leased.
    pub fn begin(
        &mut self,
        lease: Lease,
        key: Text,
        keep: Duration,
        now: Duration,
        lives: impl Fn(Lease) -> bool,
    ) -> Begun {
        self.prune(now);
        match self.marks.get(&key) {
            Some(Mark::Handled { until }) if *until > now => Begun::Duplicate,
            Some(Mark::Handling { by, since }) if *by != lease && lives(*by) => {
                let begun = Begun::Busy(now.saturating_sub(*since));
                self.refused.insert(lease, key);
                begun
            }
            _ => {
                self.marks.insert(key.clone(), Mark::Handling { by: lease, since: now });
                self.holders.insert(lease, (key, keep));
                Begun::Run
            }
        }
    }

    /// The delivery has ended, handled or not. Where those wait that may go on now.
    pub fn end(&mut self, lease: Lease, handled: bool, now: Duration) -> Vec<Place> {
        if self.holders.is_empty() {
            return Vec::new(); // as in every group that is not idempotent
        }
        let Some((key, keep)) = self.holders.remove(&lease) else { return Vec::new() };
        if !matches!(self.marks.get(&key), Some(Mark::Handling { by, .. }) if *by == lease) {
            return Vec::new();
        }
        if handled {
            let until = now.saturating_add(keep);
            self.marks.insert(key.clone(), Mark::Handled { until });
            self.forget.push_back((until, key.clone()));
        } else {
            self.marks.remove(&key);
        }
        self.blocked.remove(&key).unwrap_or_default()
    }

    /// A delivery that was refused is to wait there. False when its key is free by now.
    pub fn block(&mut self, lease: Lease, place: Place) -> bool {
        let Some(key) = self.refused.remove(&lease) else { return true };
        let busy = matches!(self.marks.get(&key), Some(Mark::Handling { .. }));
        if busy {
            self.blocked.entry(key).or_default().push(place);
        }
        busy
    }

    fn prune(&mut self, now: Duration) {
        while let Some((until, _)) = self.forget.front()
            && (*until <= now || self.forget.len() > MARKS)
            && let Some((until, key)) = self.forget.pop_front()
        {
            // It may have been handled once more since.
            if matches!(self.marks.get(&key), Some(Mark::Handled { until: known }) if *known == until) {
                self.marks.remove(&key);
            }
        }
    }
}
