//! A subscription without a group: a cursor in memory over the log, from the moment of subscribing.
//!
//! Nothing is leased, so nothing can be settled: outcomes are ignored, and nothing outlives the process.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::Connection;
use tokio::sync::{oneshot, watch};

use super::job::{Job, Made, Probe};
use super::source::decode;
use super::store::{Store, answered};
use super::{clock, fault, group, publish};
use crate::delivery::{Delivery, Lease};
use crate::error::Result;
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, Settlement, Source, Start, Task};

/// Rows that one look covers.
const SCAN: usize = 5_000;
/// Bytes that one look returns at most.
const BYTES: usize = 4 << 20;
/// As in a group.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The [`Source`] of a broadcast subscription.
pub(super) struct BroadcastSource(Arc<Shared>);

struct Shared {
    store: Arc<Store>,
    bus: i64,
    pattern: Pattern,
    cursor: Arc<Mutex<i64>>,
    closed: watch::Sender<bool>,
    max_payload: usize,
}

/// Begins at the end of the log.
pub(super) async fn join(
    store: Arc<Store>,
    bus: i64,
    spec: GroupSpec,
    max_payload: usize,
) -> Result<Arc<BroadcastSource>> {
    let cursor = store.write(1, move |tx| Ok(Made::quiet(group::begin(tx, bus, Start::New)?))).await?;
    Ok(Arc::new(BroadcastSource(Arc::new(Shared {
        store,
        bus,
        pattern: spec.pattern,
        cursor: Arc::new(Mutex::new(cursor)),
        closed: watch::Sender::new(false),
        max_payload,
    }))))
}

/// One look at the log.
struct Look {
    bus: i64,
    pattern: Pattern,
    cursor: i64,
    max: usize,
    found: Found,
    promoted: bool,
    reply: oneshot::Sender<Result<Found>>,
}

#[derive(Default)]
struct Found {
    events: Vec<(i64, Bytes)>,
    cursor: i64,
    again: Option<Duration>,
}

impl Job for Look {
    fn probe(&mut self, connection: &Connection) -> Result<Probe> {
        let now = clock::wall_ms();
        let due = publish::next_delayed(connection, self.bus)?.map(|at| at - now);
        if due.is_some_and(|left| left <= 0) {
            return Ok(Probe::Write);
        }
        let mut rows = connection.prepare_cached(
            "SELECT seq, bus, type, expires_at, event FROM polybus_events WHERE seq > ?1 ORDER BY seq",
        )?;
        let mut rows = rows.query([self.cursor])?;
        let (mut bytes, mut looked) = (0, 0);
        let mut all = false;
        while looked < SCAN && self.found.events.len() < self.max && bytes < BYTES {
            let Some(row) = rows.next()? else {
                all = true;
                break;
            };
            looked += 1;
            let position = row.get(0)?;
            let matches = row.get::<_, i64>(1)? == self.bus
                && self.pattern.matches(row.get_ref(2)?.as_str().map_err(rusqlite::Error::from)?)
                && row.get::<_, Option<i64>>(3)?.is_none_or(|until| until > now);
            if matches {
                let event = Bytes::from(row.get::<_, Vec<u8>>(4)?);
                bytes += event.len();
                self.found.events.push((position, event));
            }
            self.cursor = position;
        }
        self.found.cursor = self.cursor;
        self.found.again =
            if all { due.map(|left| Duration::from_millis(left.unsigned_abs())) } else { Some(Duration::ZERO) };
        Ok(Probe::Done)
    }

    fn run(&mut self, tx: &Connection) -> Result<()> {
        self.promoted = publish::promote(tx, self.bus)? > 0;
        self.found = Found { cursor: self.cursor, again: Some(Duration::ZERO), ..Found::default() };
        Ok(())
    }

    fn finish(self: Box<Self>, outcome: Result<()>) -> bool {
        let Self { reply, found, promoted, .. } = *self;
        let _ = reply.send(outcome.map(|()| found));
        promoted
    }

    fn size(&self) -> (usize, usize) {
        (1, 0)
    }
}

impl Shared {
    fn cursor(&self) -> std::sync::MutexGuard<'_, i64> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, max: usize) -> Result<Vec<Delivery>> {
        self.store.check()?;
        let mut closed = self.closed.subscribe();
        let mut bell = self.store.bell.listen();
        loop {
            if *closed.borrow() {
                return Err(fault::closed());
            }
            bell.borrow_and_update();
            let (reply, answer) = oneshot::channel();
            let cursor = *self.cursor();
            self.store.send(Box::new(Look {
                bus: self.bus,
                pattern: self.pattern.clone(),
                cursor,
                max: max.max(1),
                found: Found::default(),
                promoted: false,
                reply,
            }))?;
            let found = answered(answer.await)?;
            // Only now: a dropped `take` looks at the same events again.
            *self.cursor() = found.cursor;
            if !found.events.is_empty() {
                return Ok(found.events.into_iter().map(|(position, raw)| self.delivery(position, raw)).collect());
            }
            if found.again == Some(Duration::ZERO) {
                continue;
            }
            tokio::select! {
                _ = bell.changed() => {}
                () = tokio::time::sleep(found.again.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)) => {}
                _ = closed.changed() => {}
            }
        }
    }

    fn delivery(&self, position: i64, raw: Bytes) -> Delivery {
        Delivery {
            body: decode(raw, self.max_payload),
            lease: Lease { position, token: 0 },
            attempt: 1,
            redelivered: false,
            received_at: std::time::SystemTime::now(),
            first_failed_at: None,
            expired: false,
        }
    }
}

impl Source for BroadcastSource {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let shared = self.0.clone();
        Box::pin(async move { shared.take(max).await.map_err(|cause| cause.during("take")) })
    }

    fn settle(&self, _settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn heartbeat(&self, _held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn close(&self) -> Task<()> {
        let shared = self.0.clone();
        Box::pin(async move {
            if shared.store.check().is_ok() {
                shared.closed.send_replace(true);
            }
        })
    }
}
