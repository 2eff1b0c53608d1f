//! A delivery: an event on its way to one group, the facts of this attempt, and the lease that lets us settle it.
//!
//! ```text
//!            take                    Ack
//!  waiting ────────► leased ─────────────────────► done
//!     ▲                │  │  DeadLetter
//!     │  Retry{after}  │  └──────────────────────► dead
//!     └────────────────┘
//!       Release, Postpone{after}, or the lease ran out
//! ```
//! Settling consumes the delivery's [`Lease`]; whoever cannot show the current token gets `LeaseLost`.

use std::time::{Duration, SystemTime};

use crate::error::ErrorKind;
use crate::event::Event;

/// The right to settle one delivery. The token changes each time the delivery is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Position of the event in the transport's log.
    pub position: i64,
    /// The fence: differs between any two takes of the same delivery.
    pub token: i64,
}

/// What the transport hands out: the event, or the bytes that could not be decoded.
#[derive(Debug, Clone)]
pub enum Body {
    /// A well-formed event.
    Event(Event),
    /// Bytes that are not an event, and why: dead-lettered at first sight.
    Undecodable {
        /// As stored.
        raw: bytes::Bytes,
        /// What the codec said.
        reason: String,
    },
}

/// An event leased to us, with the facts of this attempt, which travel beside the event and never inside it.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// The event.
    pub body: Body,
    /// The right to settle it.
    pub lease: Lease,
    /// From 1. Counts every take that was not released, so a process that dies in the handler counts too.
    pub attempt: u32,
    /// Whether somebody took this delivery before.
    pub redelivered: bool,
    /// When this process took it.
    pub received_at: SystemTime,
    /// When the first attempt failed, if one did.
    pub first_failed_at: Option<SystemTime>,
    /// Its time ran out before a handler got it: the group wants it kept as a dead letter.
    pub expired: bool,
}

/// What went wrong in a handler, kept with the dead letter. Each part is cut to 4 KiB.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failure {
    /// Class of the error.
    pub kind: String,
    /// Its message.
    pub message: String,
    /// Its stack or traceback.
    pub stack: String,
    /// Which of ours it is, if it is one; told to whoever made a request, not kept with dead letters.
    pub code: Option<ErrorKind>,
}

/// The most that is kept of each part of a [`Failure`].
pub const MAX_FAILURE_TEXT: usize = 4096;

impl Failure {
    /// A failure with its parts cut to [`MAX_FAILURE_TEXT`] bytes at a character boundary.
    pub fn new(kind: impl Into<String>, message: impl Into<String>, stack: impl Into<String>) -> Self {
        Self { kind: cut(kind.into()), message: cut(message.into()), stack: cut(stack.into()), code: None }
    }

    /// The same, as an error of ours.
    #[must_use]
    pub fn coded(self, code: Option<ErrorKind>) -> Self {
        Self { code, ..self }
    }
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_FAILURE_TEXT {
        let end = (0..=MAX_FAILURE_TEXT - 3).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Why a delivery became a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadReason {
    /// The retry policy gave up.
    Exhausted,
    /// The handler refused it.
    Rejected,
    /// The bytes are not an event.
    Undecodable,
    /// The payload does not fit its schema.
    Schema,
    /// It was taken more often than the policy allows and nobody reported an outcome: it kills its process.
    Poison,
    /// Its time ran out before a handler got it.
    Expired,
}

impl DeadReason {
    /// Every reason.
    pub const ALL: [Self; 6] =
        [Self::Exhausted, Self::Rejected, Self::Undecodable, Self::Schema, Self::Poison, Self::Expired];

    /// The word that all languages and stores use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Rejected => "rejected",
            Self::Undecodable => "undecodable",
            Self::Schema => "schema",
            Self::Poison => "poison",
            Self::Expired => "expired",
        }
    }

    /// The reason named by `word`.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == word)
    }
}

/// What becomes of a delivery. Made in [`crate::dispatch`] and nowhere else.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Handled.
    Ack,
    /// Try again after this delay; counts as an attempt.
    Retry {
        /// From now, by the transport's clock.
        after: Duration,
        /// What went wrong.
        failure: Failure,
    },
    /// Keep it for a person to look at.
    DeadLetter {
        /// Why.
        reason: DeadReason,
        /// What went wrong.
        failure: Failure,
    },
    /// Hand it back at once; the attempt does not count.
    Release,
    /// Hand it back for later; the attempt does not count.
    Postpone {
        /// From now, by the transport's clock.
        after: Duration,
    },
    /// Not handled, and not kept: gone as after `Ack`, but nobody may take it for handled.
    Drop,
}
