//! Storing events.

use rusqlite::{Connection, OptionalExtension};

use super::clock;
use crate::codec;
use crate::error::Result;
use crate::event::Text;
use crate::transport::{Outgoing, Receipt, Settings};

/// Under which key the event is published once, and for how long that is remembered, in milliseconds.
struct Once {
    key: Text,
    window: i64,
}

/// An event, encoded on the caller's task so that the writer thread only writes.
pub(super) struct Row {
    id: Text,
    event_type: Text,
    once: Option<Once>,
    bytes: Vec<u8>,
    /// Milliseconds from the commit.
    delay: Option<i64>,
    expires_in: Option<i64>,
}

/// The batch, encoded, and the sum of its bytes. One event that cannot be encoded fails the batch.
pub(super) fn encode(batch: &[Outgoing], settings: &Settings) -> Result<(Vec<Row>, usize)> {
    let mut total = 0;
    let mut rows = Vec::with_capacity(batch.len());
    for out in batch {
        let bytes = codec::encode(&out.event)?;
        total += bytes.len();
        rows.push(Row {
            id: out.event.meta.id.clone(),
            event_type: out.event.event_type.text().clone(),
            once: settings.once(&out.event).map(|(key, window)| Once { key, window: clock::millis(window) }),
            bytes,
            delay: out.delay.filter(|delay| !delay.is_zero()).map(clock::millis),
            expires_in: out.expires_in.map(clock::millis),
        });
    }
    Ok((rows, total))
}

const APPEND: &str =
    "INSERT INTO polybus_events(seq, bus, published_at, expires_at, type, event) VALUES(?1, ?2, ?3, ?4, ?5, ?6)";

/// Appends the batch to the log, the delayed ones to their table. What was published before under its key is left out.
pub(super) fn insert(tx: &Connection, bus: i64, rows: &[Row]) -> Result<Vec<Receipt>> {
    let now = clock::wall_ms();
    let mut head = head(tx)?;
    let mut append = tx.prepare_cached(APPEND)?;
    let mut receipts = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(once) = &row.once
            && let Some(first) = first(tx, bus, &once.key, now)?
        {
            receipts.push(first);
            continue;
        }
        let expires_at = row.expires_in.map(|after| now + after);
        let position = match row.delay {
            None => {
                head += 1;
                append.execute((head, bus, now, expires_at, &*row.event_type, &row.bytes))?;
                Some(head)
            }
            Some(delay) => {
                tx.prepare_cached(
                    "INSERT INTO polybus_delayed(bus, due_at, expires_at, type, event) VALUES(?1, ?2, ?3, ?4, ?5)",
                )?
                .execute((bus, now + delay, expires_at, &*row.event_type, &row.bytes))?;
                None
            }
        };
        if let Some(Once { key, window }) = &row.once {
            tx.prepare_cached(
                "INSERT OR REPLACE INTO polybus_published(bus, key, id, seq, until) VALUES(?1, ?2, ?3, ?4, ?5)",
            )?
            .execute((bus, &**key, &*row.id, position, now + window))?;
        }
        let position = position.map(|at| at.to_string().into());
        receipts.push(Receipt { id: row.id.clone(), position, duplicate: false });
    }
    Ok(receipts)
}

/// What was published before under `key`.
fn first(tx: &Connection, bus: i64, key: &str, now: i64) -> Result<Option<Receipt>> {
    let mut seen =
        tx.prepare_cached("SELECT id, seq FROM polybus_published WHERE bus = ?1 AND key = ?2 AND until > ?3")?;
    let receipt = |row: &rusqlite::Row<'_>| {
        let position = row.get::<_, Option<i64>>(1)?.map(|at| at.to_string().into());
        Ok(Receipt { id: row.get::<_, String>(0)?.into(), position, duplicate: true })
    };
    Ok(seen.query_row((bus, key, now), receipt).optional()?)
}

/// Moves up to 1,000 due events into the log, oldest first. Returns how many.
pub(super) fn promote(tx: &Connection, bus: i64) -> Result<usize> {
    let now = clock::wall_ms();
    let mut due = tx.prepare_cached(
        "SELECT id, expires_at, type, event FROM polybus_delayed WHERE bus = ?1 AND due_at <= ?2
         ORDER BY due_at, id LIMIT 1000",
    )?;
    let mut head = head(tx)?;
    let mut append = tx.prepare_cached(APPEND)?;
    let mut moved = Vec::new();
    let mut rows = due.query((bus, now))?;
    while let Some(row) = rows.next()? {
        let event_type = row.get_ref(2)?.as_str().map_err(rusqlite::Error::from)?;
        let event = row.get_ref(3)?.as_blob().map_err(rusqlite::Error::from)?;
        head += 1;
        append.execute((head, bus, now, row.get::<_, Option<i64>>(1)?, event_type, event))?;
        moved.push(row.get::<_, i64>(0)?);
    }
    for id in &moved {
        tx.prepare_cached("DELETE FROM polybus_delayed WHERE id = ?1")?.execute([id])?;
    }
    Ok(moved.len())
}

/// When the next delayed event is due.
pub(super) fn next_delayed(connection: &Connection, bus: i64) -> Result<Option<i64>> {
    let mut next = connection.prepare_cached("SELECT min(due_at) FROM polybus_delayed WHERE bus = ?1")?;
    Ok(next.query_row([bus], |row| row.get(0))?)
}

/// The newest position that was ever given out. Positions are counted here and not by `AUTOINCREMENT`, which would write
/// one more page with each commit; the retention saves the number before it removes the newest event.
pub(super) fn head(connection: &Connection) -> Result<i64> {
    let mut head = connection.prepare_cached(
        "SELECT max(coalesce((SELECT max(seq) FROM polybus_events), 0),
                    coalesce((SELECT value FROM polybus_meta WHERE key = 'head'), 0))",
    )?;
    Ok(head.query_row([], |row| row.get(0))?)
}

/// Saves [`head`], so that it outlives its event.
pub(super) fn save_head(tx: &Connection) -> Result<()> {
    let head = head(tx)?;
    tx.prepare_cached("INSERT OR REPLACE INTO polybus_meta(key, value) VALUES('head', ?1)")?.execute([head])?;
    Ok(())
}
