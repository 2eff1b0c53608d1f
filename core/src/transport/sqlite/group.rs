//! Buses and groups: joining, counting, forgetting.

use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};

use super::{clock, lane, publish};
use crate::error::{Error, Result};
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, GroupStats, Start, disagrees};

/// The id of the bus named `name`, made now if it is new.
pub(super) fn bus(tx: &Connection, name: &str) -> Result<i64> {
    tx.execute("INSERT OR IGNORE INTO polybus_buses(name) VALUES(?1)", [name])?;
    Ok(tx.query_row("SELECT id FROM polybus_buses WHERE name = ?1", [name], |row| row.get(0))?)
}

/// Where a source begins.
pub(super) struct Joined {
    pub group: i64,
    pub cursor: i64,
}

/// Joins the group, making it if it is new. An existing one keeps its position and takes the new pattern.
pub(super) fn join(tx: &Connection, bus: i64, spec: &GroupSpec) -> Result<Joined> {
    let now = clock::wall_ms();
    let known = tx
        .prepare_cached("SELECT id, cursor, pattern, ordered FROM polybus_groups WHERE bus = ?1 AND name = ?2")?
        .query_row((bus, &*spec.group), |row| {
            Ok((row.get(0)?, row.get(1)?, row.get::<_, String>(2)?, row.get::<_, bool>(3)?))
        })
        .optional()?;
    if let Some((group, cursor, pattern, ordered)) = known {
        if ordered != spec.ordered {
            return Err(disagrees(&spec.group, spec.ordered));
        }
        if pattern != spec.pattern.as_str() {
            log::warn!("group {}: its pattern changes from {pattern} to {}", spec.group, spec.pattern.as_str());
        }
        tx.execute(
            "UPDATE polybus_groups SET pattern = ?2, subscription = ?3, service = ?4, last_seen = ?5 WHERE id = ?1",
            (group, spec.pattern.as_str(), &*spec.subscription, &*spec.service, now),
        )?;
        return Ok(Joined { group, cursor });
    }
    if spec.ordered {
        lane::prepare(tx)?;
    }
    // What was due before the group existed is not for it.
    while publish::promote(tx, bus)? > 0 {}
    let cursor = begin(tx, bus, spec.start)?;
    tx.execute(
        "INSERT INTO polybus_groups(bus, name, subscription, service, pattern, cursor, created_at, last_seen, ordered,
           began)
         VALUES(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7, ?8, ?6)",
        (bus, &*spec.group, &*spec.subscription, &*spec.service, spec.pattern.as_str(), cursor, now, spec.ordered),
    )?;
    Ok(Joined { group: tx.last_insert_rowid(), cursor })
}

/// The position before the first event of a new group.
pub(super) fn begin(tx: &Connection, bus: i64, start: Start) -> Result<i64> {
    match start {
        Start::New => publish::head(tx),
        Start::Beginning => Ok(0),
        Start::At(time) => {
            let first: Option<i64> = tx.query_row(
                "SELECT min(seq) FROM polybus_events WHERE bus = ?1 AND published_at >= ?2",
                (bus, clock::to_ms(time)),
                |row| row.get(0),
            )?;
            first.map_or_else(|| publish::head(tx), |first| Ok(first - 1))
        }
    }
}

fn find(connection: &Connection, bus: i64, name: &str) -> Result<Option<i64>> {
    let mut find = connection.prepare_cached("SELECT id FROM polybus_groups WHERE bus = ?1 AND name = ?2")?;
    Ok(find.query_row((bus, name), |row| row.get(0)).optional()?)
}

/// Counts, in one snapshot.
pub(super) fn stats(connection: &Connection, bus: i64, name: &str) -> Result<GroupStats> {
    let snapshot = connection.unchecked_transaction()?;
    let Some(group) = find(&snapshot, bus, name)? else {
        return Err(Error::not_found(format!("there is no group {name:?} on this bus")));
    };
    let (cursor, pattern, expired): (i64, String, i64) =
        snapshot.query_row("SELECT cursor, pattern, expired FROM polybus_groups WHERE id = ?1", [group], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
    let pattern = Pattern::new(pattern)?;
    // In its lane, or the first of it, and not taken yet: that is lag.
    let unseen = "d.owner IS NULL AND d.lane IS NOT NULL AND d.token = 0 AND d.replayed_from IS NULL";
    let (in_flight, waiting, unseen, oldest): (i64, i64, i64, Option<i64>) = snapshot.query_row(
        &format!(
            "SELECT count(d.owner), count(*) - count(d.owner), count(CASE WHEN {unseen} THEN 1 END),
                    min(coalesce(e.published_at, d.first_failed_at))
             FROM polybus_deliveries d LEFT JOIN polybus_events e ON e.seq = d.seq WHERE d.group_id = ?1"
        ),
        [group],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)),
    )?;
    let dead =
        snapshot.query_row("SELECT count(*) FROM polybus_dead WHERE group_id = ?1", [group], |row| row.get(0))?;
    let mut types = snapshot.prepare_cached(
        "SELECT type, count(*), min(published_at) FROM polybus_events WHERE bus = ?1 AND seq > ?2 GROUP BY type",
    )?;
    let mut rows = types.query((bus, cursor))?;
    let (mut lag, mut oldest) = (unseen, oldest);
    while let Some(row) = rows.next()? {
        if pattern.matches(&row.get::<_, String>(0)?) {
            lag += row.get::<_, i64>(1)?;
            let published: i64 = row.get(2)?;
            oldest = Some(oldest.map_or(published, |oldest| oldest.min(published)));
        }
    }
    let now = clock::wall_ms();
    let count = |n: i64| n.max(0).unsigned_abs();
    Ok(GroupStats {
        lag: count(lag),
        in_flight: count(in_flight),
        retrying: count(waiting - unseen),
        dead: count(dead),
        expired: count(expired),
        oldest: oldest.map(|at| Duration::from_millis((now - at).max(0).unsigned_abs())),
    })
}

/// Forgets the group with all that is its own. Returns whether it existed.
pub(super) fn delete(tx: &Connection, bus: i64, name: &str) -> Result<bool> {
    let Some(group) = find(tx, bus, name)? else { return Ok(false) };
    for table in ["deliveries", "owners", "dead", "responders", "marks"] {
        tx.execute(&format!("DELETE FROM polybus_{table} WHERE group_id = ?1"), [group])?;
    }
    tx.execute("DELETE FROM polybus_groups WHERE id = ?1", [group])?;
    Ok(true)
}
