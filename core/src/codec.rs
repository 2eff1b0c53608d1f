//! The wire form of an event: canonical JSON, as in `docs/wire.md`.
//!
//! Limits are checked before anything is parsed. The payload is kept as the bytes it came in; members that this
//! version does not know are kept and passed on.

mod recent;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use self::recent::Member;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Aggregate, Event, EventData, Meta, Text};

/// Deepest nesting of a payload.
pub const MAX_DEPTH: usize = 64;
/// Largest payload by default, in bytes.
pub const DEFAULT_MAX_PAYLOAD: usize = 1 << 20;
/// Largest event around its payload, in bytes: type, meta and headers.
pub const MAX_ENVELOPE: usize = 64 << 10;

/// Checks that `payload` is one JSON value within the limits, without building it.
///
/// `PayloadTooLarge` above `limit` bytes; `InvalidEvent` for anything that is not JSON text or is nested too deep.
pub fn check_payload(payload: &[u8], limit: usize) -> Result<()> {
    if payload.len() > limit {
        return Err(too_large("payload", payload.len(), limit));
    }
    check_depth(payload, MAX_DEPTH)?;
    serde_json::from_slice::<IgnoredAny>(payload)
        .map_err(|cause| Error::invalid_event(format!("the payload is not JSON text: {cause}")).caused_by(cause))?;
    // IgnoredAny skips over string contents without looking at their encoding.
    std::str::from_utf8(payload)
        .map_err(|cause| Error::invalid_event("the payload is not UTF-8 text").caused_by(cause))?;
    Ok(())
}

/// As [`check_payload`] for what a JSON writer of a host has made: only its size and depth are looked at.
pub fn check_written(payload: &[u8], limit: usize) -> Result<()> {
    if payload.len() > limit {
        return Err(too_large("payload", payload.len(), limit));
    }
    check_depth(payload, MAX_DEPTH)
}

fn too_large(what: &str, size: usize, limit: usize) -> Error {
    Error::new(
        ErrorKind::PayloadTooLarge,
        format!(
            "the {what} has {size} bytes, the limit is {limit}; publish a reference to the data, or raise max_payload_bytes on every bus that reads it"
        ),
    )
}

/// One pass over the bytes: parsers, and destructors of what they build, recurse; this does not.
fn check_depth(json: &[u8], limit: usize) -> Result<()> {
    // Too few brackets to nest that deep, as in nearly every payload. Counting them, in sums that fit into a byte, lets
    // the compiler look at many bytes at once.
    let brackets = |part: &[u8]| usize::from(part.iter().map(|byte| u8::from(matches!(byte, b'[' | b'{'))).sum::<u8>());
    if json.chunks(255).map(brackets).sum::<usize>() <= limit {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                if depth > limit {
                    return Err(Error::invalid_event(format!("the payload is nested deeper than {MAX_DEPTH} levels")));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

/// Where the parts lie in an event's wire form, so that a host can cut them out without parsing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The event type, without its quotes.
    pub event_type: Range<usize>,
    /// The payload.
    pub payload: Range<usize>,
    /// The meta object.
    pub meta: Range<usize>,
    /// The whole event.
    pub event: Range<usize>,
}

/// The canonical bytes of `event`. Meta larger than [`MAX_ENVELOPE`] is `PayloadTooLarge`.
pub fn encode(event: &Event) -> Result<Vec<u8>> {
    let mut out = Vec::with_capacity(event.payload.len() + 512);
    write(&mut out, event);
    let envelope = out.len() - event.payload.len();
    if envelope > MAX_ENVELOPE {
        return Err(too_large("event's meta", envelope, MAX_ENVELOPE));
    }
    Ok(out)
}

/// Appends the canonical bytes of `event` and says where its parts are.
pub fn write(out: &mut Vec<u8>, event: &Event) -> Layout {
    let start = out.len();
    let mut object = Object::open(out);
    // An event type has no character that JSON escapes.
    object.text("type", event.event_type.as_str());
    let type_end = object.out.len() - 1;
    object.raw("payload", &event.payload);
    let payload_end = object.out.len();
    object.name("meta");
    let meta_start = object.out.len();
    encode_meta(object.out, &event.meta);
    let meta_end = object.out.len();
    for (name, value) in &event.extra {
        object.raw(name, value.get().as_bytes());
    }
    object.close();
    Layout {
        event_type: type_end - event.event_type.as_str().len()..type_end,
        payload: payload_end - event.payload.len()..payload_end,
        meta: meta_start..meta_end,
        event: start..out.len(),
    }
}

fn encode_meta(out: &mut Vec<u8>, meta: &Meta) {
    let mut object = Object::open(out);
    object.text("id", &meta.id);
    object.text("timestamp", &meta.timestamp);
    object.option("source", &meta.source);
    if let Some(version) = meta.schema_version {
        object.raw("schemaVersion", version.to_string().as_bytes());
    }
    object.option("correlationId", &meta.correlation_id);
    object.option("causationId", &meta.causation_id);
    object.option("partitionKey", &meta.partition_key);
    object.option("idempotencyKey", &meta.idempotency_key);
    object.option("resource", &meta.resource);
    object.option("resourceId", &meta.resource_id);
    object.option("userId", &meta.user_id);
    object.option("organizationId", &meta.organization_id);
    object.option("sessionId", &meta.session_id);
    object.option("instanceId", &meta.instance_id);
    if let Some(aggregate) = &meta.aggregate {
        object.raw_with("aggregate", |out| {
            let mut object = Object::open(out);
            object.text("type", &aggregate.kind);
            object.text("id", &aggregate.id);
            object.close();
        });
    }
    object.option("traceparent", &meta.traceparent);
    object.option("tracestate", &meta.tracestate);
    if !meta.headers.is_empty() {
        object.raw_with("headers", |out| {
            let mut object = Object::open(out);
            for (name, value) in &meta.headers {
                object.text(name, value);
            }
            object.close();
        });
    }
    for (name, value) in &meta.extra {
        object.raw(name, value.get().as_bytes());
    }
    object.close();
}

/// Writes one JSON object member by member. Strings are escaped by serde_json.
struct Object<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl<'a> Object<'a> {
    fn open(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, first: true }
    }

    fn name(&mut self, name: &str) {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        write_string(self.out, name);
        self.out.push(b':');
    }

    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        write_string(self.out, value);
    }

    fn option(&mut self, name: &str, value: &Option<Text>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    fn raw(&mut self, name: &str, json: &[u8]) {
        self.name(name);
        self.out.extend_from_slice(json);
    }

    fn raw_with(&mut self, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
        self.name(name);
        write(self.out);
    }

    fn close(self) {
        self.out.push(b'}');
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    // Most strings need no escape: ids, names and times are plain.
    // Without an early exit, so that the compiler can look at many bytes at once.
    if !text.bytes().fold(false, |found, b| found | (b < 0x20) | (b == b'"') | (b == b'\\')) {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    } else if serde_json::to_writer(&mut *out, text).is_err() {
        // Writing a str into a Vec cannot fail.
        out.extend_from_slice(b"\"\"");
    }
}

/// The event in `bytes`. The payload shares their memory.
///
/// `PayloadTooLarge` when the payload exceeds `limit`; `InvalidEvent` for all that is not an event.
pub fn decode(bytes: &Bytes, limit: usize) -> Result<Event> {
    if bytes.len() > limit.saturating_add(MAX_ENVELOPE) {
        return Err(too_large("event", bytes.len(), limit.saturating_add(MAX_ENVELOPE)));
    }
    check_depth(bytes, MAX_DEPTH + 2)?; // the payload sits one level deep, headers two
    // Known to be UTF-8, its texts need not be looked at one by one.
    let wire: WireEvent = std::str::from_utf8(bytes)
        .map_or_else(|_| serde_json::from_slice(bytes), serde_json::from_str)
        .map_err(|cause| Error::invalid_event(format!("not an event: {cause}")).caused_by(cause))?;
    let missing = |member: &str| Error::invalid_event(format!("not an event: {member} is missing"));
    let payload = wire.payload.ok_or_else(|| missing("payload"))?.get();
    if payload.len() > limit {
        return Err(too_large("payload", payload.len(), limit));
    }
    check_depth(payload.as_bytes(), MAX_DEPTH)?;
    let meta = wire.meta.ok_or_else(|| missing("meta"))?;
    if meta.id.is_empty() || meta.timestamp.is_empty() {
        return Err(missing(if meta.id.is_empty() { "meta.id" } else { "meta.timestamp" }));
    }
    Ok(Event::from(EventData {
        event_type: recent::event_type(&wire.event_type.ok_or_else(|| missing("type"))?)?,
        payload: bytes.slice_ref(payload.as_bytes()),
        meta,
        extra: wire.extra,
    }))
}

#[derive(Default)]
struct WireEvent<'a> {
    event_type: Option<Cow<'a, str>>,
    payload: Option<&'a RawValue>,
    meta: Option<Meta>,
    extra: Vec<(Text, Box<RawValue>)>,
}

impl<'de> Deserialize<'de> for WireEvent<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = WireEvent<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with type, payload and meta")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut event = WireEvent::default();
                while let Some(Name(name)) = map.next_key()? {
                    match &*name {
                        "type" => event.event_type = Some(map.next_value::<Name>()?.0),
                        "payload" => event.payload = Some(map.next_value()?),
                        "meta" => event.meta = Some(map.next_value::<WireMeta>()?.0),
                        _ => event.extra.push((name.into(), map.next_value()?)),
                    }
                }
                Ok(event)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// A string borrowed from the input where it has no escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Borrow)
    }
}

struct WireMeta(Meta);

impl<'de> Deserialize<'de> for WireMeta {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Meta;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with id and timestamp")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Meta, A::Error> {
                let mut meta = Meta::default();
                while let Some(Name(name)) = map.next_key()? {
                    match &*name {
                        "id" => meta.id = text(&mut map)?.unwrap_or_default(),
                        "timestamp" => meta.timestamp = shared(&mut map, Member::Timestamp)?.unwrap_or_default(),
                        "source" => meta.source = shared(&mut map, Member::Source)?,
                        "schemaVersion" => meta.schema_version = map.next_value()?,
                        "correlationId" => meta.correlation_id = chain(&mut map, &meta.id)?,
                        "causationId" => meta.causation_id = text(&mut map)?,
                        "partitionKey" => meta.partition_key = text(&mut map)?,
                        "idempotencyKey" => meta.idempotency_key = text(&mut map)?,
                        "resource" => meta.resource = text(&mut map)?,
                        "resourceId" => meta.resource_id = text(&mut map)?,
                        "userId" => meta.user_id = text(&mut map)?,
                        "organizationId" => meta.organization_id = text(&mut map)?,
                        "sessionId" => meta.session_id = text(&mut map)?,
                        "instanceId" => meta.instance_id = shared(&mut map, Member::Instance)?,
                        "aggregate" => meta.aggregate = map.next_value::<Option<WireAggregate>>()?.map(Into::into),
                        "traceparent" => meta.traceparent = text(&mut map)?,
                        "tracestate" => meta.tracestate = text(&mut map)?,
                        "headers" => meta.headers = map.next_value::<Headers>()?.0,
                        _ => meta.extra.push((name.into(), map.next_value()?)),
                    }
                }
                Ok(meta)
            }
        }
        deserializer.deserialize_map(Members).map(WireMeta)
    }
}

fn text<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Text>, A::Error> {
    Ok(map.next_value::<Option<Name>>()?.map(|Name(text)| text.into()))
}

fn shared<'de, A: MapAccess<'de>>(map: &mut A, member: Member) -> Result<Option<Text>, A::Error> {
    Ok(map.next_value::<Option<Name>>()?.map(|Name(text)| recent::text(member, text)))
}

/// The id of a chain is that of the event itself where it begins.
fn chain<'de, A: MapAccess<'de>>(map: &mut A, id: &Text) -> Result<Option<Text>, A::Error> {
    let found = map.next_value::<Option<Name>>()?;
    Ok(found.map(|Name(found)| if *found == **id { id.clone() } else { recent::text(Member::Correlation, found) }))
}

#[derive(serde::Deserialize)]
struct WireAggregate {
    r#type: String,
    id: String,
}

impl From<WireAggregate> for Aggregate {
    fn from(wire: WireAggregate) -> Self {
        Self { kind: wire.r#type.into(), id: wire.id.into() }
    }
}

struct Headers(Vec<(Text, Text)>);

impl<'de> Deserialize<'de> for Headers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Headers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Headers, A::Error> {
                let mut headers = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    headers.push((name.into(), map.next_value::<Name>()?.0.into()));
                }
                Ok(Headers(headers))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Parses members of `meta` given by a caller: the same names and rules as on the wire, unknown ones refused.
///
/// `json` is the JSON object of the members; they replace those of `base`.
pub fn apply_meta(base: Meta, json: &[u8]) -> Result<Meta> {
    check_depth(json, MAX_DEPTH)?;
    let WireMeta(given) = serde_json::from_slice(json)
        .map_err(|cause| Error::invalid_event(format!("meta is not valid: {cause}")).caused_by(cause))?;
    if let Some((name, _)) = given.extra.first() {
        return Err(Error::invalid_event(format!("unknown meta member {name:?}; put free values into headers")));
    }
    let some = |text: Text, base: Text| if text.is_empty() { base } else { text };
    Ok(Meta {
        id: some(given.id, base.id),
        timestamp: some(given.timestamp, base.timestamp),
        source: given.source.or(base.source),
        schema_version: given.schema_version.or(base.schema_version),
        correlation_id: given.correlation_id.or(base.correlation_id),
        causation_id: given.causation_id.or(base.causation_id),
        partition_key: given.partition_key.or(base.partition_key),
        idempotency_key: given.idempotency_key.or(base.idempotency_key),
        resource: given.resource.or(base.resource),
        resource_id: given.resource_id.or(base.resource_id),
        user_id: given.user_id.or(base.user_id),
        organization_id: given.organization_id.or(base.organization_id),
        session_id: given.session_id.or(base.session_id),
        instance_id: given.instance_id.or(base.instance_id),
        aggregate: given.aggregate.or(base.aggregate),
        traceparent: given.traceparent.or(base.traceparent),
        tracestate: given.tracestate.or(base.tracestate),
        headers: if given.headers.is_empty() { base.headers } else { given.headers },
        extra: base.extra,
    })
}
