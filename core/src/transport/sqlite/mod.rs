//! One file, shared by the processes of one machine.
//!
//! | part | its duty |
//! |---|---|
//! | [`mod@file`], [`schema`] | from the URL to a file that is ours; the tables |
//! | [`store`], [`writer`], [`job`] | one store for each file and process; one thread that writes, in shared transactions |
//! | [`lock`], [`doorbell`] | between processes: whose turn it is to write, and waking who waits |
//! | [`fork`], [`guard`] | what would lose committed events without anybody noticing |
//! | [`publish`], [`claim`], [`marks`], [`settle`], [`dead`], [`group`], [`history`], [`retention`] | the SQL, one concern each |
//! | [`mail`] | replies to requests, and who answers them |
//! | [`source`], [`broadcast`] | the two kinds of subscription |
//!
//! The tables, and so the data structures, are described in [`schema`]; the life of a transaction in [`writer`].
//!
//! Only this library may open the file in a process that runs a bus: a second SQLite library would break its locks.
//! `<db>.lock` and `<db>.bell` lie beside SQLite's own `-wal` and `-shm`; they hold no data.

mod broadcast;
mod claim;
mod clock;
mod dead;
mod doorbell;
mod fault;
mod file;
mod fork;
mod group;
mod guard;
mod history;
mod job;
mod lane;
mod lock;
mod mail;
mod marks;
mod publish;
mod retention;
mod schema;
mod settle;
mod source;
mod store;
mod writer;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use self::dead::Change;
use self::job::Made;
use self::retention::Limits;
use self::store::Store;
use bytes::Bytes;

use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, ReplayBatch, ReplayStep};
use crate::transport::room::Room;
use crate::transport::{
    Capabilities, Durability, GroupSpec, GroupStats, Guarantees, Mailbox, Outgoing, Receipt, Settings, Source, Task,
    Transport,
};

pub(super) use self::file::path_of;

/// Longest time that a caller may wait, so that adding it to a clock cannot overflow.
const FOR_EVER: Duration = Duration::from_secs(86_400 * 365);

/// How long finished events stay unless the user says otherwise: disks are large.
const RETENTION: Duration = Duration::from_secs(3600);

struct Sqlite {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    bus: i64,
    settings: Settings,
    room: Room,
    limits: Limits,
    sources: Mutex<Vec<Weak<dyn Source>>>,
    closed: AtomicBool,
}

/// Opens the file at `path`, making it if there is none.
pub(super) fn open(path: PathBuf, settings: Settings) -> Task<Result<Arc<dyn Transport>>> {
    Box::pin(async move { Shared::open(path, settings).await.map_err(|cause| cause.during("open")) })
}

impl Shared {
    async fn open(path: PathBuf, settings: Settings) -> Result<Arc<dyn Transport>> {
        let full = settings.durability != Durability::Normal;
        let store = store::open(path, full, settings.allow_network_fs).await?;
        let name = settings.bus.clone();
        let bus = match store.write(1, move |tx| Ok(Made::quiet(group::bus(tx, &name)?))).await {
            Ok(bus) => bus,
            Err(cause) => {
                store.leave();
                return Err(cause);
            }
        };
        let retention = settings.retention.unwrap_or(RETENTION);
        let limits = Limits {
            bus,
            retention,
            max_age: settings.max_age,
            max_events: settings.max_events,
            max_bytes: settings.max_bytes,
        };
        store.limits().lock().unwrap_or_else(PoisonError::into_inner).push(limits.clone());
        let room = Room::new(settings.publish_buffer_bytes, settings.when_full);
        let (sources, closed) = (Mutex::default(), AtomicBool::new(false));
        let shared = Self { store, bus, settings, room, limits, sources, closed };
        Ok(Arc::new(Sqlite { shared: Arc::new(shared) }))
    }

    fn check(&self) -> Result<()> {
        self.store.check()?;
        if self.closed.load(Ordering::Acquire) { Err(fault::closed()) } else { Ok(()) }
    }

    async fn subscribe(&self, spec: GroupSpec) -> Result<Arc<dyn Source>> {
        self.check()?;
        let (store, max_payload) = (self.store.clone(), self.settings.max_payload_bytes);
        let source: Arc<dyn Source> = if spec.broadcast {
            broadcast::join(store, self.bus, spec, max_payload).await?
        } else {
            source::join(store, self.bus, spec, max_payload).await?
        };
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.retain(|source| source.strong_count() > 0);
        sources.push(Arc::downgrade(&source));
        drop(sources);
        self.check()?; // closed meanwhile: dropping the source leaves the group
        Ok(source)
    }

    async fn guarantees(&self) -> Result<Guarantees> {
        self.check()?;
        let full = self.store.is_full();
        let journal: String =
            self.store.read(|c| Ok(c.query_row("PRAGMA journal_mode", [], |row| row.get(0))?)).await?;
        let mut warnings = Vec::new();
        if !full {
            warnings.push(
                "a power loss may undo the last publishes (durability normal); set durability to full to keep them"
                    .to_owned(),
            );
        }
        if self.store.file_system == "tmpfs" {
            warnings.push("the file is in memory (tmpfs) and does not survive a reboot; put it on a disk".to_owned());
        }
        Ok(Guarantees {
            transport: "sqlite",
            delivery: "at-least-once",
            durability: if full { "disk" } else { "process" },
            ordering: "publish",
            details: vec![
                ("sqlite", rusqlite::version().to_owned()),
                ("journal_mode", journal),
                ("synchronous", if full { "full" } else { "normal" }.to_owned()),
                ("file_system", self.store.file_system.clone()),
                ("path", self.store.path.display().to_string()),
            ],
            warnings,
        })
    }

    async fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Result<Vec<Receipt>> {
        self.check()?;
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let deadline = tokio::time::Instant::now() + timeout.min(FOR_EVER);
        let (rows, bytes) = publish::encode(&batch, &self.settings)?;
        drop(batch);
        let (bus, count) = (self.bus, rows.len());
        let insert = move |tx: &rusqlite::Connection| Ok(Made::ring(publish::insert(tx, bus, &rows)?));
        let room = self.room.enter(count, bytes, deadline).await?;
        self.store.publish((count, bytes), deadline, room, insert).await
    }

    async fn change_dead(&self, filter: DeadLetterFilter, change: Change) -> Result<u64> {
        self.check()?;
        let bus = self.bus;
        let newest = self.store.read(dead::newest).await?;
        let (mut after, mut total) = (0, 0);
        loop {
            let filter = filter.clone();
            let step = move |tx: &rusqlite::Connection| {
                let step = dead::step(tx, bus, &filter, change, (after, newest))?;
                let ring = change == Change::Replay && step.changed > 0;
                Ok(Made { value: step, ring })
            };
            let step = self.store.write(dead::STEP, step).await?;
            total += step.changed;
            match step.next {
                Some(next) => after = next,
                None => return Ok(total),
            }
        }
    }

    async fn close(&self) {
        if self.store.check().is_err() || self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let sources = std::mem::take(&mut *self.sources.lock().unwrap_or_else(PoisonError::into_inner));
        for source in sources.iter().filter_map(Weak::upgrade) {
            source.close().await;
        }
        self.leave();
        self.store.closed().await;
    }

    fn leave(&self) {
        let mut limits = self.store.limits().lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = limits.iter().position(|limits| *limits == self.limits) {
            limits.swap_remove(index);
        }
        drop(limits);
        self.store.leave();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.store.check().is_ok() && !self.closed.swap(true, Ordering::AcqRel) {
            self.leave();
        }
    }
}

/// A boxed future of the shared part, with the name of the call in its errors.
macro_rules! task {
    ($self:ident, $name:literal, |$shared:ident| $body:expr) => {{
        let $shared = $self.shared.clone();
        Box::pin(async move { async { $body }.await.map_err(|cause: Error| cause.during($name)) })
    }};
}

impl Transport for Sqlite {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable: true,
            cross_process: true,
            ack: true,
            delayed_retry: true,
            delayed_publish: true,
            dead_letters: true,
            start_position: true,
            broadcast: true,
            ordered: true,
            request: true,
            idempotent: true,
            publish_dedupe: true,
            history: true,
        }
    }

    fn guarantees(&self) -> Task<Result<Guarantees>> {
        task!(self, "guarantees", |shared| shared.guarantees().await)
    }

    fn publish(&self, batch: Vec<Outgoing>, timeout: Duration) -> Task<Result<Vec<Receipt>>> {
        task!(self, "publish", |shared| shared.publish(batch, timeout).await)
    }

    fn subscribe(&self, spec: GroupSpec) -> Task<Result<Arc<dyn Source>>> {
        task!(self, "subscribe", |shared| shared.subscribe(spec).await)
    }

    fn group_stats(&self, group: Text) -> Task<Result<GroupStats>> {
        task!(self, "group stats", |shared| {
            shared.check()?;
            let bus = shared.bus;
            shared.store.read(move |connection| group::stats(connection, bus, &group)).await
        })
    }

    fn delete_group(&self, group: Text) -> Task<Result<bool>> {
        task!(self, "delete group", |shared| {
            shared.check()?;
            let bus = shared.bus;
            // Rings so that members find out that their group is gone.
            shared.store.write(1, move |tx| Ok(Made::ring(group::delete(tx, bus, &group)?))).await
        })
    }

    fn dead_letters(
        &self,
        filter: DeadLetterFilter,
        after: Option<Text>,
        limit: usize,
    ) -> Task<Result<Vec<DeadLetter>>> {
        task!(self, "dead letters", |shared| {
            shared.check()?;
            let (bus, max_payload) = (shared.bus, shared.settings.max_payload_bytes);
            let after = match after {
                None => 0,
                Some(id) => dead::parse(&id)
                    .ok_or_else(|| Error::not_found(format!("there is no dead letter {id:?} to continue after")))?,
            };
            shared.store.read(move |connection| dead::list(connection, bus, &filter, after, limit, max_payload)).await
        })
    }

    fn dead_count(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "dead letters", |shared| {
            shared.check()?;
            let bus = shared.bus;
            shared.store.read(move |connection| dead::count(connection, bus, &filter)).await
        })
    }

    fn dead_replay(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "replay", |shared| shared.change_dead(filter, Change::Replay).await)
    }

    fn dead_purge(&self, filter: DeadLetterFilter) -> Task<Result<u64>> {
        task!(self, "purge", |shared| shared.change_dead(filter, Change::Purge).await)
    }

    fn responders(&self, event_type: Text) -> Task<Result<Option<bool>>> {
        task!(self, "request", |shared| {
            shared.check()?;
            let bus = shared.bus;
            shared.store.read(move |connection| mail::has_responder(connection, bus, &event_type)).await.map(Some)
        })
    }

    fn post(&self, mailbox: Text, letter: Bytes, ttl: Duration) -> Task<Result<()>> {
        task!(self, "reply", |shared| {
            shared.check()?;
            shared.store.write(1, move |tx| Ok(Made::ring(mail::post(tx, &mailbox, &letter, ttl)?))).await
        })
    }

    fn mailbox(&self, name: Text) -> Result<Box<dyn Mailbox>> {
        self.shared.check()?;
        Ok(Box::new(mail::SqliteMailbox::new(self.shared.store.clone(), name)))
    }

    fn history(
        &self,
        filter: HistoryFilter,
        after: Option<Text>,
        limit: usize,
        records: bool,
    ) -> Task<Result<Vec<HistoryEntry>>> {
        task!(self, "history", |shared| {
            shared.check()?;
            let (bus, max_payload) = (shared.bus, shared.settings.max_payload_bytes);
            let after = history::position(after.as_ref())?;
            let list = move |connection: &rusqlite::Connection| {
                history::list(connection, bus, &filter, (after, limit), records, max_payload)
            };
            shared.store.read(list).await
        })
    }

    fn replay(&self, step: ReplayStep) -> Task<Result<ReplayBatch>> {
        task!(self, "replay", |shared| {
            shared.check()?;
            let (bus, rows) = (shared.bus, step.max);
            let replay = move |tx: &rusqlite::Connection| {
                let batch = history::replay(tx, bus, &step)?;
                let ring = batch.handed > 0;
                Ok(Made { value: batch, ring })
            };
            shared.store.write(rows, replay).await
        })
    }

    fn close(&self) -> Task<()> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.close().await })
    }
}
