//! Events cross in their wire form, cut by lengths: JavaScript parses payload and meta on first touch, and what it
//! only forwards comes back byte for byte.
//!
//! JavaScript counts UTF-16 units. As long as all is ASCII, which is the usual case, these are bytes.

use std::ops::Range;

use bytes::Bytes;
use polybus_core::bus::{child_event, new_event};
use polybus_core::codec::{self, Layout};
use polybus_core::error::{Error, Result};
use polybus_core::options::PublishOptions;
use polybus_core::transport::Outgoing;
use polybus_core::{Event, Pattern};
use serde_json::Value;

use crate::error::throw;
use crate::options;

/// Numbers that describe one event to publish: `[kind, type, payload, meta, options]`, lengths in UTF-16 units.
pub const DRAFT: usize = 5;
/// Kinds of [`DRAFT`]: type, payload, meta; or the whole wire form as payload.
const WHOLE: f64 = 1.0;

/// Reads the events of one publish out of `blob`, which holds their texts one after the other.
///
/// The inner result is the caller's event that is not valid.
pub fn drafts(blob: String, lengths: &[f64], limit: usize) -> Vec<Result<(Outgoing, PublishOptions)>> {
    let mut rest = blob.as_str();
    let ascii = blob.is_ascii();
    let mut next = |units: f64| {
        let (piece, tail) = rest.split_at(bytes_of(rest, units as usize, ascii));
        rest = tail;
        piece
    };
    let draft = |numbers: &[f64]| {
        let [kind, event_type, payload, meta, schedule] = numbers else { unreachable!("chunks of DRAFT") };
        let (event_type, payload) = (next(*event_type), next(*payload));
        let (meta, schedule) = (next(*meta), next(*schedule));
        let payload = Bytes::copy_from_slice(payload.as_bytes());
        let event = match *kind {
            WHOLE => codec::decode(&payload, limit)?,
            _ => new_event(event_type, payload, (!meta.is_empty()).then_some(meta.as_bytes()), limit)?,
        };
        let options = if schedule.is_empty() { PublishOptions::default() } else { options::publish(schedule)? };
        Ok((options::outgoing(event, options), options))
    };
    lengths.chunks_exact(DRAFT).map(draft).collect()
}

fn bytes_of(text: &str, units: usize, ascii: bool) -> usize {
    if ascii {
        return units.min(text.len());
    }
    let mut left = units;
    let mut chars = text.char_indices();
    while left > 0 {
        let Some((_, c)) = chars.next() else { return text.len() };
        left = left.saturating_sub(c.len_utf16());
    }
    chars.next().map_or(text.len(), |(at, _)| at)
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
