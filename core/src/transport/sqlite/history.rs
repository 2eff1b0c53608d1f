//! Reading the log, what became of its events, and handing them to a group again.
//!
//! Pages go along the primary key. A time finds its place by halving, because the times of the log grow with the
//! positions: the clock may have been set back, so the place that is looked for lies [`SLACK`] earlier and the rest is
//! compared one by one.

use std::collections::HashMap;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Row};

use super::{clock, lane, publish};
use crate::codec;
use crate::delivery::{DeadReason, Failure};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, Record, ReplayBatch, ReplayStep, Status, bad_position, no_group};
use crate::pattern::Pattern;

/// Rows that one step of a replay looks at, so that the writer is soon free for others.
const SCAN: usize = 5_000;
/// How far a clock may have been set back, in milliseconds.
const SLACK: i64 = 3_600_000;

/// The position in `after`, 0 without one.
pub(super) fn position(after: Option<&Text>) -> Result<i64> {
    let parse = |text: &Text| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten().ok_or_else(|| bad_position(text))
    };
    after.map_or(Ok(0), parse)
}

/// The times of a filter, as stored.
struct Span {
    since: i64,
    until: i64,
}

impl Span {
    fn of(filter: &HistoryFilter) -> Self {
        Self { since: filter.since.map_or(i64::MIN, clock::to_ms), until: filter.until.map_or(i64::MAX, clock::to_ms) }
    }

    fn holds(&self, at: i64) -> bool {
        (self.since..self.until).contains(&at)
    }

    /// Nothing after an event of that time can be in here.
    fn ended(&self, at: i64) -> bool {
        at.saturating_sub(SLACK) >= self.until
    }

    /// The position before the first event that can be in here.
    fn begin(&self, connection: &Connection, after: i64) -> Result<i64> {
        if self.since == i64::MIN {
            return Ok(after);
        }
        let wanted = self.since.saturating_sub(SLACK);
        let mut next = connection
            .prepare_cached("SELECT seq, published_at FROM polybus_events WHERE seq > ?1 ORDER BY seq LIMIT 1")?;
        // All up to `low` is older; something after `high` may be not, or there is nothing after it.
        let (mut low, mut high) = (after, publish::head(connection)?);
        while low < high {
            let middle = low + (high - low) / 2;
            let found: Option<(i64, i64)> =
                next.query_row([middle], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
            match found {
                Some((seq, at)) if at < wanted => low = seq,
                _ => high = middle,
            }
        }
        Ok(low)
    }
}

/// Up to `limit` events after a position.
pub(super) fn list(
    connection: &Connection,
    bus: i64,
    filter: &HistoryFilter,
    (after, limit): (i64, usize),
    records: bool,
    max_payload: usize,
) -> Result<Vec<HistoryEntry>> {
    // One snapshot, so that the records are of the moment of the page.
    let snapshot = connection.unchecked_transaction()?;
    let span = Span::of(filter);
    let mut select = snapshot
        .prepare_cached("SELECT seq, bus, published_at, type, event FROM polybus_events WHERE seq > ?1 ORDER BY seq")?;
    let mut rows = select.query([span.begin(&snapshot, after)?])?;
    let mut found: Vec<(i64, String, HistoryEntry)> = Vec::new();
    while found.len() < limit
        && let Some(row) = rows.next()?
    {
        let at = row.get(2)?;
        if span.ended(at) {
            break;
        }
        let event_type = row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)?;
        if row.get::<_, i64>(1)? == bus && span.holds(at) && filter.wants(event_type) {
            found.push((row.get(0)?, event_type.to_owned(), entry(row, at, max_payload)?));
        }
    }
    drop(rows);
    if records && let (Some((first, ..)), Some((last, ..))) = (found.first(), found.last()) {
        let books = books(&snapshot, bus, (*first, *last))?;
        for (seq, event_type, entry) in &mut found {
            entry.records = Some(books.iter().filter_map(|book| book.record(*seq, event_type)).collect());
        }
    }
    Ok(found.into_iter().map(|(.., entry)| entry).collect())
}

fn entry(row: &Row<'_>, at: i64, max_payload: usize) -> Result<HistoryEntry> {
    let raw = Bytes::from(row.get::<_, Vec<u8>>(4)?);
    let event = codec::decode(&raw, max_payload).ok();
    Ok(HistoryEntry {
        raw: event.is_none().then_some(raw),
        event,
        position: row.get::<_, i64>(0)?.to_string().into(),
        published_at: clock::from_ms(at),
        records: None,
    })
}

/// What one group has, of a part of the log.
struct Book {
    name: Text,
    cursor: i64,
    /// Events at or before this were not for it; 0 when an older version made the group and did not say.
    begin: i64,
    pattern: Pattern,
    /// What is not finished, and dead letters, by position.
    known: HashMap<i64, Record>,
}

impl Book {
    fn record(&self, seq: i64, event_type: &str) -> Option<Record> {
        if let Some(known) = self.known.get(&seq) {
            return Some(known.clone());
        }
        let concerned = seq > self.begin && self.pattern.matches(event_type);
        let status = if seq > self.cursor { Status::Pending } else { Status::Completed };
        let attempts = (status == Status::Pending).then_some(0);
        concerned.then(|| Record { attempts, ..Record::new(self.name.clone(), status) })
    }
}

fn books(connection: &Connection, bus: i64, (first, last): (i64, i64)) -> Result<Vec<Book>> {
    let mut groups = connection
        .prepare_cached("SELECT id, name, cursor, pattern, began FROM polybus_groups WHERE bus = ?1 ORDER BY name")?;
    let mut rows = groups.query([bus])?;
    let mut books = Vec::new();
    while let Some(row) = rows.next()? {
        let (group, name): (i64, Text) = (row.get(0)?, row.get::<_, String>(1)?.into());
        let mut known = HashMap::new();
        dead(connection, group, &name, (first, last), &mut known)?;
        // What was replayed since is more recent than its dead letter.
        unfinished(connection, group, &name, (first, last), &mut known)?;
        let pattern = Pattern::new(row.get::<_, String>(3)?)?;
        books.push(Book { name, cursor: row.get(2)?, begin: row.get(4)?, pattern, known });
    }
    Ok(books)
}

fn unfinished(
    connection: &Connection,
    group: i64,
    name: &Text,
    (first, last): (i64, i64),
    known: &mut HashMap<i64, Record>,
) -> Result<()> {
    let mut select = connection.prepare_cached(
        "SELECT seq, owner IS NOT NULL, attempt, due_at, first_failed_at, error FROM polybus_deliveries
         WHERE group_id = ?1 AND seq BETWEEN ?2 AND ?3",
    )?;
    let mut rows = select.query((group, first, last))?;
    while let Some(row) = rows.next()? {
        let (leased, due, failed): (bool, i64, Option<i64>) = (row.get(1)?, row.get(3)?, row.get(4)?);
        let waits = !leased && due > 0 && failed.is_some();
        let status = match (leased, waits) {
            (true, _) => Status::Processing,
            (_, true) => Status::Failed,
            _ => Status::Pending,
        };
        let record = Record {
            attempts: Some(row.get(2)?),
            first_failed_at: failed.map(clock::from_ms),
            retry_at: waits.then(|| clock::from_ms(due)),
            error: row.get::<_, Option<String>>(5)?.as_deref().and_then(failure),
            ..Record::new(name.clone(), status)
        };
        known.insert(row.get(0)?, record);
    }
    Ok(())
}

/// As `settle::retry` writes it.
fn failure(json: &str) -> Option<Failure> {
    let facts: serde_json::Value = serde_json::from_str(json).ok()?;
    let text = |name: &str| facts[name].as_str().unwrap_or_default().to_owned();
    Some(Failure { kind: text("kind"), message: text("message"), stack: text("stack"), code: None })
}

fn dead(
    connection: &Connection,
    group: i64,
    name: &Text,
    (first, last): (i64, i64),
    known: &mut HashMap<i64, Record>,
) -> Result<()> {
    let mut select = connection.prepare_cached(
        "SELECT seq, id, attempts, first_failed_at, last_failed_at, error_kind, error_message, error_stack, reason
         FROM polybus_dead WHERE group_id = ?1 AND seq BETWEEN ?2 AND ?3 ORDER BY id",
    )?;
    let mut rows = select.query((group, first, last))?;
    while let Some(row) = rows.next()? {
        let record = Record {
            attempts: Some(row.get(2)?),
            first_failed_at: Some(clock::from_ms(row.get(3)?)),
            last_failed_at: Some(clock::from_ms(row.get(4)?)),
            error: Some(Failure { kind: row.get(5)?, message: row.get(6)?, stack: row.get(7)?, code: None }),
            dead_letter: Some(row.get::<_, i64>(1)?.to_string().into()),
            reason: DeadReason::parse(&row.get::<_, String>(8)?),
            ..Record::new(name.clone(), Status::Failed)
        };
        known.insert(row.get(0)?, record);
    }
    Ok(())
}

/// One step of a replay. The log keeps what it hands out until the group has finished it; only an event that would expire
/// is copied. In an ordered group each takes the place in its lane that its position gives it, as a replayed dead letter does.
pub(super) fn replay(tx: &Connection, bus: i64, step: &ReplayStep) -> Result<ReplayBatch> {
    let found: Option<(i64, i64, String, bool)> = tx
        .prepare_cached("SELECT id, cursor, pattern, ordered FROM polybus_groups WHERE bus = ?1 AND name = ?2")?
        .query_row((bus, &*step.group), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))
        .optional()?;
    let Some((group, cursor, pattern, ordered)) = found else { return Err(unknown(tx, bus, &step.group)?) };
    let pattern = Pattern::new(pattern)?;
    let end = step.end.as_ref().map_or(Ok(cursor), |end| position(Some(end)))?;
    let span = Span::of(&step.filter);
    let mut select =
        tx.prepare_cached("SELECT seq, bus, published_at, type FROM polybus_events WHERE seq > ?1 ORDER BY seq")?;
    let mut read = tx.prepare_cached("SELECT event FROM polybus_events WHERE seq = ?1")?;
    // The token is nobody's, and says that the event was delivered before.
    let mut insert = tx.prepare_cached(
        "INSERT OR IGNORE INTO polybus_deliveries(group_id, seq, owner, token, attempt, due_at, type, event, lane)
         SELECT ?1, seq, NULL, 1, 0, ?3, CASE WHEN expires_at IS NOT NULL THEN type END,
                CASE WHEN expires_at IS NOT NULL THEN event END, ?4
         FROM polybus_events WHERE seq = ?2",
    )?;
    let mut batch = ReplayBatch { handed: 0, skipped: 0, position: None, end: end.to_string().into(), done: true };
    let mut rows = select.query([span.begin(tx, position(step.after.as_ref())?)?])?;
    for looked in 0.. {
        let Some(row) = rows.next()? else { break };
        let (seq, at): (i64, i64) = (row.get(0)?, row.get(2)?);
        if seq > end || span.ended(at) {
            break;
        }
        if looked == SCAN || batch.handed == step.max as u64 {
            batch.done = false;
            break;
        }
        batch.position = Some(seq.to_string().into());
        let event_type = row.get_ref(3)?.as_str().map_err(rusqlite::Error::from)?;
        if row.get::<_, i64>(1)? == bus
            && span.holds(at)
            && step.filter.wants(event_type)
            && pattern.matches(event_type)
        {
            let key = match ordered {
                true => read.query_row([seq], |row| Ok(lane::of(row.get_ref(0)?.as_blob()?)))?,
                false => None,
            };
            let parked = match &key {
                Some(key) => lane::is_busy(tx, group, key)?,
                None => false,
            };
            let due = if parked { lane::PARKED } else { 0 };
            match insert.execute((group, seq, due, key.as_deref()))? {
                1 => batch.handed += 1,
                _ => batch.skipped += 1,
            }
        }
    }
    Ok(batch)
}

fn unknown(connection: &Connection, bus: i64, group: &str) -> Result<Error> {
    let mut select = connection.prepare_cached("SELECT name FROM polybus_groups WHERE bus = ?1")?;
    let names: Vec<String> = select.query_map([bus], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    Ok(no_group(group, names.iter().map(String::as_str)))
}
