//! Taking deliveries.
//!
//! A claim first looks without a transaction (`probe`): most looks find nothing, and a group that is woken by events
//! that it does not want must not write. What `probe` scanned is kept in memory ([`Progress::scanned`]) and saved only
//! when it is far ahead of the group's stored cursor.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension};
use tokio::sync::oneshot;

use super::job::{Job, Probe};
use super::{clock, fault, lane, publish};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::pattern::Pattern;

/// Rows that one claim looks at before it lets other jobs run.
const SCAN: usize = 5_000;
/// Bytes that one claim takes at most.
const BYTES: usize = 4 << 20;
/// How often one claim looks for what waits again, because all of it had expired.
const ROUNDS: usize = 100;
/// How far the position in memory may run ahead of the stored one.
const LAZY: i64 = 1_000;

/// What a source is a member of.
pub(super) struct Member {
    pub bus: i64,
    pub group: i64,
    pub name: Text,
    /// Events of one key in order.
    pub ordered: bool,
    /// Milliseconds.
    pub lease: i64,
    /// Names our row in `polybus_responders`.
    pub responder: Option<i64>,
    /// Hand out what has expired, marked.
    pub keep_expired: bool,
}

/// What a source remembers between takes. The writer thread and the source share it.
pub(super) struct Progress {
    /// Names our row in `polybus_owners`, and is the upper half of our tokens. `None` until the first take, and after
    /// the row was found missing: then what we held under it was given to others.
    pub owner: Option<i64>,
    pub counter: u32,
    /// All at or before this is taken or does not match.
    pub scanned: i64,
    pub pattern: Pattern,
    /// Taken, and not yet handed to a caller: a dropped `take` leaves its deliveries here for the next one.
    pub ready: VecDeque<Taken>,
    /// The source has left: a claim that was queued after that must not take anything.
    pub closed: bool,
}

/// A leased delivery, as stored.
#[derive(Debug, Clone)]
pub(super) struct Taken {
    pub position: i64,
    pub token: i64,
    pub attempt: u32,
    pub redelivered: bool,
    pub first_failed_at: Option<i64>,
    pub bytes: Bytes,
    pub expired: bool,
}

/// When to look again if nobody rings.
pub(super) type Again = Option<Duration>;

/// The job.
pub(super) struct Claim {
    member: Arc<Member>,
    progress: Arc<Mutex<Progress>>,
    instance: Text,
    max: usize,
    taken: Vec<Taken>,
    scanned: i64,
    promoted: bool,
    again: Again,
    reply: oneshot::Sender<Result<Again>>,
}

/// Locks what a source remembers.
pub(super) fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Claim {
    /// The job, and where it says that it is done. What it took is in `progress.ready`.
    pub(super) fn new(
        member: Arc<Member>,
        progress: Arc<Mutex<Progress>>,
        instance: Text,
        max: usize,
    ) -> (Box<Self>, oneshot::Receiver<Result<Again>>) {
        let (reply, answer) = oneshot::channel();
        let claim = Self {
            member,
            progress,
            instance,
            max: max.max(1),
            taken: Vec::new(),
            scanned: 0,
            promoted: false,
            again: None,
            reply,
        };
        (Box::new(claim), answer)
    }
}

impl Job for Claim {
    fn probe(&mut self, connection: &Connection) -> Result<Probe> {
        let progress = self.progress.clone();
        let mut progress = lock(&progress);
        if progress.closed {
            return Err(fault::closed());
        }
        let stored = follow(connection, &self.member, &mut progress)?;
        let (wall, boot) = (clock::wall_ms(), clock::boot_ms());
        let waiting: Option<i64> = connection
            .prepare_cached("SELECT min(due_at) FROM polybus_deliveries WHERE group_id = ?1 AND owner IS NULL")?
            .query_row([self.member.group], |row| row.get(0))?;
        let delayed = publish::next_delayed(connection, self.member.bus)?;
        let owner: Option<i64> = connection
            .prepare_cached("SELECT min(lease_until) FROM polybus_owners WHERE group_id = ?1 AND id <> ?2")?
            .query_row((self.member.group, progress.owner.unwrap_or(0)), |row| row.get(0))?;
        let due = [waiting, delayed].into_iter().flatten().map(|at| at - wall);
        let soonest = due.chain(owner.map(|until| until - boot)).min();
        if soonest.is_some_and(|left| left <= 0) {
            return Ok(Probe::Write);
        }
        let look = look(connection, &self.member, &mut progress)?;
        if look == Look::Found || progress.scanned > stored + LAZY {
            return Ok(Probe::Write);
        }
        self.again = match look {
            Look::More => Some(Duration::ZERO),
            _ => soonest.map(|left| Duration::from_millis(left.unsigned_abs())),
        };
        Ok(Probe::Done)
    }

    fn run(&mut self, tx: &Connection) -> Result<()> {
        let progress = self.progress.clone();
        let mut progress = lock(&progress);
        self.taken.clear();
        if progress.closed {
            return Err(fault::closed());
        }
        follow(tx, &self.member, &mut progress)?;
        self.promoted = publish::promote(tx, self.member.bus)? > 0;
        enrol(tx, &self.member, &mut progress, &self.instance)?;
        reclaim(tx, &self.member, progress.owner)?;
        self.scanned = progress.scanned;
        let mut expired = self.take_waiting(tx, &mut progress)?;
        // Behind one that had expired, in its lane, there may be another.
        let mut again = if self.member.ordered { expired } else { 0 };
        for _ in 0..ROUNDS {
            if again == 0 || self.taken.len() >= self.max {
                break;
            }
            again = self.take_waiting(tx, &mut progress)?;
            expired += again;
        }
        expired += self.take_new(tx, &mut progress)?;
        tx.prepare_cached(
            "UPDATE polybus_groups SET cursor = max(cursor, ?2), expired = expired + ?3, last_seen = ?4 WHERE id = ?1",
        )?
        .execute((self.member.group, self.scanned, expired, clock::wall_ms()))?;
        // Look again at once: there may be more than `max`, or more than one look covers.
        self.again = Some(Duration::ZERO);
        Ok(())
    }

    fn finish(self: Box<Self>, outcome: Result<()>) -> bool {
        if outcome.is_ok() {
            let mut progress = lock(&self.progress);
            progress.scanned = progress.scanned.max(self.scanned);
            progress.ready.extend(self.taken);
        }
        let _ = self.reply.send(outcome.map(|()| self.again));
        self.promoted
    }

    fn size(&self) -> (usize, usize) {
        (self.max, 0)
    }
}

/// Reads the group's row: the cursor moves only forward, the pattern may have been replaced by a newer subscriber.
fn follow(connection: &Connection, member: &Member, progress: &mut Progress) -> Result<i64> {
    let mut group = connection.prepare_cached("SELECT cursor, pattern FROM polybus_groups WHERE id = ?1")?;
    let found = group.query_row([member.group], |row| {
        let pattern = row.get_ref(1)?.as_str()?;
        let changed = (pattern != progress.pattern.as_str()).then(|| pattern.to_owned());
        Ok((row.get::<_, i64>(0)?, changed))
    });
    let Some((cursor, changed)) = found.optional()? else {
        return Err(Error::not_found(format!("group {:?} was deleted while this process was subscribed", member.name)));
    };
    match changed {
        // What the old pattern skipped may match the new one.
        Some(pattern) => (progress.pattern, progress.scanned) = (Pattern::new(pattern)?, cursor),
        None => progress.scanned = progress.scanned.max(cursor),
    }
    Ok(cursor)
}

#[derive(PartialEq)]
enum Look {
    Found,
    Nothing,
    More,
}

/// Moves `scanned` to just before the first new event that matches.
fn look(connection: &Connection, member: &Member, progress: &mut Progress) -> Result<Look> {
    let mut events =
        connection.prepare_cached("SELECT seq, bus, type FROM polybus_events WHERE seq > ?1 ORDER BY seq")?;
    let mut rows = events.query([progress.scanned])?;
    for _ in 0..SCAN {
        let Some(row) = rows.next()? else { return Ok(Look::Nothing) };
        if row.get::<_, i64>(1)? == member.bus && progress.pattern.matches(row.get_ref(2)?.as_str().map_err(sql)?) {
            return Ok(Look::Found);
        }
        progress.scanned = row.get(0)?;
    }
    Ok(Look::More)
}

fn sql(cause: rusqlite::types::FromSqlError) -> Error {
    rusqlite::Error::from(cause).into()
}

/// Extends our row among the owners, or makes a new one under a new id.
fn enrol(tx: &Connection, member: &Member, progress: &mut Progress, instance: &str) -> Result<()> {
    let until = clock::boot_ms() + member.lease;
    if let Some(owner) = progress.owner {
        let mut extend =
            tx.prepare_cached("UPDATE polybus_owners SET lease_until = ?2 WHERE id = ?1 AND group_id = ?3")?;
        if extend.execute((owner, until, member.group))? == 1 && progress.counter < u32::MAX / 2 {
            return Ok(());
        }
    }
    let mut enter = tx.prepare_cached(
        "INSERT OR IGNORE INTO polybus_owners(id, group_id, instance, lease_until) VALUES(?1, ?2, ?3, ?4)",
    )?;
    loop {
        // 31 random bits, so that a token of 63 bits is not used twice by any two owners that ever met.
        let owner = i64::from(fastrand::i32(1..));
        if enter.execute((owner, member.group, instance, until))? == 1 {
            (progress.owner, progress.counter) = (Some(owner), 0);
            return Ok(());
        }
    }
}

/// Frees what owners without a living lease hold. Their attempts count: the process died in the handler, perhaps of it.
fn reclaim(tx: &Connection, member: &Member, ours: Option<i64>) -> Result<()> {
    let mut dead =
        tx.prepare_cached("SELECT id FROM polybus_owners WHERE group_id = ?1 AND id <> ?2 AND lease_until <= ?3")?;
    let dead: Vec<i64> = dead
        .query_map((member.group, ours.unwrap_or(0), clock::boot_ms()), |row| row.get(0))?
        .collect::<rusqlite::Result<_>>()?;
    for owner in dead {
        let freed = tx
            .prepare_cached(
                "UPDATE polybus_deliveries SET owner = NULL, due_at = 0 WHERE group_id = ?1 AND owner = ?2",
            )?
            .execute((member.group, owner))?;
        tx.prepare_cached("DELETE FROM polybus_owners WHERE id = ?1")?.execute([owner])?;
        if freed > 0 {
            log::info!("group {}: {freed} deliveries of a member that stopped are delivered again", member.name);
        }
    }
    Ok(())
}

fn token(progress: &mut Progress) -> Result<(i64, i64)> {
    let owner = progress.owner.ok_or_else(fault::closed)?;
    progress.counter += 1;
    Ok((owner, owner << 32 | i64::from(progress.counter)))
}

impl Claim {
    /// Takes what waits and is due: freed deliveries first, then retries in the order of their times. Returns how many
    /// had expired.
    fn take_waiting(&mut self, tx: &Connection, progress: &mut Progress) -> Result<i64> {
        let now = clock::wall_ms();
        let mut due = tx.prepare_cached(
            "SELECT d.seq, d.attempt, d.first_failed_at, coalesce(d.event, e.event),
                    CASE WHEN d.event IS NULL THEN e.expires_at END, d.token <> 0 OR d.replayed_from IS NOT NULL
             FROM polybus_deliveries d LEFT JOIN polybus_events e ON e.seq = d.seq
             WHERE d.group_id = ?1 AND d.owner IS NULL AND d.due_at <= ?2 ORDER BY d.due_at, d.seq LIMIT ?3",
        )?;
        let mut expired = Vec::new();
        let begin = self.taken.len();
        let mut bytes = self.taken.iter().map(|taken| taken.bytes.len()).sum::<usize>();
        let limit = i64::try_from(self.max - begin).unwrap_or(i64::MAX);
        let mut rows = due.query((self.member.group, now, limit))?;
        while bytes < BYTES
            && let Some(row) = rows.next()?
        {
            let position = row.get(0)?;
            let until: Option<i64> = row.get(4)?;
            let Some(event) = row.get_ref(3)?.as_blob_or_null().map_err(sql)? else {
                expired.push(position); // a limit of the user removed the event
                continue;
            };
            let late = until.is_some_and(|until| until <= now);
            if late && !self.member.keep_expired {
                expired.push(position);
                continue;
            }
            bytes += event.len();
            self.taken.push(Taken {
                position,
                token: 0,
                attempt: row.get::<_, u32>(1)?.saturating_add(1),
                // The first of its lane may have waited there without being taken.
                redelivered: row.get(5)?,
                first_failed_at: row.get(2)?,
                bytes: Bytes::copy_from_slice(event),
                expired: late,
            });
        }
        // Written after the reading statement is done: it walks the index that these updates change.
        drop(rows);
        let mut lease = tx.prepare_cached(
            "UPDATE polybus_deliveries SET owner = ?3, token = ?4, attempt = ?5 WHERE group_id = ?1 AND seq = ?2",
        )?;
        for taken in &mut self.taken[begin..] {
            let (owner, token) = token(progress)?;
            taken.token = token;
            lease.execute((self.member.group, taken.position, owner, token, taken.attempt))?;
        }
        for position in &expired {
            tx.prepare_cached("DELETE FROM polybus_deliveries WHERE group_id = ?1 AND seq = ?2")?
                .execute((self.member.group, position))?;
        }
        Ok(i64::try_from(expired.len()).unwrap_or(i64::MAX))
    }

    /// Takes new events in the order of the log. Returns how many had expired.
    fn take_new(&mut self, tx: &Connection, progress: &mut Progress) -> Result<i64> {
        let now = clock::wall_ms();
        let mut events = tx.prepare_cached(
            "SELECT seq, bus, type, expires_at, event FROM polybus_events WHERE seq > ?1 ORDER BY seq",
        )?;
        let mut lease = tx.prepare_cached(
            "INSERT INTO polybus_deliveries(group_id, seq, owner, token, attempt) VALUES(?1, ?2, ?3, ?4, 1)",
        )?;
        let group = self.member.group;
        let mut expired = 0;
        let mut bytes: usize = self.taken.iter().map(|taken| taken.bytes.len()).sum();
        let mut rows = events.query([self.scanned])?;
        for _ in 0..SCAN {
            if self.taken.len() >= self.max || bytes >= BYTES {
                break;
            }
            let Some(row) = rows.next()? else { break };
            let position = row.get(0)?;
            let ours = row.get::<_, i64>(1)? == self.member.bus;
            if ours && progress.pattern.matches(row.get_ref(2)?.as_str().map_err(sql)?) {
                let late = row.get::<_, Option<i64>>(3)?.is_some_and(|until| until <= now);
                if late && !self.member.keep_expired {
                    expired += 1;
                } else {
                    let event = row.get_ref(4)?.as_blob().map_err(sql)?;
                    let key = if self.member.ordered { lane::of(event) } else { None };
                    if let Some(key) = &key
                        && lane::is_busy(tx, group, key)?
                    {
                        lane::park(tx, group, position, key)?;
                        self.scanned = position;
                        continue;
                    }
                    let (owner, token) = token(progress)?;
                    match key {
                        None => lease.execute((group, position, owner, token))?,
                        Some(key) => tx
                            .prepare_cached(
                                "INSERT INTO polybus_deliveries(group_id, seq, owner, token, attempt, lane)
                                 VALUES(?1, ?2, ?3, ?4, 1, ?5)",
                            )?
                            .execute((group, position, owner, token, &*key))?,
                    };
                    bytes += event.len();
                    self.taken.push(Taken {
                        position,
                        token,
                        attempt: 1,
                        redelivered: false,
                        first_failed_at: None,
                        bytes: Bytes::copy_from_slice(event),
                        expired: late,
                    });
                }
            }
            self.scanned = position;
        }
        Ok(expired)
    }
}
