//! Dead letters: listing, counting, replaying, purging.
//!
//! A filter selects by SQL what SQL can decide; the pattern is matched here, on the stored type, which is absent for
//! bytes that are no event. Changes go in steps of [`STEP`] records, each step one transaction, up to the newest record
//! that existed when the call began: letters that come back meanwhile are not taken again.

use bytes::Bytes;
use rusqlite::types::Value;
use rusqlite::{Connection, Row, params_from_iter};

use super::{clock, lane};
use crate::codec;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{DeadReason, Failure};
use crate::error::{Error, Result};

/// Records changed in one transaction.
pub(super) const STEP: usize = 500;

/// What to do with each selected record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Back to its group.
    Replay,
    /// Away.
    Purge,
}

struct Where {
    sql: String,
    values: Vec<Value>,
}

/// The condition for `filter` without its pattern; `None` when nothing can match.
fn condition(bus: i64, filter: &DeadLetterFilter, after: i64) -> Option<Where> {
    let mut sql = "x.bus = ? AND x.id > ?".to_owned();
    let mut values: Vec<Value> = vec![bus.into(), after.into()];
    let mut add = |clause: &str, value: Value| {
        sql.push_str(clause);
        values.push(value);
    };
    if let Some(id) = &filter.id {
        add(" AND x.id = ?", parse(id)?.into());
    }
    if let Some(group) = &filter.group {
        add(" AND g.name = ?", group.to_string().into());
    }
    if let Some(since) = filter.since {
        add(" AND x.last_failed_at >= ?", clock::to_ms(since).into());
    }
    if let Some(before) = filter.before {
        add(" AND x.last_failed_at < ?", clock::to_ms(before).into());
    }
    Some(Where { sql, values })
}

/// The number in a record's id. Ids are ours, so any other text names no record.
pub(super) fn parse(id: &str) -> Option<i64> {
    id.bytes().all(|byte| byte.is_ascii_digit()).then(|| id.parse().ok()).flatten()
}

fn wanted(filter: &DeadLetterFilter, event_type: Option<&str>) -> bool {
    filter.pattern.as_ref().is_none_or(|pattern| event_type.is_some_and(|event_type| pattern.matches(event_type)))
}

const TABLES: &str = "polybus_dead x JOIN polybus_groups g ON g.id = x.group_id";

/// Up to `limit` records after the record `after`, in order of their ids.
pub(super) fn list(
    connection: &Connection,
    bus: i64,
    filter: &DeadLetterFilter,
    after: i64,
    limit: usize,
    max_payload: usize,
) -> Result<Vec<DeadLetter>> {
    let Some(Where { sql, values }) = condition(bus, filter, after) else { return Ok(Vec::new()) };
    let mut select = connection.prepare_cached(&format!(
        "SELECT x.id, x.type, x.event, x.error_kind, x.error_message, x.error_stack, x.attempts, x.first_failed_at,
                x.last_failed_at, x.subscription, g.name, x.reason, x.replayed_from
         FROM {TABLES} WHERE {sql} ORDER BY x.id"
    ))?;
    let mut rows = select.query(params_from_iter(values))?;
    let mut letters = Vec::new();
    while letters.len() < limit
        && let Some(row) = rows.next()?
    {
        if wanted(filter, row.get_ref(1)?.as_str_or_null().map_err(rusqlite::Error::from)?) {
            letters.push(letter(row, max_payload)?);
        }
    }
    Ok(letters)
}

fn letter(row: &Row<'_>, max_payload: usize) -> Result<DeadLetter> {
    let raw = Bytes::from(row.get::<_, Vec<u8>>(2)?);
    let reason: String = row.get(11)?;
    Ok(DeadLetter {
        id: row.get::<_, i64>(0)?.to_string().into(),
        event: codec::decode(&raw, max_payload).ok(),
        raw,
        error: Failure { kind: row.get(3)?, message: row.get(4)?, stack: row.get(5)?, code: None },
        attempts: row.get(6)?,
        first_failed_at: clock::from_ms(row.get(7)?),
        last_failed_at: clock::from_ms(row.get(8)?),
        subscription: row.get::<_, String>(9)?.into(),
        group: row.get::<_, String>(10)?.into(),
        reason: DeadReason::parse(&reason)
            .ok_or_else(|| Error::connection_failed(format!("a dead letter has the unknown reason {reason:?}")))?,
        replayed_from: row.get::<_, Option<i64>>(12)?.map(|id| id.to_string().into()),
    })
}

/// How many records `filter` selects.
pub(super) fn count(connection: &Connection, bus: i64, filter: &DeadLetterFilter) -> Result<u64> {
    let Some(Where { sql, values }) = condition(bus, filter, 0) else { return Ok(0) };
    let mut select =
        connection.prepare_cached(&format!("SELECT x.type, count(*) FROM {TABLES} WHERE {sql} GROUP BY x.type"))?;
    let mut rows = select.query(params_from_iter(values))?;
    let mut total = 0_i64;
    while let Some(row) = rows.next()? {
        if wanted(filter, row.get_ref(0)?.as_str_or_null().map_err(rusqlite::Error::from)?) {
            total += row.get::<_, i64>(1)?;
        }
    }
    Ok(total.max(0).unsigned_abs())
}

/// The newest record of the file.
pub(super) fn newest(connection: &Connection) -> Result<i64> {
    Ok(connection.query_row("SELECT coalesce(max(id), 0) FROM polybus_dead", [], |row| row.get(0))?)
}

/// What one step did.
pub(super) struct Step {
    pub changed: u64,
    /// Where the next step begins; `None` when all was looked at.
    pub next: Option<i64>,
}

/// Replays or purges the next records after `after`, none newer than `newest`.
pub(super) fn step(
    tx: &Connection,
    bus: i64,
    filter: &DeadLetterFilter,
    change: Change,
    (after, newest): (i64, i64),
) -> Result<Step> {
    let Some(Where { sql, mut values }) = condition(bus, filter, after) else {
        return Ok(Step { changed: 0, next: None });
    };
    values.push(newest.into());
    let mut select = tx.prepare_cached(&format!(
        "SELECT x.id, x.type FROM {TABLES} WHERE {sql} AND x.id <= ? ORDER BY x.id LIMIT {STEP}"
    ))?;
    let page: Vec<(i64, Option<String>)> = select
        .query_map(params_from_iter(values), |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let next = (page.len() == STEP).then(|| page[STEP - 1].0);
    let mut changed = 0;
    for (id, event_type) in page {
        if wanted(filter, event_type.as_deref()) && (change == Change::Purge || revive(tx, id)?) {
            tx.prepare_cached("DELETE FROM polybus_dead WHERE id = ?1")?.execute([id])?;
            changed += 1;
        }
    }
    Ok(Step { changed, next })
}

/// Gives the event back to its group, with a copy of its own: the log may have dropped it. In an ordered group it takes the
/// place in its lane that its position gives it: behind what is active, before what was published later.
fn revive(tx: &Connection, id: i64) -> Result<bool> {
    let mut insert = tx.prepare_cached(
        "INSERT OR IGNORE INTO polybus_deliveries(group_id, seq, owner, token, attempt, due_at, replayed_from, type, event, lane)
         SELECT x.group_id, x.seq, NULL, 0, 0,
                CASE WHEN x.lane IS NOT NULL AND EXISTS (SELECT 1 FROM polybus_deliveries d
                  WHERE d.group_id = x.group_id AND d.lane = x.lane AND d.due_at < ?2) THEN ?2 ELSE 0 END,
                x.id, x.type, x.event, x.lane
         FROM polybus_dead x WHERE x.id = ?1",
    )?;
    Ok(insert.execute((id, lane::PARKED))? == 1)
}
