//! The order of an ordered group: a lane for each partition key.
//!
//! A lane is the rows of `polybus_deliveries` with one `lane`, the partition key. One of them is *active*: leased, waiting for its next attempt,
//! or about to be taken. The others are *parked* behind it: their `due_at` is [`PARKED`], which no claim reaches, so
//! that a claim does not look at a hundred thousand events behind one that fails. When the active row goes, whoever removes it
//! and why, a trigger makes the first of the parked active; so none is stuck, also when an older polybus does the removing.
//!
//! An event enters its lane when a claim scans the log, in the order of the log, in the transaction that moves the cursor.
//! Files without an ordered group have neither the index nor the trigger, and their deletes pay nothing.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};

use crate::codec;
use crate::error::Result;
use crate::event::Text;

/// `due_at` of what waits for its lane.
pub(super) const PARKED: i64 = 9_000_000_000_000_000;

/// What ordered groups need in the file. The index finds a lane's active row, and its first parked one, in one step each.
pub(super) fn prepare(tx: &Connection) -> Result<()> {
    tx.execute_batch(&format!(
        "CREATE INDEX IF NOT EXISTS polybus_deliveries_lane ON polybus_deliveries(group_id, lane, due_at, seq)
           WHERE lane IS NOT NULL;
         CREATE TRIGGER IF NOT EXISTS polybus_deliveries_next AFTER DELETE ON polybus_deliveries
           WHEN old.lane IS NOT NULL AND NOT EXISTS (SELECT 1 FROM polybus_deliveries
             WHERE group_id = old.group_id AND lane = old.lane AND due_at < {PARKED})
         BEGIN
           UPDATE polybus_deliveries SET due_at = 0 WHERE group_id = old.group_id AND seq = (
             SELECT seq FROM polybus_deliveries WHERE group_id = old.group_id AND lane = old.lane AND due_at = {PARKED}
             ORDER BY seq LIMIT 1);
         END;"
    ))?;
    Ok(())
}

/// The lane that an event belongs to; `None` without a key, and for bytes that are no event.
pub(super) fn of(event: &[u8]) -> Option<Text> {
    codec::decode(&Bytes::copy_from_slice(event), usize::MAX).ok()?.meta.lane().cloned()
}

/// Whether the lane has an active row.
pub(super) fn is_busy(tx: &Connection, group: i64, key: &str) -> Result<bool> {
    let mut find = tx
        .prepare_cached("SELECT 1 FROM polybus_deliveries WHERE group_id = ?1 AND lane = ?2 AND due_at < ?3 LIMIT 1")?;
    Ok(find.query_row((group, key, PARKED), |_| Ok(())).optional()?.is_some())
}

/// Puts an event that nobody took yet into its lane, behind the active one.
pub(super) fn park(tx: &Connection, group: i64, position: i64, key: &str) -> Result<()> {
    tx.prepare_cached(
        "INSERT INTO polybus_deliveries(group_id, seq, owner, token, attempt, due_at, lane) VALUES(?1, ?2, NULL, 0, 0, ?4, ?3)",
    )?
    .execute((group, position, key, PARKED))?;
    Ok(())
}
