//! Events cross in their wire form, cut by lengths: JavaScript parses payload and meta on first touch, and what it
//! only forwards comes back byte for byte.
//!
//! What JavaScript publishes comes as bytes. What it receives is a string, so it counts in UTF-16 units; as long as all
//! is ASCII, which is the usual case, these are bytes too.

use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;
use polybus_core::bus::{self, child_event, new_event};
use polybus_core::codec::{self, Layout};
use polybus_core::error::{Error, Result};
use polybus_core::event::Text;
use polybus_core::options::PublishOptions;
use polybus_core::transport::Outgoing;
use polybus_core::{Event, EventType, Meta, Pattern};
use serde_json::Value;

use crate::error::throw;
use crate::options;

/// Numbers that describe one event to publish: `[kind, type, payload, meta, options]`, lengths in bytes.
pub const DRAFT: usize = 5;
/// Kinds of [`DRAFT`]: the whole wire form as payload.
const WHOLE: f64 = 1.0;
/// Type and a payload that `JSON.stringify` has written. Every other kind: type, payload and meta, nothing of it checked.
const WRITTEN: f64 = 2.0;
/// From here on: a whole wire form as `plainWire` in `ts/event.ts` writes it, and the length of its type.
const PLAIN: f64 = 3.0;

/// How many bytes `lengths` describe.
pub fn size(lengths: &[f64]) -> usize {
    lengths.chunks_exact(DRAFT).flat_map(|numbers| &numbers[1..]).map(|length| *length as usize).sum()
}

/// Reads the events of one publish out of `texts`, which holds their parts one after the other.
pub fn drafts(texts: &[u8], lengths: &[f64], limit: usize) -> Vec<Result<(Outgoing, PublishOptions)>> {
    let mut rest = texts;
    let mut next = |length: f64| {
        let (piece, tail) = rest.split_at((length as usize).min(rest.len()));
        rest = tail;
        piece
    };
    let mut last = Last::default();
    let draft = |numbers: &[f64]| {
        let (event_type, payload) = (next(numbers[1]), next(numbers[2]));
        let (meta, schedule) = (next(numbers[3]), next(numbers[4]));
        // A copy of each payload: a slice would keep the whole batch alive for as long as one of its events.
        let event = match numbers[0] {
            WHOLE => codec::decode(&Bytes::copy_from_slice(payload), limit)?,
            WRITTEN => last.written(event_type, payload, limit)?,
            kind @ PLAIN.. => last.plain(payload, (kind - PLAIN) as usize, limit)?,
            _ => {
                let meta = (!meta.is_empty()).then_some(meta);
                new_event(text(event_type)?, Bytes::copy_from_slice(payload), meta, limit)?
            }
        };
        let options = if schedule.is_empty() { PublishOptions::default() } else { options::publish(text(schedule)?)? };
        Ok((options::outgoing(event, options), options))
    };
    lengths.chunks_exact(DRAFT).map(draft).collect()
}

/// What an event has in common with the one before it, mostly.
#[derive(Default)]
struct Last {
    event_type: Option<EventType>,
    timestamp: Option<Text>,
}

impl Last {
    fn event_type(&mut self, found: &[u8]) -> Result<EventType> {
        match &self.event_type {
            Some(last) if last.as_str().as_bytes() == found => Ok(last.clone()),
            _ => Ok(self.event_type.insert(EventType::new(text(found)?)?).clone()),
        }
    }

    fn timestamp(&mut self, found: &str) -> Text {
        match &self.timestamp {
            Some(last) if **last == *found => last.clone(),
            _ => self.timestamp.insert(found.into()).clone(),
        }
    }

    fn written(&mut self, event_type: &[u8], payload: &[u8], limit: usize) -> Result<Event> {
        let event_type = self.event_type(event_type)?;
        codec::check_written(payload, limit)?;
        Ok(Event::new(event_type, Bytes::copy_from_slice(payload), Meta::new(SystemTime::now())))
    }

    /// The parts of a wire form whose meta has one form; another one is decoded.
    fn plain(&mut self, wire: &[u8], type_length: usize, limit: usize) -> Result<Event> {
        let Some([event_type, payload, id, timestamp]) = cut(wire, type_length) else {
            return codec::decode(&Bytes::copy_from_slice(wire), limit);
        };
        let event_type = self.event_type(event_type)?;
        codec::check_written(payload, limit)?;
        let id: Text = text(id)?.into();
        let timestamp = self.timestamp(text(timestamp)?);
        let meta = Meta { correlation_id: Some(id.clone()), id, timestamp, ..Meta::default() };
        Ok(Event::new(event_type, Bytes::copy_from_slice(payload), meta))
    }
}

/// Type, payload, id and timestamp of a wire form as `plainWire` in `ts/event.ts` writes it.
fn cut(wire: &[u8], type_length: usize) -> Option<[&[u8]; 4]> {
    const ID: usize = 36;
    let (event_type, rest) = wire.strip_prefix(b"{\"type\":\"")?.split_at_checked(type_length)?;
    let rest = rest.strip_prefix(b"\",\"payload\":")?.strip_suffix(b"\"}}")?;
    let (rest, chain) = rest.split_at_checked(rest.len().checked_sub(ID)?)?;
    let rest = rest.strip_suffix(b"\",\"correlationId\":\"")?;
    let (rest, timestamp) = rest.split_at_checked(rest.len().checked_sub("2026-11-21T08:00:00.123Z".len())?)?;
    let rest = rest.strip_suffix(b"\",\"timestamp\":\"")?;
    let (rest, id) = rest.split_at_checked(rest.len().checked_sub(ID)?)?;
    let payload = rest.strip_suffix(b",\"meta\":{\"id\":\"")?;
    (chain == id).then_some([event_type, payload, id, timestamp])
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(|cause| Error::invalid_event("not UTF-8 text").caused_by(cause))
}

/// The length of valid UTF-8 in UTF-16 units: one for each character, one more for each that needs four bytes.
pub fn units(text: &[u8]) -> usize {
    text.iter().map(|byte| usize::from((*byte as i8) >= -0x40) + usize::from(*byte >= 0xf0)).sum()
}

/// `[type, payload, meta, whole]`: lengths in UTF-16 units of what [`codec::write`] wrote.
pub fn lengths(out: &[u8], layout: &Layout) -> [f64; 4] {
    let ascii = out[layout.event.clone()].is_ascii();
    let length = |range: &Range<usize>| if ascii { range.len() } else { units(&out[range.clone()]) } as f64;
    [length(&layout.event_type), length(&layout.payload), length(&layout.meta), length(&layout.event)]
}

/// An event for JavaScript where speed does not matter: `[wire, payload length, meta length]`.
pub fn value(event: &Event) -> Value {
    let mut out = Vec::with_capacity(event.payload.len() + 512);
    let layout = codec::write(&mut out, event);
    let [_, payload, meta, _] = lengths(&out, &layout);
    serde_json::json!([String::from_utf8_lossy(&out), payload, meta])
}

fn wire(event: &Event) -> Result<String> {
    let bytes = codec::encode(event)?;
    String::from_utf8(bytes).map_err(|cause| Error::invalid_event("the event is not UTF-8").caused_by(cause))
}

/// The wire form of a new event: type, payload text and meta (a JSON object, or empty) checked.
#[napi_derive::napi]
pub fn create_event(event_type: String, payload: String, meta: String) -> napi::Result<String> {
    let meta = (!meta.is_empty()).then_some(meta.as_bytes());
    new_event(&event_type, payload.into(), meta, usize::MAX).and_then(|event| wire(&event)).map_err(throw)
}

/// Ids for new events, 36 characters each, one after the other, newest first: the next is cut off the end.
#[napi_derive::napi]
pub fn new_ids(count: u32) -> String {
    let mut ids = vec![0; 36 * count as usize];
    for place in ids.rchunks_exact_mut(36) {
        place.copy_from_slice(Meta::new(SystemTime::UNIX_EPOCH).id.as_bytes()); // the time is not looked at
    }
    String::from_utf8(ids).unwrap_or_default()
}

/// The wire form of a child of the event with the wire form `parent`.
#[napi_derive::napi]
pub fn create_child(parent: String, event_type: String, payload: String, meta: String) -> napi::Result<String> {
    let child = || {
        let parent = codec::decode(&parent.into(), usize::MAX)?;
        let meta = (!meta.is_empty()).then_some(meta.as_bytes());
        wire(&child_event(&parent, &event_type, payload.into(), meta, usize::MAX)?)
    };
    child().map_err(throw)
}

/// The event with the wire form `wire` and other members of `meta` (a JSON object): `[wire form, payload length, meta
/// length]` as JSON.
#[napi_derive::napi]
pub fn with_meta(wire: String, meta: String) -> napi::Result<String> {
    let event = codec::decode(&wire.into(), usize::MAX).and_then(|event| bus::with_meta(&event, meta.as_bytes()));
    Ok(value(&event.map_err(throw)?).to_string())
}

/// Checks a wire form; `[canonical wire form, payload length, meta length]` as JSON.
#[napi_derive::napi]
pub fn decode_event(wire: String) -> napi::Result<String> {
    let event = codec::decode(&wire.into(), usize::MAX).map_err(throw)?;
    Ok(value(&event).to_string())
}

/// Whether `pattern` matches `event_type`; throws `InvalidPattern`.
#[napi_derive::napi]
pub fn matches(pattern: String, event_type: String) -> napi::Result<bool> {
    Pattern::new(&pattern).map(|pattern| pattern.matches(&event_type)).map_err(throw)
}
