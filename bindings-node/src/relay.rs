//! The relay. Its results cross as JSON text; `ts/outbox/relay.ts` reads them, and answers the core's questions.

use std::sync::Arc;
use std::time::Duration;

use napi_derive::napi;
use polybus_core::error::Result;
use polybus_core::options::Naming;
use polybus_core::outbox::relay::host::{Desk, Question, Reply};
use polybus_core::outbox::relay::{Answer, DeadRow, Decision, Relay, RelayBatch, RelayOptions, RelayStats};
use polybus_core::outbox::{Dialect, Param, Style};
use polybus_core::{Error, ErrorKind};
use serde_json::{Value, json};

use crate::bridge::Shared;
use crate::bus::NativeBus;
use crate::error::{text, throw};
use crate::options;

/// A relay of the core, and where it asks TypeScript.
#[napi]
pub struct NativeRelay {
    relay: Relay,
    desk: Arc<Desk>,
    bridge: Arc<Shared>,
}

impl NativeRelay {
    fn start<F>(&self, key: u32, operation: impl FnOnce(Relay) -> F) -> napi::Result<Option<String>>
    where
        F: Future<Output = Result<String>> + Send + 'static,
    {
        self.bridge.start(key, operation(self.relay.clone()))
    }
}

fn batch(done: &RelayBatch) -> String {
    json!({
        "attempted": done.attempted,
        "relayed": done.relayed,
        "publishFailed": done.publish_failed,
        "ackFailed": done.ack_failed,
        "ownershipMismatches": done.ownership_mismatches,
        "malformed": done.malformed,
        "deadLettered": done.dead_lettered,
        "returned": done.returned,
        "outage": done.outage,
    })
    .to_string()
}

fn stats(stats: &RelayStats) -> String {
    json!({
        "pending": stats.pending,
        "claimed": stats.claimed,
        "retrying": stats.retrying,
        "dead": stats.dead,
        "oldestMs": stats.oldest.map(|age| age.as_millis() as u64),
    })
    .to_string()
}

fn dead(row: &DeadRow) -> Value {
    json!({
        "seq": row.seq,
        "eventId": row.event_id,
        "type": row.event_type,
        "raw": row.event,
        "partitionKey": row.partition_key,
        "attempts": row.attempts,
        "lastError": row.last_error,
        "createdAt": row.created_at_ms,
        "deadAt": row.dead_at_ms,
    })
}

#[napi]
impl NativeRelay {
    /// An empty `url` means that TypeScript runs the statements, in this dialect and with these placeholders.
    #[napi(constructor)]
    pub fn new(
        url: String,
        dialect: String,
        style: String,
        bus: &NativeBus,
        policy: bool,
        options: String,
    ) -> napi::Result<Self> {
        let desk = Desk::new();
        let made = || -> Result<Relay> {
            let options = RelayOptions::from_json(&options::snake(&options)?, Naming::TypeScript)?;
            let (retry, to) = (options.retry.clone(), Arc::new(bus.core().clone()));
            let relay = match url.as_str() {
                "" => Relay::through(desk.executor(Dialect::parse(&dialect)?, Style::parse(&style)?), to, options)?,
                url => Relay::new(url, to, options)?,
            };
            Ok(if policy { relay.with_policy(desk.policy(retry)) } else { relay })
        };
        Ok(Self { relay: made().map_err(throw)?, desk: desk.clone(), bridge: bus.shared() })
    }

    /// Without the password; `null` if TypeScript runs the statements.
    #[napi(getter)]
    pub fn database(&self) -> Option<String> {
        self.relay.database().map(str::to_owned)
    }

    #[napi]
    pub fn check(&self, key: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move { relay.check().await.map(|()| String::new()) })
    }

    #[napi]
    pub fn relay_batch(&self, key: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move { relay.relay_batch().await.map(|done| batch(&done)) })
    }

    #[napi]
    pub fn run(&self, key: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move { relay.run().await.map(|()| String::new()) })
    }

    #[napi]
    pub fn stop(&self) {
        self.relay.stop();
    }

    #[napi]
    pub fn wake(&self) {
        self.relay.wake();
    }

    #[napi]
    pub fn stats(&self, key: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move { relay.stats().await.map(|found| stats(&found)) })
    }

    #[napi]
    pub fn metrics(&self, key: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move { Ok(relay.metrics().await) })
    }

    #[napi]
    pub fn health(&self) -> String {
        let health = self.relay.health();
        json!({
            "healthy": health.healthy,
            "workers": health.workers,
            "database": health.database,
            "bus": health.bus,
            "lastLookMs": health.last_look.map(|age| age.as_millis() as u64),
        })
        .to_string()
    }

    #[napi]
    pub fn dead_letters(&self, key: u32, after: i64, limit: u32) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move {
            Ok(Value::from_iter(relay.dead_letters(after, limit as usize).await?.iter().map(dead)).to_string())
        })
    }

    /// An empty id means all of them.
    #[napi]
    pub fn replay(&self, key: u32, event_id: String) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move {
            let id = Some(&*event_id).filter(|id| !id.is_empty());
            relay.replay(id).await.map(|count| count.to_string())
        })
    }

    #[napi]
    pub fn purge(&self, key: u32, older_than_ms: f64) -> napi::Result<Option<String>> {
        let age = Duration::from_secs_f64((older_than_ms / 1000.0).clamp(0.0, 1e10));
        self.start(key, |relay| async move { relay.purge(age).await.map(|count| count.to_string()) })
    }

    /// An empty id means all of them.
    #[napi]
    pub fn purge_dead(&self, key: u32, event_id: String) -> napi::Result<Option<String>> {
        self.start(key, |relay| async move {
            let id = Some(&*event_id).filter(|id| !id.is_empty());
            relay.purge_dead(id).await.map(|count| count.to_string())
        })
    }

    /// The next question: `{id, sql, params}` or `{id, attempts, error}`, or `null` when there will be none.
    #[napi]
    pub fn next_question(&self, key: u32) -> napi::Result<Option<String>> {
        let desk = self.desk.clone();
        self.bridge.start(key, async move {
            let value = |param: &Param| match param {
                Param::Null => Value::Null,
                // The lowest numbers are no numbers of JavaScript; every database reads them as text just as well.
                Param::Integer(number) if number.unsigned_abs() > 1 << 53 => Value::from(number.to_string()),
                Param::Integer(number) => Value::from(*number),
                Param::Text(text) => Value::from(text.as_str()),
            };
            Ok(match desk.next().await {
                None | Some((_, Question::End)) => Value::Null,
                Some((id, Question::Run(statement))) => {
                    json!({"id": id, "sql": statement.sql, "params": statement.params.iter().map(value).collect::<Vec<_>>()})
                }
                Some((id, Question::Decide(failed))) => {
                    json!({"id": id, "attempts": failed.attempts, "error": text(&failed.error)})
                }
            }
            .to_string())
        })
    }

    /// What a statement gave: a list of rows, each a list of integers, texts and nulls.
    #[napi]
    pub fn answer_rows(&self, id: u32, rows: String, affected: f64) {
        let cell = |value: Value| match value {
            Value::Null => Param::Null,
            Value::Bool(flag) => Param::Integer(i64::from(flag)),
            Value::String(text) => Param::Text(text),
            other => other.as_i64().map_or_else(|| Param::Text(other.to_string()), Param::Integer),
        };
        let reply = match serde_json::from_str::<Vec<Vec<Value>>>(&rows) {
            Ok(rows) => {
                let rows = rows.into_iter().map(|row| row.into_iter().map(cell).collect()).collect();
                Reply::Ran(Answer { affected: affected.max(0.0) as u64, rows })
            }
            Err(cause) => Reply::Failed(Error::invalid_config(format!("an executor gives a list of rows: {cause}"))),
        };
        self.desk.answer(u64::from(id), reply);
    }

    /// What becomes of a row: another attempt after so long, or, below zero, none.
    #[napi]
    pub fn answer_decision(&self, id: u32, retry_ms: f64) {
        let decision = match retry_ms {
            wait if wait >= 0.0 => Decision::Retry(Duration::from_secs_f64((wait / 1000.0).min(1e9))),
            _ => Decision::DeadLetter,
        };
        self.desk.answer(u64::from(id), Reply::Decided(decision));
    }

    /// Whoever was asked failed.
    #[napi]
    pub fn answer_error(&self, id: u32, retryable: bool, message: String) {
        let kind = if retryable { ErrorKind::ConnectionFailed } else { ErrorKind::InvalidConfig };
        self.desk.answer(u64::from(id), Reply::Failed(Error::new(kind, message)));
    }

    /// Ends `nextQuestion`, after what was asked.
    #[napi]
    pub fn dismiss(&self) {
        self.desk.dismiss();
    }
}
