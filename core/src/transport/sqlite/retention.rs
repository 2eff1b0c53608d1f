//! What is dropped from the log, and when.
//!
//! An event goes when every group of its bus is done with it and it is older than the retention time. A bus without
//! groups keeps everything: a group may still be made at the beginning. The user's own limits, age, number and
//! bytes, drop events even if a group is not done; each such loss is counted in that group's `expired`.

use std::collections::VecDeque;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};

use super::{clock, mail, marks, publish};
use crate::error::Result;
use crate::pattern::Pattern;

/// Rows deleted in one transaction.
const STEP: i64 = 1_000;

/// What one bus keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limits {
    pub bus: i64,
    pub retention: Duration,
    pub max_age: Option<Duration>,
    pub max_events: Option<u64>,
    pub max_bytes: Option<u64>,
}

/// What one sweep did.
pub(super) struct Swept {
    /// There may be more to drop.
    pub more: bool,
    /// Delayed events entered the log.
    pub promoted: bool,
}

/// The bytes of one bus's log, by parts of [`STEP`] events: what is new is read once, and what is gone is taken off, so
/// that a limit on bytes does not read the whole log each time. Asked for only where there is such a limit.
#[derive(Default)]
pub(super) struct Tally(VecDeque<Part>);

struct Part {
    first: i64,
    last: i64,
    events: i64,
    bytes: i64,
}

impl Tally {
    fn update(&mut self, connection: &Connection, bus: i64) -> Result<()> {
        let oldest: Option<i64> = connection
            .prepare_cached("SELECT seq FROM polybus_events WHERE bus = ?1 ORDER BY seq LIMIT 1")?
            .query_row([bus], |row| row.get(0))
            .optional()?;
        let oldest = oldest.unwrap_or(i64::MAX);
        while self.0.front().is_some_and(|part| part.last < oldest) {
            self.0.pop_front();
        }
        if let Some(front) = self.0.front_mut().filter(|part| part.first < oldest) {
            let mut sum = connection.prepare_cached(
                "SELECT count(*), coalesce(sum(length(event)), 0) FROM polybus_events
                 WHERE bus = ?1 AND seq BETWEEN ?2 AND ?3",
            )?;
            front.first = oldest;
            (front.events, front.bytes) =
                sum.query_row((bus, oldest, front.last), |row| Ok((row.get(0)?, row.get(1)?)))?;
        }
        let mut fresh = connection
            .prepare_cached("SELECT seq, length(event) FROM polybus_events WHERE bus = ?1 AND seq > ?2 ORDER BY seq")?;
        let mut rows = fresh.query((bus, self.0.back().map_or(0, |part| part.last)))?;
        while let Some(row) = rows.next()? {
            let (seq, size): (i64, i64) = (row.get(0)?, row.get(1)?);
            match self.0.back_mut().filter(|part| part.events < STEP) {
                Some(part) => (part.last, part.events, part.bytes) = (seq, part.events + 1, part.bytes + size),
                None => self.0.push_back(Part { first: seq, last: seq, events: 1, bytes: size }),
            }
        }
        Ok(())
    }

    /// The last of the oldest events that exceed `max` bytes, at most [`STEP`] of them.
    fn surplus(&mut self, connection: &Connection, bus: i64, max: i64) -> Result<Option<i64>> {
        self.update(connection, bus)?;
        let mut excess = self.0.iter().map(|part| part.bytes).sum::<i64>() - max;
        if excess <= 0 {
            return Ok(None);
        }
        let mut oldest = connection
            .prepare_cached("SELECT seq, length(event) FROM polybus_events WHERE bus = ?1 ORDER BY seq LIMIT ?2")?;
        let mut rows = oldest.query((bus, STEP))?;
        let mut last = None;
        while excess > 0
            && let Some(row) = rows.next()?
        {
            last = Some(row.get(0)?);
            excess -= row.get::<_, i64>(1)?;
        }
        Ok(last)
    }
}

/// The positions up to which events go.
struct Plan {
    /// Because everybody is done.
    done: Option<i64>,
    /// Because the user said so.
    forced: Option<i64>,
}

/// Whether [`sweep`] would do anything. Reads only.
pub(super) fn is_due(connection: &Connection, limits: &Limits, tally: &mut Tally) -> Result<bool> {
    let delayed = publish::next_delayed(connection, limits.bus)?.is_some_and(|at| at <= clock::wall_ms());
    let plan = plan(connection, limits, tally)?;
    let stale = mail::is_stale(connection)? || marks::stale(connection)?;
    Ok(delayed || plan.done.is_some() || plan.forced.is_some() || stale)
}

/// Drops up to [`STEP`] events for each reason, and moves due delayed events into the log.
pub(super) fn sweep(tx: &Connection, limits: &Limits, tally: &mut Tally) -> Result<Swept> {
    let promoted = publish::promote(tx, limits.bus)? > 0;
    mail::clean(tx)?;
    let plan = plan(tx, limits, tally)?;
    let mut dropped = 0;
    if plan.forced.max(plan.done).is_some() {
        publish::save_head(tx)?;
    }
    if let Some(last) = plan.forced {
        account(tx, limits.bus, last)?;
        dropped += delete(tx, limits.bus, last)?;
    }
    if let Some(last) = plan.done {
        dropped += delete(tx, limits.bus, last)?;
    }
    dropped += marks::forget(tx, STEP)?;
    Ok(Swept { more: dropped > 0, promoted })
}

fn plan(connection: &Connection, limits: &Limits, tally: &mut Tally) -> Result<Plan> {
    let now = clock::wall_ms();
    let done = match safe(connection, limits.bus)? {
        Some(safe) => older(connection, limits.bus, now - clock::millis(limits.retention), safe)?,
        None => None,
    };
    let aged = match limits.max_age {
        Some(age) => older(connection, limits.bus, now - clock::millis(age), i64::MAX)?,
        None => None,
    };
    let crowded = match limits.max_events {
        Some(max) => surplus(connection, limits.bus, i64::try_from(max).unwrap_or(i64::MAX))?,
        None => None,
    };
    let heavy = match limits.max_bytes {
        Some(max) => tally.surplus(connection, limits.bus, i64::try_from(max).unwrap_or(i64::MAX))?,
        None => None,
    };
    Ok(Plan { done, forced: aged.max(crowded).max(heavy) })
}

/// The position up to which every group is done; `None` without groups.
fn safe(connection: &Connection, bus: i64) -> Result<Option<i64>> {
    let mut safe = connection.prepare_cached(
        "SELECT min(min(g.cursor, coalesce(
             (SELECT min(d.seq) - 1 FROM polybus_deliveries d WHERE d.group_id = g.id AND d.event IS NULL), g.cursor)))
         FROM polybus_groups g WHERE g.bus = ?1",
    )?;
    Ok(safe.query_row([bus], |row| row.get(0))?)
}

/// The last of the bus's oldest [`STEP`] events that are at or before `last` and were published before `before`.
fn older(connection: &Connection, bus: i64, before: i64, last: i64) -> Result<Option<i64>> {
    let mut oldest = connection.prepare_cached(
        "SELECT seq, published_at FROM polybus_events WHERE bus = ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3",
    )?;
    let mut rows = oldest.query((bus, last, STEP))?;
    let mut found = None;
    while let Some(row) = rows.next()? {
        if row.get::<_, i64>(1)? >= before {
            break;
        }
        found = Some(row.get(0)?);
    }
    Ok(found)
}

/// The last of the oldest events that exceed `max`, at most [`STEP`] of them.
fn surplus(connection: &Connection, bus: i64, max: i64) -> Result<Option<i64>> {
    let buses: i64 = connection.query_row("SELECT count(*) FROM polybus_buses", [], |row| row.get(0))?;
    // Alone in the file, a bus has positions without gaps; counting rows would read the whole log.
    let count = if buses == 1 {
        "SELECT coalesce((SELECT max(seq) FROM polybus_events) - (SELECT min(seq) FROM polybus_events) + 1, 0) WHERE ?1"
    } else {
        "SELECT count(*) FROM polybus_events WHERE bus = ?1"
    };
    let kept: i64 = connection.prepare_cached(count)?.query_row([bus], |row| row.get(0))?;
    let excess = (kept - max).min(STEP);
    if excess <= 0 {
        return Ok(None);
    }
    let mut last =
        connection.prepare_cached("SELECT seq FROM polybus_events WHERE bus = ?1 ORDER BY seq LIMIT 1 OFFSET ?2")?;
    Ok(last.query_row((bus, excess - 1), |row| row.get(0)).optional()?)
}

fn delete(tx: &Connection, bus: i64, last: i64) -> Result<i64> {
    let mut delete = tx.prepare_cached("DELETE FROM polybus_events WHERE bus = ?1 AND seq <= ?2")?;
    Ok(i64::try_from(delete.execute((bus, last))?).unwrap_or(i64::MAX))
}

/// Before events up to `last` go by the user's limits: what a handler works on gets a copy of its own, what waits for a
/// retry and what nobody took yet is counted as expired.
fn account(tx: &Connection, bus: i64, last: i64) -> Result<()> {
    let groups: Vec<(i64, i64, String)> = tx
        .prepare_cached("SELECT id, cursor, pattern FROM polybus_groups WHERE bus = ?1")?
        .query_map([bus], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (group, cursor, pattern) in groups {
        tx.prepare_cached(
            "UPDATE polybus_deliveries SET (type, event) = (SELECT type, event FROM polybus_events e WHERE e.seq = polybus_deliveries.seq)
             WHERE group_id = ?1 AND seq <= ?2 AND owner IS NOT NULL AND event IS NULL",
        )?
        .execute((group, last))?;
        let waiting = tx
            .prepare_cached(
                "DELETE FROM polybus_deliveries WHERE group_id = ?1 AND seq <= ?2 AND owner IS NULL AND event IS NULL",
            )?
            .execute((group, last))?;
        let pattern = Pattern::new(pattern)?;
        let mut unseen = tx.prepare_cached(
            "SELECT type, count(*) FROM polybus_events WHERE bus = ?1 AND seq > ?2 AND seq <= ?3 GROUP BY type",
        )?;
        let mut rows = unseen.query((bus, cursor, last))?;
        let mut lost = i64::try_from(waiting).unwrap_or(i64::MAX);
        while let Some(row) = rows.next()? {
            if pattern.matches(&row.get::<_, String>(0)?) {
                lost += row.get::<_, i64>(1)?;
            }
        }
        tx.prepare_cached("UPDATE polybus_groups SET expired = expired + ?2, cursor = max(cursor, ?3) WHERE id = ?1")?
            .execute((group, lost, last))?;
        if lost > 0 {
            log::warn!("a limit of the event store dropped {lost} events that group {group} had not finished");
        }
    }
    Ok(())
}
