//! Dead letters: what no handler could finish, kept with the reason until somebody replays or purges it.

use std::time::SystemTime;

use bytes::Bytes;

use crate::delivery::{DeadReason, Failure};
use crate::event::{Event, Text};
use crate::pattern::Pattern;

/// One dead letter.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Names this record; opaque, ordered by age within one store.
    pub id: Text,
    /// The event; `None` when its bytes could not be decoded.
    pub event: Option<Event>,
    /// The event's bytes as stored.
    pub raw: Bytes,
    /// What went wrong last.
    pub error: Failure,
    /// Attempts that were made.
    pub attempts: u32,
    /// When the first attempt failed.
    pub first_failed_at: SystemTime,
    /// When the last attempt failed.
    pub last_failed_at: SystemTime,
    /// Name of the subscription.
    pub subscription: Text,
    /// Its group.
    pub group: Text,
    /// Why it is here.
    pub reason: DeadReason,
    /// The dead letter that this event was replayed from, if it was.
    pub replayed_from: Option<Text>,
}

/// Which dead letters a call is about. Empty means all of them.
#[derive(Debug, Clone, Default)]
pub struct DeadLetterFilter {
    /// Only this record.
    pub id: Option<Text>,
    /// Only of this group.
    pub group: Option<Text>,
    /// Only events whose type matches. Undecodable ones never match.
    pub pattern: Option<Pattern>,
    /// Only those that failed last at this time or later.
    pub since: Option<SystemTime>,
    /// Only those that failed last before this time.
    pub before: Option<SystemTime>,
}

impl DeadLetterFilter {
    /// Whether `letter` is one of them.
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        self.id.as_ref().is_none_or(|id| *id == letter.id)
            && self.group.as_ref().is_none_or(|group| *group == letter.group)
            && self.since.is_none_or(|since| letter.last_failed_at >= since)
            && self.before.is_none_or(|before| letter.last_failed_at < before)
            && self.pattern.as_ref().is_none_or(|pattern| {
                letter.event.as_ref().is_some_and(|event| pattern.matches(event.event_type.as_str()))
            })
    }
}
