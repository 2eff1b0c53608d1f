//! Options of an outbox and of an inbox.

use super::Naming;
use super::reader::Reader;
use crate::error::Result;
use crate::outbox::table::INBOX;
use crate::outbox::{Inbox, Outbox, OutboxOptions};

impl OutboxOptions {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("outbox", json, naming)?;
        let base = Self::default();
        let options = Self {
            table: from.string("table")?.unwrap_or(base.table),
            service: from.string("service")?,
            max_payload_bytes: from
                .integer("max_payload_bytes", 1..=512 << 20)?
                .map_or(base.max_payload_bytes, |bytes| bytes as usize),
        };
        from.finish()?;
        Ok(options)
    }
}

impl Outbox {
    /// The outbox of these options.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        Self::new(&OutboxOptions::from_json(json, naming)?)
    }
}

impl Inbox {
    /// The inbox of these options: `table`.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("inbox", json, naming)?;
        let table = from.string("table")?;
        from.finish()?;
        Self::new(table.as_deref().unwrap_or(INBOX))
    }
}
