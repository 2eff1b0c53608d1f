//! Statements of the outbox and the inbox. TypeScript's adapters run them on the transaction that the user hands in.
//!
//! Statements cross as JSON text: `{"sql", "params"}`, with named parameters never asked for.

use std::time::Duration;

use bytes::Bytes;
use napi_derive::napi;
use polybus_core::codec;
use polybus_core::error::Result;
use polybus_core::options::Naming;
use polybus_core::outbox::table::{INBOX_RIGHTS, OUTBOX_RIGHTS, RELAY_RIGHTS};
use polybus_core::outbox::{Change, Dialect, Entry, Inbox, Outbox, Param, Statement, Style};
use serde_json::{Value, json};

use crate::error::{text, throw};
use crate::options;

fn sql(statement: &Statement) -> Value {
    let value = |param: &Param| match param {
        Param::Null => Value::Null,
        Param::Integer(number) => Value::from(*number),
        Param::Text(text) => Value::from(text.as_str()),
    };
    json!({"sql": statement.sql, "params": statement.params.iter().map(value).collect::<Vec<_>>()})
}

fn counted(change: &Change) -> String {
    json!({"statement": sql(&change.statement), "confirm": change.confirm.as_ref().map(sql)}).to_string()
}

/// An empty dialect means the usual one of the style.
fn spoken(dialect: &str, style: &str) -> Result<(Dialect, Style)> {
    let style = Style::parse(style)?;
    Ok((if dialect.is_empty() { style.usual_dialect() } else { Dialect::parse(dialect)? }, style))
}

/// Renders what stores events in one outbox table.
#[napi]
pub struct NativeOutbox(Outbox);

#[napi]
impl NativeOutbox {
    /// Reads the options.
    #[napi(constructor)]
    pub fn new(json: String) -> napi::Result<Self> {
        let read = || Outbox::from_json(&options::snake(&json)?, Naming::TypeScript);
        read().map(Self).map_err(throw)
    }

    /// Statements that store the events with these wire forms: `[{statement, confirm, ids}]`. An empty `dedupe_key`
    /// means that of each event.
    #[napi]
    pub fn insert(
        &self,
        dialect: String,
        style: String,
        wires: Vec<String>,
        dedupe_key: String,
    ) -> napi::Result<String> {
        let render = || {
            let (dialect, style) = spoken(&dialect, &style)?;
            let decode = |wire: String| codec::decode(&Bytes::from(wire), usize::MAX).map(Entry::from);
            let mut entries = wires.into_iter().map(decode).collect::<Result<Vec<_>>>()?;
            if let [entry] = &mut entries[..] {
                entry.dedupe_key =
                    Some(&*dedupe_key).filter(|key| !key.is_empty()).map(Into::into).or(entry.dedupe_key.take());
            }
            let inserts = self.0.insert(dialect, style, entries)?;
            let insert = inserts.iter().map(|insert| {
                json!({
                    "statement": sql(&insert.statement),
                    "confirm": insert.confirm.as_ref().map(sql),
                    "ids": insert.ids().iter().map(|id| &**id).collect::<Vec<_>>(),
                })
            });
            Ok(Value::from_iter(insert).to_string())
        };
        render().map_err(throw)
    }

    /// The text that stores one `row`, and returns nothing; empty for MySQL.
    #[napi]
    pub fn one(&self, dialect: String, style: String) -> napi::Result<String> {
        let (dialect, style) = spoken(&dialect, &style).map_err(throw)?;
        Ok(self.0.one(dialect, style).unwrap_or_default())
    }

    /// What the text of `one` stores: the event with this wire form.
    #[napi]
    pub fn row(&self, wire: String, dedupe_key: String) -> napi::Result<Vec<Option<String>>> {
        let row = || {
            let mut entry = Entry::from(codec::decode(&Bytes::from(wire), usize::MAX)?);
            if !dedupe_key.is_empty() {
                entry.dedupe_key = Some((&*dedupe_key).into());
            }
            Ok(self.0.row(entry)?.values().map(|value| value.map(str::to_owned)).into())
        };
        row().map_err(throw)
    }

    /// What tells relays that listen that rows were committed; nothing if they were told a moment ago. PostgreSQL only.
    #[napi]
    pub fn wake(&self, style: String, now: f64) -> napi::Result<Option<String>> {
        let style = Style::parse(&style).map_err(throw)?;
        Ok(self.0.wake(style, now as i64).map(|statement| sql(&statement).to_string()))
    }

    /// Statements that make the table.
    #[napi]
    pub fn ddl(&self, dialect: String) -> napi::Result<Vec<String>> {
        Dialect::parse(&dialect).map(|dialect| self.0.table().outbox_ddl(dialect)).map_err(throw)
    }

    /// What fails if and only if the table cannot be used, `{sql, params}`.
    #[napi]
    pub fn check(&self, dialect: String, style: String) -> napi::Result<String> {
        let (dialect, style) = spoken(&dialect, &style).map_err(throw)?;
        Ok(sql(&self.0.table().outbox_check(dialect, style)).to_string())
    }

    /// The error for a table that cannot be used, as `ts/errors.ts` reads it.
    #[napi]
    pub fn missing(&self, dialect: String) -> napi::Result<String> {
        Dialect::parse(&dialect).map(|dialect| text(&self.0.table().missing(dialect, "Outbox"))).map_err(throw)
    }

    /// The error for a user who lacks a right on it.
    #[napi]
    pub fn denied(&self, dialect: String, relaying: bool) -> napi::Result<String> {
        let rights = if relaying { RELAY_RIGHTS } else { OUTBOX_RIGHTS };
        Dialect::parse(&dialect).map(|dialect| text(&self.0.table().denied(dialect, rights))).map_err(throw)
    }

    /// The error for a database that takes no writes.
    #[napi]
    pub fn read_only(&self) -> String {
        text(&self.0.table().read_only())
    }
}

/// Renders statements for one inbox table.
#[napi]
pub struct NativeInbox(Inbox);

#[napi]
impl NativeInbox {
    /// Reads the options.
    #[napi(constructor)]
    pub fn new(json: String) -> napi::Result<Self> {
        let read = || Inbox::from_json(&options::snake(&json)?, Naming::TypeScript);
        read().map(Self).map_err(throw)
    }

    /// `{statement, confirm}`: one row changed means that it is the first time.
    #[napi]
    pub fn mark(&self, dialect: String, style: String, consumer: String, event_id: String) -> napi::Result<String> {
        let (dialect, style) = spoken(&dialect, &style).map_err(throw)?;
        self.0.mark(dialect, style, &consumer, &event_id).map(|change| counted(&change)).map_err(throw)
    }

    /// `{statement, confirm}`: the rows changed are those that were deleted. `age` in milliseconds.
    #[napi]
    pub fn purge(&self, dialect: String, style: String, age: f64, limit: u32) -> napi::Result<String> {
        let (dialect, style) = spoken(&dialect, &style).map_err(throw)?;
        let age = Duration::from_millis(age.max(0.0) as u64);
        self.0.purge(dialect, style, age, limit).map(|change| counted(&change)).map_err(throw)
    }

    /// Statements that make the table.
    #[napi]
    pub fn ddl(&self, dialect: String) -> napi::Result<Vec<String>> {
        Dialect::parse(&dialect).map(|dialect| self.0.table().inbox_ddl(dialect)).map_err(throw)
    }

    /// What fails if and only if the table cannot be used, `{sql, params}`.
    #[napi]
    pub fn check(&self, dialect: String, style: String) -> napi::Result<String> {
        let (dialect, style) = spoken(&dialect, &style).map_err(throw)?;
        Ok(sql(&self.0.table().inbox_check(dialect, style)).to_string())
    }

    /// The error for a table that cannot be used, as `ts/errors.ts` reads it.
    #[napi]
    pub fn missing(&self, dialect: String) -> napi::Result<String> {
        Dialect::parse(&dialect).map(|dialect| text(&self.0.table().missing(dialect, "Inbox"))).map_err(throw)
    }

    /// The error for a user who lacks a right on it.
    #[napi]
    pub fn denied(&self, dialect: String) -> napi::Result<String> {
        Dialect::parse(&dialect).map(|dialect| text(&self.0.table().denied(dialect, INBOX_RIGHTS))).map_err(throw)
    }

    /// The error for a database that takes no writes.
    #[napi]
    pub fn read_only(&self) -> String {
        text(&self.0.table().read_only())
    }
}
