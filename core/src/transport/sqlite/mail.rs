//! Replies to requests, and who answers requests.
//!
//! Times are boot time: both are about elapsed time, on one machine, and mean nothing after a reboot.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::Connection;
use tokio::sync::oneshot;

use super::clock;
use super::job::{Job, Probe};
use super::store::{Store, answered};
use crate::error::Result;
use crate::event::Text;
use crate::pattern::Pattern;
use crate::transport::{Mailbox, Task};

/// Longest wait of one look.
const WAIT: Duration = Duration::from_secs(1);

/// Puts a letter into the box. Removes what nobody fetched in time, in every box.
pub(super) fn post(tx: &Connection, mailbox: &str, letter: &[u8], ttl: Duration) -> Result<()> {
    clean(tx)?;
    tx.prepare_cached("INSERT INTO polybus_mail(mailbox, letter, expires_at) VALUES(?1, ?2, ?3)")?.execute((
        mailbox,
        letter,
        clock::boot_ms() + clock::millis(ttl),
    ))?;
    Ok(())
}

/// Removes letters whose time is over.
pub(super) fn clean(tx: &Connection) -> Result<()> {
    tx.prepare_cached("DELETE FROM polybus_mail WHERE expires_at <= ?1")?.execute([clock::boot_ms()])?;
    Ok(())
}

/// Whether [`clean`] would remove any.
pub(super) fn is_stale(connection: &Connection) -> Result<bool> {
    let mut stale = connection.prepare_cached("SELECT EXISTS(SELECT 1 FROM polybus_mail WHERE expires_at <= ?1)")?;
    Ok(stale.query_row([clock::boot_ms()], |row| row.get(0))?)
}

/// A sign of life of a responder.
pub(super) fn be_there(tx: &Connection, responder: Option<i64>, group: i64, lease: i64) -> Result<()> {
    let Some(id) = responder else { return Ok(()) };
    let now = clock::boot_ms();
    tx.prepare_cached("DELETE FROM polybus_responders WHERE alive_until <= ?1")?.execute([now])?;
    tx.prepare_cached("INSERT OR REPLACE INTO polybus_responders(id, group_id, alive_until) VALUES(?1, ?2, ?3)")?
        .execute((id, group, now + lease))?;
    Ok(())
}

/// It has left.
pub(super) fn be_gone(tx: &Connection, responder: Option<i64>) -> Result<()> {
    let Some(id) = responder else { return Ok(()) };
    tx.prepare_cached("DELETE FROM polybus_responders WHERE id = ?1")?.execute([id])?;
    Ok(())
}

/// Whether a responder that lives answers requests of this type.
pub(super) fn has_responder(connection: &Connection, bus: i64, event_type: &str) -> Result<bool> {
    let mut patterns = connection.prepare_cached(
        "SELECT DISTINCT g.pattern FROM polybus_responders r JOIN polybus_groups g ON g.id = r.group_id
         WHERE g.bus = ?1 AND r.alive_until > ?2",
    )?;
    let mut rows = patterns.query((bus, clock::boot_ms()))?;
    while let Some(row) = rows.next()? {
        if Pattern::new(row.get::<_, String>(0)?)?.matches(event_type) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The reading end.
pub(super) struct SqliteMailbox {
    store: Arc<Store>,
    name: Text,
}

impl SqliteMailbox {
    pub(super) fn new(store: Arc<Store>, name: Text) -> Self {
        Self { store, name }
    }
}

impl Mailbox for SqliteMailbox {
    fn next(&self) -> Task<Result<Vec<Bytes>>> {
        let (store, name) = (self.store.clone(), self.name.clone());
        Box::pin(async move {
            store.check()?;
            let mut bell = store.bell.listen();
            let deadline = tokio::time::Instant::now() + WAIT;
            loop {
                bell.borrow_and_update(); // before the look: a ring that comes while we look must not be missed
                let letters = look(&store, &name).await?;
                if !letters.is_empty() {
                    return Ok(letters);
                }
                match tokio::time::timeout_at(deadline, bell.changed()).await {
                    Ok(_) => {}
                    Err(_) => return look(&store, &name).await,
                }
            }
        })
    }
}

async fn look(store: &Store, name: &Text) -> Result<Vec<Bytes>> {
    let (reply, answer) = oneshot::channel();
    store.send(Box::new(Look { name: name.clone(), found: Vec::new(), reply }))?;
    answered(answer.await)
}

/// Takes what lies in a box. Writes only if there is something.
struct Look {
    name: Text,
    found: Vec<Bytes>,
    reply: oneshot::Sender<Result<Vec<Bytes>>>,
}

impl Job for Look {
    fn probe(&mut self, connection: &Connection) -> Result<Probe> {
        let mut any = connection.prepare_cached("SELECT EXISTS(SELECT 1 FROM polybus_mail WHERE mailbox = ?1)")?;
        let any: bool = any.query_row([&*self.name], |row| row.get(0))?;
        Ok(if any { Probe::Write } else { Probe::Done })
    }

    fn run(&mut self, tx: &Connection) -> Result<()> {
        self.found.clear();
        let mut take = tx.prepare_cached("DELETE FROM polybus_mail WHERE mailbox = ?1 RETURNING letter, expires_at")?;
        let mut rows = take.query([&*self.name])?;
        let now = clock::boot_ms();
        while let Some(row) = rows.next()? {
            if row.get::<_, i64>(1)? > now {
                self.found.push(row.get::<_, Vec<u8>>(0)?.into());
            }
        }
        Ok(())
    }

    fn finish(self: Box<Self>, outcome: Result<()>) -> bool {
        let Self { reply, found, .. } = *self;
        let _ = reply.send(outcome.map(|()| found)); // the requester may have left
        false
    }

    fn size(&self) -> (usize, usize) {
        (1, 0)
    }
}
