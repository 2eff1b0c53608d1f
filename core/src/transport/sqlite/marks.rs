//! Which keys a group handles and has handled: for idempotent subscriptions.
//!
//! A mark that is being handled lives and dies with the lease of its delivery, so it has no heartbeat of its own, and one
//! whose process died is free as soon as the lease has run out. Ended in the transaction that settles the delivery.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};

use super::claim::Member;
use super::clock;
use crate::delivery::{Lease, Verdict};
use crate::error::Result;
use crate::event::Text;
use crate::transport::{Begun, Settlement};

/// The marks that one source holds.
#[derive(Default)]
pub(super) struct Marks(Mutex<HashMap<Lease, (Text, Duration), ahash::RandomState>>);

/// A mark that is to be ended.
pub(super) struct Held {
    lease: Lease,
    key: Text,
    /// How long it is to be remembered, in milliseconds; `None`: it is free.
    keep: Option<i64>,
}

impl Marks {
    fn lock(&self) -> MutexGuard<'_, HashMap<Lease, (Text, Duration), ahash::RandomState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are ours.
    pub(super) fn add(&self, begun: impl Iterator<Item = (Lease, Text)>, keep: Duration) {
        self.lock().extend(begun.map(|(lease, key)| (lease, (key, keep))));
    }

    /// Those of `settlements` that have a mark, and what becomes of it.
    pub(super) fn of(&self, settlements: &[Settlement]) -> (Vec<Lease>, Vec<Held>) {
        let marks = self.lock();
        if marks.is_empty() {
            return Default::default(); // as in every subscription that is not idempotent
        }
        let held = settlements.iter().filter_map(|Settlement { lease, verdict }| {
            let (key, keep) = marks.get(lease)?;
            let keep = (*verdict == Verdict::Ack).then(|| clock::millis(*keep));
            Some((*lease, Held { lease: *lease, key: key.clone(), keep }))
        });
        held.unzip()
    }

    /// These have ended.
    pub(super) fn forget(&self, leases: &[Lease]) {
        if !leases.is_empty() {
            let mut marks = self.lock();
            leases.iter().for_each(|lease| drop(marks.remove(lease)));
        }
    }
}

/// Marks `key` for a delivery that we hold, unless it was handled, or is being handled by somebody whose lease lives.
pub(super) fn begin(tx: &Connection, member: &Member, lease: Lease, key: &str) -> Result<Begun> {
    let now = clock::wall_ms();
    let mut find = tx.prepare_cached(
        "SELECT m.until, m.since, m.seq = ?3 AND m.token = ?4 OR NOT EXISTS(
             SELECT 1 FROM polybus_deliveries d JOIN polybus_owners o ON o.id = d.owner
             WHERE d.group_id = m.group_id AND d.seq = m.seq AND d.token = m.token AND o.lease_until > ?5)
         FROM polybus_marks m WHERE m.group_id = ?1 AND m.key = ?2",
    )?;
    let known = find.query_row((member.group, key, lease.position, lease.token, clock::boot_ms()), |row| {
        Ok((row.get::<_, Option<i64>>(0)?, row.get::<_, i64>(1)?, row.get::<_, bool>(2)?))
    });
    match known.optional()? {
        Some((Some(until), ..)) if until > now => return Ok(Begun::Duplicate),
        Some((None, since, false)) => {
            return Ok(Begun::Busy(Duration::from_millis((now - since).max(0).unsigned_abs())));
        }
        _ => {}
    }
    tx.prepare_cached(
        "INSERT OR REPLACE INTO polybus_marks(group_id, key, seq, token, since, until) VALUES(?1, ?2, ?3, ?4, ?5, NULL)",
    )?
    .execute((member.group, key, lease.position, lease.token, now))?;
    Ok(Begun::Run)
}

/// Ends a mark, if it is still the one of that delivery.
pub(super) fn end(tx: &Connection, member: &Member, Held { lease, key, keep }: &Held) -> Result<()> {
    let ours = "group_id = ?1 AND key = ?2 AND seq = ?3 AND token = ?4";
    match keep {
        Some(keep) => tx.prepare_cached(&format!("UPDATE polybus_marks SET until = ?5 WHERE {ours}"))?.execute((
            member.group,
            &**key,
            lease.position,
            lease.token,
            clock::wall_ms() + keep,
        ))?,
        None => tx.prepare_cached(&format!("DELETE FROM polybus_marks WHERE {ours}"))?.execute((
            member.group,
            &**key,
            lease.position,
            lease.token,
        ))?,
    };
    Ok(())
}

/// Whether some key need not be remembered any more, of a group or of what was published. Reads only.
pub(super) fn stale(connection: &Connection) -> Result<bool> {
    let mut find = connection.prepare_cached(
        "SELECT EXISTS(SELECT 1 FROM polybus_marks WHERE until <= ?1) OR
                EXISTS(SELECT 1 FROM polybus_published WHERE until <= ?1)",
    )?;
    Ok(find.query_row([clock::wall_ms()], |row| row.get(0))?)
}

/// Forgets up to `most` keys of each kind. Returns how many.
pub(super) fn forget(tx: &Connection, most: i64) -> Result<i64> {
    let now = clock::wall_ms();
    let mut forgotten = 0;
    for sql in [
        "DELETE FROM polybus_marks WHERE (group_id, key) IN
         (SELECT group_id, key FROM polybus_marks WHERE until <= ?1 LIMIT ?2)",
        "DELETE FROM polybus_published WHERE (bus, key) IN
         (SELECT bus, key FROM polybus_published WHERE until <= ?1 LIMIT ?2)",
    ] {
        forgotten += tx.prepare_cached(sql)?.execute((now, most))?;
    }
    Ok(i64::try_from(forgotten).unwrap_or(i64::MAX))
}
