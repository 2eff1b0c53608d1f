//! Reading the server's answers, which differ a little between versions of the protocol.

use bytes::Bytes;
use redis::Value;

use super::fault::strange;
use crate::error::Result;

/// A stream id: milliseconds and a number within the millisecond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(super) struct Id(pub u64, pub u64);

impl Id {
    pub fn parse(text: &str) -> Option<Self> {
        let (ms, number) = text.split_once('-')?;
        Some(Self(ms.parse().ok()?, number.parse().ok()?))
    }

    fn read(bytes: &[u8]) -> Result<Self> {
        std::str::from_utf8(bytes).ok().and_then(Self::parse).ok_or_else(|| strange("a stream id"))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.0, self.1)
    }
}

/// One entry of a stream: its id and fields. The fields are empty when the entry was deleted.
#[derive(Debug)]
pub(super) struct Entry {
    pub id: Id,
    pub fields: Vec<(Bytes, Bytes)>,
}

impl Entry {
    pub fn take(&mut self, name: &str) -> Option<Bytes> {
        let index = self.fields.iter().position(|(field, _)| field.as_ref() == name.as_bytes())?;
        Some(self.fields.swap_remove(index).1)
    }

    pub fn text(&mut self, name: &str) -> Option<String> {
        self.take(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn number(&mut self, name: &str) -> Option<i64> {
        self.text(name)?.parse().ok()
    }
}

pub(super) fn list(value: Value) -> Result<Vec<Value>> {
    match value {
        Value::Array(values) | Value::Set(values) => Ok(values),
        Value::Map(pairs) => Ok(pairs.into_iter().flat_map(|(key, value)| [key, value]).collect()),
        Value::Nil => Ok(Vec::new()),
        _ => Err(strange("no list")),
    }
}

pub(super) fn bytes(value: Value) -> Result<Bytes> {
    match value {
        Value::BulkString(bytes) => Ok(bytes.into()),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Ok(text.into_bytes().into()),
        Value::Int(number) => Ok(number.to_string().into()),
        Value::Okay => Ok(Bytes::from_static(b"OK")),
        Value::Nil => Ok(Bytes::new()),
        _ => Err(strange("no text")),
    }
}

pub(super) fn text(value: Value) -> Result<String> {
    Ok(String::from_utf8_lossy(&bytes(value)?).into_owned())
}

pub(super) fn number(value: Value) -> Result<i64> {
    match value {
        Value::Int(number) => Ok(number),
        Value::Double(number) => Ok(number as i64),
        Value::Nil => Ok(0),
        other => text(other)?.parse().map_err(|_| strange("no number")),
    }
}

pub(super) fn id(value: Value) -> Result<Id> {
    Id::read(&bytes(value)?)
}

fn pairs(value: Value) -> Result<Vec<(Bytes, Bytes)>> {
    let mut values = list(value)?.into_iter();
    let mut pairs = Vec::with_capacity(values.len() / 2);
    while let (Some(name), Some(value)) = (values.next(), values.next()) {
        pairs.push((bytes(name)?, bytes(value)?));
    }
    Ok(pairs)
}

/// The entries of `XRANGE`.
pub(super) fn entries(value: Value) -> Result<Vec<Entry>> {
    list(value)?.into_iter().filter(|value| *value != Value::Nil).map(entry).collect()
}

fn entry(value: Value) -> Result<Entry> {
    let mut parts = list(value)?.into_iter();
    match (parts.next(), parts.next()) {
        (Some(name), Some(fields)) => Ok(Entry { id: id(name)?, fields: pairs(fields)? }),
        _ => Err(strange("no stream entry")),
    }
}

/// The rows of `XPENDING` with a range: id and delivery count.
pub(super) fn pending(value: Value) -> Result<Vec<(Id, u64)>> {
    let rows = list(value)?.into_iter().map(|row| {
        let mut row = list(row)?.into_iter();
        match (row.next(), row.nth(2)) {
            (Some(name), Some(count)) => Ok((id(name)?, number(count)?.max(1).unsigned_abs())),
            _ => Err(strange("no pending entry")),
        }
    });
    rows.collect()
}

/// An entry from its id and the list of its fields.
pub(super) fn entry_of(id: Id, fields: Value) -> Result<Entry> {
    Ok(Entry { id, fields: pairs(fields)? })
}

/// The entries of `XREAD` and `XREADGROUP` on one stream.
pub(super) fn read(value: Value) -> Result<Vec<Entry>> {
    Ok(streams(value)?.into_iter().next().map(|(_, entries)| entries).unwrap_or_default())
}

/// All streams of `XREAD`, by name.
pub(super) fn streams(value: Value) -> Result<Vec<(String, Vec<Entry>)>> {
    let streams: Vec<(Value, Value)> = match value {
        Value::Nil => Vec::new(),
        Value::Map(streams) => streams,
        Value::Array(streams) => {
            let mut pairs = Vec::new();
            for stream in streams {
                let mut parts = list(stream)?.into_iter();
                if let (Some(name), Some(found)) = (parts.next(), parts.next()) {
                    pairs.push((name, found));
                }
            }
            pairs
        }
        _ => return Err(strange("no streams")),
    };
    streams.into_iter().map(|(name, found)| Ok((text(name)?, entries(found)?))).collect()
}
