//! Options of a relay.

use std::time::Duration;

use super::Naming;
use super::reader::Reader;
use crate::error::Result;
use crate::outbox::relay::RelayOptions;

impl RelayOptions {
    /// Reads a JSON object. `InvalidConfig` names the option, what is wrong and the nearest known word.
    pub fn from_json(json: &str, naming: Naming) -> Result<Self> {
        let mut from = Reader::new("relay", json, naming)?;
        let base = Self::default();
        let options = Self {
            table: from.string("table")?.unwrap_or(base.table),
            batch: from.integer("batch", 1..=10_000)?.map_or(base.batch, |n| n as usize),
            workers: from.integer("workers", 1..=64)?.map_or(base.workers, |n| n as usize),
            lease: from.duration("lease_ms", Duration::from_secs(1))?.unwrap_or(base.lease),
            poll_interval: from.duration("poll_interval_ms", Duration::from_millis(1))?.unwrap_or(base.poll_interval),
            listen: from.boolean("listen")?.unwrap_or(base.listen),
            listen_url: from.string("listen_url")?,
            retry: from.retry("retry")?.unwrap_or(base.retry),
            probe: None,
        };
        from.finish()?;
        Ok(options)
    }
}
