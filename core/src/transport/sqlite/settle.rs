//! Ending leases, keeping them, and handing them back.

use rusqlite::Connection;

use super::claim::{Member, Progress};
use super::clock;
use super::marks::{self, Held};
use crate::delivery::{DeadReason, Failure, Lease, Verdict};
use crate::error::Result;
use crate::transport::Settlement;

/// What became of a batch of settlements.
pub(super) struct Settled {
    /// Those that had no effect: the lease had passed to somebody else.
    pub lost: Vec<Lease>,
    /// Something waits now, for us or for another member.
    pub waiting: bool,
}

/// Ends the leases of `batch`, and the marks of those that have one. Each statement shows the token, so that a stale owner
/// changes nothing.
pub(super) fn settle(tx: &Connection, member: &Member, batch: &[Settlement], held: &[Held]) -> Result<Settled> {
    let mut settled = Settled { lost: Vec::new(), waiting: false };
    for mark in held {
        marks::end(tx, member, mark)?;
    }
    for Settlement { lease, verdict } in batch {
        let done = match verdict {
            Verdict::Ack | Verdict::Drop => finish(tx, member, *lease, &mut settled.waiting)?,
            Verdict::Retry { after, failure } => {
                settled.waiting = true;
                retry(tx, member, *lease, clock::wall_ms() + clock::millis(*after), failure)?
            }
            Verdict::Release => {
                settled.waiting = true;
                release(tx, member, *lease, 0)?
            }
            Verdict::Postpone { after } => {
                settled.waiting = true;
                release(tx, member, *lease, clock::wall_ms() + clock::millis(*after))?
            }
            Verdict::DeadLetter { reason, failure } => {
                bury(tx, member, (*lease, *reason), failure, &mut settled.waiting)?
            }
        };
        if !done {
            settled.lost.push(*lease);
        }
    }
    Ok(settled)
}

/// Removes a delivery; `waiting` becomes true when that lets another one go.
fn finish(tx: &Connection, member: &Member, lease: Lease, waiting: &mut bool) -> Result<bool> {
    let mut delete = tx.prepare_cached(
        "DELETE FROM polybus_deliveries WHERE group_id = ?1 AND seq = ?2 AND token = ?3 AND owner IS NOT NULL",
    )?;
    let before = tx.total_changes();
    let removed = delete.execute((member.group, lease.position, lease.token))? == 1;
    // More than our row: the lane went on, by the trigger.
    *waiting |= member.ordered && tx.total_changes() > before + 1;
    Ok(removed)
}

fn retry(tx: &Connection, member: &Member, lease: Lease, due_at: i64, failure: &Failure) -> Result<bool> {
    let error = serde_json::json!({
        "kind": failure.kind, "message": failure.message, "stack": failure.stack,
    });
    let mut wait = tx.prepare_cached(
        "UPDATE polybus_deliveries SET owner = NULL, due_at = ?4, error = ?5,
                first_failed_at = coalesce(first_failed_at, ?6)
         WHERE group_id = ?1 AND seq = ?2 AND token = ?3 AND owner IS NOT NULL",
    )?;
    let now = clock::wall_ms();
    Ok(wait.execute((member.group, lease.position, lease.token, due_at, error.to_string(), now))? == 1)
}

fn release(tx: &Connection, member: &Member, lease: Lease, due_at: i64) -> Result<bool> {
    let mut free = tx.prepare_cached(
        "UPDATE polybus_deliveries SET owner = NULL, due_at = ?4, attempt = max(attempt - 1, 0)
         WHERE group_id = ?1 AND seq = ?2 AND token = ?3 AND owner IS NOT NULL",
    )?;
    Ok(free.execute((member.group, lease.position, lease.token, due_at))? == 1)
}

/// Moves a delivery to the dead letters, with its event.
fn bury(
    tx: &Connection,
    member: &Member,
    (lease, reason): (Lease, DeadReason),
    failure: &Failure,
    waiting: &mut bool,
) -> Result<bool> {
    // Bytes that are no event have no type, so that no pattern finds them.
    let typed = reason != DeadReason::Undecodable;
    let mut insert = tx.prepare_cached(
        "INSERT INTO polybus_dead(bus, group_id, seq, type, event, error_kind, error_message, error_stack, attempts,
                first_failed_at, last_failed_at, subscription, reason, replayed_from, lane)
         SELECT g.bus, d.group_id, d.seq, CASE WHEN ?4 THEN coalesce(d.type, e.type) END,
                coalesce(d.event, e.event, x''), ?5, ?6, ?7, d.attempt - (?9 = 'expired'),
                coalesce(d.first_failed_at, ?8), ?8, g.subscription, ?9, d.replayed_from, d.lane
         FROM polybus_deliveries d JOIN polybus_groups g ON g.id = d.group_id
              LEFT JOIN polybus_events e ON e.seq = d.seq
         WHERE d.group_id = ?1 AND d.seq = ?2 AND d.token = ?3 AND d.owner IS NOT NULL",
    )?;
    let buried = insert.execute((
        member.group,
        lease.position,
        lease.token,
        typed,
        &failure.kind,
        &failure.message,
        &failure.stack,
        clock::wall_ms(),
        reason.as_str(),
    ))?;
    Ok(buried == 1 && finish(tx, member, lease, waiting)?)
}

/// Extends everything that the source holds. Returns those of `held` that were lost.
pub(super) fn heartbeat(
    tx: &Connection,
    member: &Member,
    progress: &mut Progress,
    held: &[Lease],
) -> Result<Vec<Lease>> {
    let until = clock::boot_ms() + member.lease;
    let Some(owner) = progress.owner else { return Ok(held.to_vec()) };
    let mut extend = tx.prepare_cached("UPDATE polybus_owners SET lease_until = ?2 WHERE id = ?1 AND group_id = ?3")?;
    if extend.execute((owner, until, member.group))? == 0 {
        progress.owner = None;
        return Ok(held.to_vec());
    }
    // The row lives, and whoever frees our deliveries removes it: what we took under this id is ours.
    Ok(held.iter().copied().filter(|lease| lease.token >> 32 != owner).collect())
}

/// Hands back all that the source holds and removes it from the owners. Returns whether something waits now.
pub(super) fn leave(tx: &Connection, member: &Member, progress: &Progress) -> Result<bool> {
    let mut freed = 0;
    if let Some(owner) = progress.owner {
        freed = tx
            .prepare_cached(
                "UPDATE polybus_deliveries SET owner = NULL, due_at = 0, attempt = max(attempt - 1, 0)
                 WHERE group_id = ?1 AND owner = ?2",
            )?
            .execute((member.group, owner))?;
        tx.prepare_cached("DELETE FROM polybus_owners WHERE id = ?1 AND group_id = ?2")?
            .execute((owner, member.group))?;
    }
    // What was looked at and does not match need not be looked at again, unless the pattern is another by now.
    tx.prepare_cached(
        "UPDATE polybus_groups SET cursor = max(cursor, ?2), last_seen = ?4 WHERE id = ?1 AND pattern = ?3",
    )?
    .execute((member.group, progress.scanned, progress.pattern.as_str(), clock::wall_ms()))?;
    Ok(freed > 0)
}
