//! Pages of the log, and replay.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use napi_derive::napi;
use polybus_core::delivery::DeadReason;
use polybus_core::error::Result;
use polybus_core::history::{HistoryEntry, Record, ReplayResult};
use polybus_core::options::{HistoryQuery, Naming, ReplayOptions};
use polybus_core::{Bus, Replay};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::bridge::Shared;
use crate::error::throw;
use crate::event;
use crate::options;

/// Reads the options of a page.
pub fn query(json: &str) -> Result<HistoryQuery> {
    HistoryQuery::from_json(&options::snake(json)?, Naming::TypeScript)
}

/// A page as JSON text.
pub async fn page(bus: Bus, query: HistoryQuery) -> Result<String> {
    Ok(Value::from_iter(bus.history(query).await?.iter().map(entry)).to_string())
}

fn entry(found: &HistoryEntry) -> Value {
    let hex = |raw: &bytes::Bytes| raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    json!({
        "event": found.event.as_ref().map(event::value),
        "raw": found.raw.as_ref().map(hex),
        "position": &*found.position,
        "publishedAt": millis(found.published_at),
        "records": found.records.as_ref().map(|records| records.iter().map(record).collect::<Vec<_>>()),
    })
}

fn record(found: &Record) -> Value {
    json!({
        "group": &*found.group,
        "status": found.status.as_str(),
        "attempts": found.attempts,
        "firstFailedAt": found.first_failed_at.map(millis),
        "lastFailedAt": found.last_failed_at.map(millis),
        "retryAt": found.retry_at.map(millis),
        "completedAt": found.completed_at.map(millis),
        "error": found.error.as_ref().map(|error| {
            json!({"type": error.kind, "message": error.message, "stack": error.stack})
        }),
        "deadLetter": found.dead_letter.as_deref(),
        "reason": found.reason.map(DeadReason::as_str),
    })
}

fn millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// A replay under way.
#[napi]
pub struct NativeReplay {
    replay: Arc<Mutex<Replay>>,
    bridge: Arc<Shared>,
}

impl NativeReplay {
    /// Reads the options.
    pub fn of(bus: Bus, bridge: Arc<Shared>, json: &str) -> napi::Result<Self> {
        let read = || Replay::new(bus, ReplayOptions::from_json(&options::snake(json)?, Naming::TypeScript)?);
        Ok(Self { replay: Arc::new(Mutex::new(read().map_err(throw)?)), bridge })
    }
}

#[napi]
impl NativeReplay {
    /// The next batch: `{count, skipped, position, done}`, or `null` after the last.
    #[napi]
    pub fn next(&self, key: u32) -> napi::Result<Option<String>> {
        let replay = self.replay.clone();
        self.bridge.start(key, async move {
            let result = replay.lock().await.next().await?;
            let value = result.map(|ReplayResult { count, skipped, position, done }| {
                json!({"count": count, "skipped": skipped, "position": position.as_deref(), "done": done})
            });
            Ok(value.unwrap_or_default().to_string())
        })
    }
}
