//! Counts by event type and source, with a bound on how many there can be.

use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;

use crate::event::{Event, Text};

/// Pairs of source and type that one ledger tells apart. Further ones are counted under [`OTHER`], so that event types made of
/// ids cannot fill the memory of this process or of the server that scrapes it.
pub(crate) const MAX_SERIES: usize = 500;

/// Source and type of what found no room.
pub(crate) const OTHER: &str = "other";

/// Upper bounds of the histogram of handler times, in seconds. The last bucket, without a bound, is not listed.
pub(crate) const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Completed,
    Retried,
    DeadLettered,
    Dropped,
    Released,
    /// Absorbed by an idempotent subscription.
    Duplicate,
}

impl Status {
    pub const ALL: [Self; 6] =
        [Self::Completed, Self::Retried, Self::DeadLettered, Self::Dropped, Self::Released, Self::Duplicate];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Retried => "retried",
            Self::DeadLettered => "dead_lettered",
            Self::Dropped => "dropped",
            Self::Released => "released",
            Self::Duplicate => "duplicate",
        }
    }
}

/// Who made an event, and its type.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Origin {
    pub source: Text,
    pub event_type: Text,
}

impl Origin {
    /// Of this event.
    pub fn of(event: &Event) -> Self {
        let source = event.meta.source.clone().unwrap_or_else(|| "".into());
        Self { source, event_type: event.event_type.text().clone() }
    }

    /// How many events have each origin; neighbours, mostly alike, are counted together.
    pub fn tally<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<(Self, u64)> {
        let mut tally: Vec<(Self, u64)> = Vec::new();
        for event in events {
            let same = |origin: &Self| {
                origin.event_type == *event.event_type.text()
                    && event.meta.source.as_ref().is_some_and(|source| *source == origin.source)
            };
            match tally.last_mut() {
                Some((origin, count)) if same(origin) => *count += 1,
                _ => tally.push((Self::of(event), 1)),
            }
        }
        tally
    }
}

/// Something counted by origin.
#[derive(Debug)]
pub(crate) struct Ledger<V>(Mutex<AHashMap<Origin, V>>);

impl<V> Default for Ledger<V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<V: Default + Clone> Ledger<V> {
    /// Changes the entry of one origin.
    pub fn change(&self, origin: Origin, change: impl FnOnce(&mut V)) {
        let mut entries = self.lock();
        let full = entries.len() >= MAX_SERIES;
        let origin = match full && !entries.contains_key(&origin) {
            true => Origin { source: OTHER.into(), event_type: OTHER.into() },
            false => origin,
        };
        change(entries.entry(origin).or_default());
    }

    /// Everything, in order of source and type.
    pub fn entries(&self) -> Vec<(Origin, V)> {
        let mut entries: Vec<_> = self.lock().iter().map(|(origin, value)| (origin.clone(), value.clone())).collect();
        entries.sort_by(|(a, _), (b, _)| (&a.source, &a.event_type).cmp(&(&b.source, &b.event_type)));
        entries
    }

    fn lock(&self) -> MutexGuard<'_, AHashMap<Origin, V>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The attempts of one origin in one subscription.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attempts {
    /// By [`Status`].
    pub ended: [u64; Status::ALL.len()],
    /// Handler times by bucket of [`BOUNDS`]; the last bucket has no bound.
    pub buckets: [u64; BOUNDS.len() + 1],
    /// Sum of the handler times.
    pub busy: Duration,
}

impl Attempts {
    /// Adds one that ended. `busy` is how long its handler ran, if it did.
    pub fn ended(&mut self, status: Status, busy: Option<Duration>) {
        self.ended[status as usize] += 1;
        if let Some(busy) = busy {
            let seconds = busy.as_secs_f64();
            self.buckets[BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len())] += 1;
            self.busy += busy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(event_type: &str) -> Event {
        crate::bus::new_event(event_type, "1".into(), Some(br#"{"source":"shop"}"#), 100).unwrap()
    }

    #[test]
    fn types_without_end_are_counted_as_other() {
        let ledger = Ledger::<u64>::default();
        for number in 0..MAX_SERIES + 10 {
            let events = [event(&format!("n.{number}")), event("n.0")];
            for (origin, more) in Origin::tally(&events) {
                ledger.change(origin, |count| *count += more);
            }
        }
        let entries = ledger.entries();
        assert_eq!(entries.len(), MAX_SERIES + 1);
        let count = |of: &str| entries.iter().find(|(origin, _)| &*origin.event_type == of).unwrap().1;
        assert_eq!((count("other"), count("n.0"), count("n.1")), (10, MAX_SERIES as u64 + 11, 1));
        assert_eq!(entries.iter().map(|(_, count)| count).sum::<u64>(), 2 * (MAX_SERIES as u64 + 10));
    }

    #[test]
    fn a_time_falls_into_the_first_bucket_that_holds_it() {
        let mut attempts = Attempts::default();
        for millis in [1, 2, 30_000, 30_001] {
            attempts.ended(Status::Completed, Some(Duration::from_millis(millis)));
        }
        attempts.ended(Status::DeadLettered, None);
        assert_eq!(attempts.buckets, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!((attempts.ended, attempts.busy), ([4, 0, 1, 0, 0, 0], Duration::from_millis(60_004)));
    }
}
