//! The event: a validated type, the payload as raw bytes, and the facts around it.
//!
//! Events are immutable and cheap to clone. The payload is JSON text that the core never reparses when it only
//! forwards it: a 60-digit number arrives as it was written.

use std::cell::RefCell;
use std::ops::Deref;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// Text that is shared, never edited.
pub type Text = Arc<str>;

/// Longest event type, in bytes.
pub const MAX_TYPE_LEN: usize = 200;

/// The separators between the segments of an event type and of a pattern.
pub const SEPARATORS: [char; 3] = ['.', ':', '/'];

/// An event type: `^[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}$` without empty segments. Validated once.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EventType(Text);

impl EventType {
    /// Checks `text`; the error says which rule it breaks.
    pub fn new(text: impl AsRef<str>) -> Result<Self> {
        let text = text.as_ref();
        match Self::fault(text) {
            None => Ok(Self(text.into())),
            Some(fault) => Err(Error::invalid_event(format!(
                "event type {:?} {fault}; use segments of letters, digits, '_' and '-' joined by '.', ':' or '/', like order.created",
                Excerpt(text)
            ))),
        }
    }

    fn fault(text: &str) -> Option<&'static str> {
        let bytes = text.as_bytes();
        let allowed = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'/' | b'-');
        let separator = |b: &u8| matches!(b, b'.' | b':' | b'/');
        match bytes {
            [] => Some("is empty"),
            _ if bytes.len() > MAX_TYPE_LEN => Some("is longer than 200 characters"),
            [first, ..] if !first.is_ascii_alphanumeric() => Some("does not start with a letter or digit"),
            _ if !bytes.iter().all(allowed) => Some("contains a character that is not allowed"),
            [.., last] if separator(last) => Some("ends with a separator"),
            _ if bytes.windows(2).any(|pair| pair.iter().all(separator)) => Some("has an empty segment"),
            _ => None,
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The shared text.
    pub fn text(&self) -> &Text {
        &self.0
    }
}

impl std::fmt::Display for EventType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// At most 60 characters of untrusted text, for an error message.
pub(crate) struct Excerpt<'a>(pub &'a str);

impl std::fmt::Debug for Excerpt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.char_indices().nth(60) {
            None => write!(f, "{:?}", self.0),
            Some((end, _)) => write!(f, "{:?}… ({} bytes)", &self.0[..end], self.0.len()),
        }
    }
}

/// The thing that an event is about, as its owner names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aggregate {
    /// Kind of thing.
    pub kind: Text,
    /// Its id.
    pub id: Text,
}

/// The facts around an event, as in the wire contract. Absent members are `None`.
#[derive(Debug, Clone, Default)]
#[allow(missing_docs, reason = "the members are described once, in docs/wire.md")]
pub struct Meta {
    /// UUID v7 made by the core; kept by retries, replays and relays.
    pub id: Text,
    /// RFC 3339, UTC, milliseconds.
    pub timestamp: Text,
    pub source: Option<Text>,
    pub schema_version: Option<u32>,
    /// Id of the first event of the chain.
    pub correlation_id: Option<Text>,
    /// Id of the parent event.
    pub causation_id: Option<Text>,
    pub partition_key: Option<Text>,
    pub idempotency_key: Option<Text>,
    pub resource: Option<Text>,
    pub resource_id: Option<Text>,
    pub user_id: Option<Text>,
    pub organization_id: Option<Text>,
    pub session_id: Option<Text>,
    pub instance_id: Option<Text>,
    pub aggregate: Option<Aggregate>,
    pub traceparent: Option<Text>,
    pub tracestate: Option<Text>,
    pub headers: Vec<(Text, Text)>,
    /// Members this version does not know, kept and passed on.
    pub extra: Vec<(Text, Box<RawValue>)>,
}

impl Meta {
    /// Facts of a new event: a fresh id, the time `now`, itself as the start of its chain.
    pub fn new(now: SystemTime) -> Self {
        let id: Text = Text::from(&*uuid::Uuid::now_v7().as_hyphenated().encode_lower(&mut [0; 36]));
        Self { correlation_id: Some(id.clone()), id, timestamp: timestamp(now), ..Self::default() }
    }

    /// The partition key, by which an ordered group keeps order; an empty one is none.
    pub fn lane(&self) -> Option<&Text> {
        self.partition_key.as_ref().filter(|key| !key.is_empty())
    }
}

/// `now` as the wire writes it: `2026-11-21T08:00:00.123Z`.
pub fn timestamp(now: SystemTime) -> Text {
    thread_local! {
        /// Many events are made within a millisecond.
        static LAST: RefCell<(u128, Text)> = RefCell::new((0, "1970-01-01T00:00:00.000Z".into()));
    }
    let Ok(since) = now.duration_since(UNIX_EPOCH) else {
        return humantime::format_rfc3339_millis(now).to_string().into();
    };
    LAST.with_borrow_mut(|(millis, text)| {
        if *millis != since.as_millis() {
            *text = humantime::format_rfc3339_millis(now).to_string().into();
            *millis = since.as_millis();
        }
        text.clone()
    })
}

/// An immutable event. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Event(Arc<EventData>);

/// The parts of an [`Event`].
#[derive(Debug, Clone)]
pub struct EventData {
    /// What happened.
    pub event_type: EventType,
    /// JSON text, checked by the codec.
    pub payload: Bytes,
    /// The facts around it.
    pub meta: Meta,
    /// Top-level members this version does not know, kept and passed on.
    pub extra: Vec<(Text, Box<RawValue>)>,
}

impl Deref for Event {
    type Target = EventData;
    fn deref(&self) -> &EventData {
        &self.0
    }
}

impl From<EventData> for Event {
    fn from(data: EventData) -> Self {
        Self(Arc::new(data))
    }
}

impl Event {
    /// An event of these parts. The payload must be JSON text that [`crate::codec::check_payload`] accepted.
    pub fn new(event_type: EventType, payload: Bytes, meta: Meta) -> Self {
        EventData { event_type, payload, meta, extra: Vec::new() }.into()
    }

    /// The same event with `change` applied to its meta; `self` stays as it is.
    #[must_use]
    pub fn with_meta(&self, change: impl FnOnce(&mut Meta)) -> Self {
        let mut data = EventData::clone(&self.0);
        change(&mut data.meta);
        data.into()
    }

    /// The meta, to be changed here and in no other clone of the event: copied only if there are any.
    pub(crate) fn meta_mut(&mut self) -> &mut Meta {
        &mut Arc::make_mut(&mut self.0).meta
    }

    /// Meta for a child event: it joins the chain and keeps user, organisation, session and trace. It does not take
    /// aggregate, resource, idempotency key or partition key, which belong to this event alone.
    pub fn child_meta(&self, now: SystemTime) -> Meta {
        let parent = &self.meta;
        Meta {
            correlation_id: parent.correlation_id.clone().or_else(|| Some(parent.id.clone())),
            causation_id: Some(parent.id.clone()),
            user_id: parent.user_id.clone(),
            organization_id: parent.organization_id.clone(),
            session_id: parent.session_id.clone(),
            traceparent: parent.traceparent.clone(),
            tracestate: parent.tracestate.clone(),
            ..Meta::new(now)
        }
    }
}
