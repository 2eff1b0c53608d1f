//! The log as it can be read and handed out again: pages of events, what became of each in every group, and replay.

use std::time::SystemTime;

use bytes::Bytes;

use crate::delivery::{DeadReason, Failure};
use crate::error::{Error, Result};
use crate::event::{Event, Text};
use crate::pattern::Pattern;

/// Which events of the log a call is about. Empty means all that are kept.
#[derive(Debug, Clone, Default)]
pub struct HistoryFilter {
    /// Only events whose type matches.
    pub pattern: Option<Pattern>,
    /// Only those published at this time or later, by the store's clock.
    pub since: Option<SystemTime>,
    /// Only those published before this time.
    pub until: Option<SystemTime>,
}

impl HistoryFilter {
    /// Whether an event of this type is one of them, whenever it was published.
    pub fn wants(&self, event_type: &str) -> bool {
        self.pattern.as_ref().is_none_or(|pattern| pattern.matches(event_type))
    }

    /// `InvalidConfig` for a time that ends before it begins: nothing could ever match, so it is a mistake.
    pub fn check(&self) -> Result<()> {
        match (self.since, self.until) {
            (Some(since), Some(until)) if since > until => {
                Err(Error::invalid_config("since is after until; give the earlier time as since"))
            }
            _ => Ok(()),
        }
    }
}

/// One event of the log.
#[derive(Debug, Clone)]
pub struct HistoryEntry {
    /// The event; `None` when its bytes cannot be decoded. Nothing is left out, so that a page is what the log is.
    pub event: Option<Event>,
    /// The bytes as stored, when they are no event.
    pub raw: Option<Bytes>,
    /// Where it stands in the log, as in the receipt of its publish.
    pub position: Text,
    /// When it entered the log, by the store's clock.
    pub published_at: SystemTime,
    /// What each group did with it; `None` when nobody asked.
    pub records: Option<Vec<Record>>,
}

/// How far one group is with one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not in a handler yet, or given back.
    Pending,
    /// Leased: in a handler, or held for one.
    Processing,
    /// The group has gone past it and holds nothing of it any more.
    Completed,
    /// The last attempt failed: it waits for the next one, or is a dead letter.
    Failed,
}

impl Status {
    /// The word that all languages use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Processing => "processing",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

/// What one group did with one event, from what the store keeps anyway; `None` is what it does not keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The group.
    pub group: Text,
    /// How far it is.
    pub status: Status,
    /// Attempts that were begun, this one included.
    pub attempts: Option<u32>,
    /// When the first attempt failed.
    pub first_failed_at: Option<SystemTime>,
    /// When the last attempt failed.
    pub last_failed_at: Option<SystemTime>,
    /// When the next attempt is due: a failed one that waits.
    pub retry_at: Option<SystemTime>,
    /// When it was done. No store keeps that today.
    pub completed_at: Option<SystemTime>,
    /// What went wrong last.
    pub error: Option<Failure>,
    /// The dead letter: a failed one that does not come again by itself.
    pub dead_letter: Option<Text>,
    /// Why it is a dead letter.
    pub reason: Option<DeadReason>,
}

impl Record {
    /// With nothing known but the status.
    pub fn new(group: Text, status: Status) -> Self {
        Self {
            group,
            status,
            attempts: None,
            first_failed_at: None,
            last_failed_at: None,
            retry_at: None,
            completed_at: None,
            error: None,
            dead_letter: None,
            reason: None,
        }
    }
}

/// What one step of a replay covers.
#[derive(Debug, Clone)]
pub struct ReplayStep {
    /// The only group that gets the events.
    pub group: Text,
    /// Which events.
    pub filter: HistoryFilter,
    /// Only those after this position.
    pub after: Option<Text>,
    /// What the first step said of the end: what the group is given later is not replayed.
    pub end: Option<Text>,
    /// Most events to hand out.
    pub max: usize,
}

/// What one step of a replay did, all of it or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayBatch {
    /// Events handed to the group.
    pub handed: u64,
    /// Events left alone because the group has them to do already.
    pub skipped: u64,
    /// Up to where the log was looked at; `None` when there was nothing to look at.
    pub position: Option<Text>,
    /// Up to where the replay goes; the transport's own notation.
    pub end: Text,
    /// The end was reached.
    pub done: bool,
}

/// How far a replay is: what its progress callback and its result say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplayResult {
    /// Events handed to the group so far.
    pub count: u64,
    /// Events left alone because the group had them to do already.
    pub skipped: u64,
    /// Up to where the log was looked at: `after` of a replay that goes on from here.
    pub position: Option<Text>,
    /// Nothing is left; false when the limit ended it.
    pub done: bool,
}

/// A position that is not of this log.
pub(crate) fn bad_position(position: &str) -> Error {
    Error::invalid_config(format!(
        "after={position:?} is not a position of this bus; take one from history(), a receipt or a replay"
    ))
}

/// No group of that name, with the nearest that there is.
pub(crate) fn no_group<'a>(group: &str, known: impl IntoIterator<Item = &'a str>) -> Error {
    let mut known: Vec<&str> = known.into_iter().collect();
    known.sort_unstable();
    let hint = match crate::error::nearest(group, known.iter().copied()) {
        Some(near) => format!("did you mean {near:?}?"),
        None if known.is_empty() => "it has none yet; subscribe first".to_owned(),
        None => format!("it has {}", known.iter().take(20).copied().collect::<Vec<_>>().join(", ")),
    };
    Error::not_found(format!("there is no group {group:?} on this bus; {hint}"))
}
