//! The writer thread: one connection, one transaction for all jobs that are waiting.
//!
//! ```text
//! take jobs → probe (read only) → lock between processes → BEGIN IMMEDIATE → run → COMMIT → unlock → ring → answer
//! ```
//! While one commit waits for the disk the next jobs gather, so the number of callers, not the number of commits,
//! grows with the load.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rusqlite::{Transaction, TransactionBehavior};
use tokio::sync::watch;

use super::doorbell::Doorbell;
use super::fork::{self, Tracked};
use super::guard::Guard;
use super::job::{Job, Probe};
use super::lock::WriteLock;
use super::retention::{self, Limits, Tally};
use super::schema;
use crate::error::{Error, Result};

/// A transaction takes no further job once it has this many rows …
const MAX_ROWS: usize = 2_000;
/// … or this many bytes, so that other processes get their turn.
const MAX_BYTES: usize = 4 << 20;
/// How long the thread looks for the next job before it sleeps.
const AWAKE: Duration = Duration::from_micros(50);
/// Housekeeping runs at most this often.
const TICK: Duration = Duration::from_secs(1);
/// Housekeeping of a store that nobody writes to.
const IDLE_TICK: Duration = Duration::from_secs(60);

/// To the writer thread.
pub(super) enum Message {
    /// Work.
    Job(Box<dyn Job>),
    /// Ends the thread after all that was sent before.
    Stop,
}

/// What the thread owns.
pub(super) struct Writer {
    pub connection: Tracked,
    pub path: PathBuf,
    pub lock: WriteLock,
    pub guard: Guard,
    pub bell: Arc<Doorbell>,
    pub jobs: Receiver<Message>,
    /// Some bus of this process wants every commit on the disk.
    pub want_full: Arc<AtomicBool>,
    pub is_full: bool,
    pub limits: Arc<std::sync::Mutex<Vec<Limits>>>,
    /// By bus, where a limit on bytes needs it.
    pub tallies: HashMap<i64, Tally>,
    /// Committed since the last tick.
    pub dirty: bool,
    /// Was told to end before this thread was.
    pub listener: JoinHandle<()>,
    pub finished: watch::Sender<bool>,
}

impl Writer {
    /// Runs until stopped, or until nobody can send any more.
    pub(super) fn run(mut self) {
        let mut ticked = Instant::now();
        let mut lone = false;
        loop {
            let interval = if self.dirty { TICK } else { IDLE_TICK };
            let due = (ticked + interval).saturating_duration_since(Instant::now());
            let (batch, stop) = match self.next(lone, due) {
                Ok(Message::Job(first)) => self.gather(first),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => (Vec::new(), true),
                Err(RecvTimeoutError::Timeout) => (Vec::new(), false),
            };
            let idle = batch.is_empty();
            lone = batch.len() == 1 && batch.iter().all(|job| matches!(job.size(), (1, 1..)));
            self.work(batch);
            if stop {
                break;
            }
            if ticked.elapsed() >= interval {
                ticked = Instant::now();
                self.housekeep(idle);
            }
        }
        let Self { connection, lock, listener, finished, .. } = self;
        // First the listener's connection: who closes the last one folds the log into the file.
        if listener.join().is_err() {
            log::error!("the listener of {} panicked", self.path.display());
        }
        drop(connection);
        drop(lock);
        finished.send_replace(true);
    }

    /// The next message. After a lone publish it is awaited awake for a moment: one who publishes in a loop comes back
    /// at once, and to sleep and be woken would cost as much as the commit. Under load the processor has better to do.
    fn next(&self, lone: bool, due: Duration) -> std::result::Result<Message, RecvTimeoutError> {
        let began = Instant::now();
        while lone && began.elapsed() < AWAKE {
            match self.jobs.try_recv() {
                Ok(message) => return Ok(message),
                Err(TryRecvError::Empty) => std::thread::yield_now(),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
            }
        }
        self.jobs.recv_timeout(due)
    }

    fn gather(&self, first: Box<dyn Job>) -> (Vec<Box<dyn Job>>, bool) {
        let (mut rows, mut bytes) = first.size();
        let mut batch = vec![first];
        while rows < MAX_ROWS && bytes < MAX_BYTES {
            match self.jobs.try_recv() {
                Ok(Message::Job(job)) => {
                    let size = job.size();
                    (rows, bytes) = (rows + size.0, bytes + size.1);
                    batch.push(job);
                }
                Ok(Message::Stop) => return (batch, true),
                Err(_) => break,
            }
        }
        (batch, false)
    }

    fn work(&mut self, batch: Vec<Box<dyn Job>>) {
        let batch = self.probe(batch);
        if batch.is_empty() {
            return;
        }
        let mut batch = batch;
        let outcome = self.transact(&mut batch);
        let ring = match outcome {
            Ok(()) => batch.into_iter().map(|job| job.finish(Ok(()))).fold(false, |ring, one| ring | one),
            Err(Failed { cause, retry_alone: true }) if batch.len() > 1 => {
                log::debug!("one of {} jobs failed, each runs again alone: {cause}", batch.len());
                batch.into_iter().map(|job| self.alone(job)).fold(false, |ring, one| ring | one)
            }
            Err(Failed { cause, .. }) => {
                batch.into_iter().for_each(|job| {
                    job.finish(Err(cause.clone()));
                });
                false
            }
        };
        if ring {
            self.bell.ring();
        }
    }

    fn alone(&mut self, job: Box<dyn Job>) -> bool {
        let mut batch = vec![job];
        let outcome = self.transact(&mut batch).map_err(|failed| failed.cause);
        batch.into_iter().map(|job| job.finish(outcome.clone())).fold(false, |ring, one| ring | one)
    }

    /// Answers the jobs that have nothing to write; returns the rest, in order.
    fn probe(&mut self, batch: Vec<Box<dyn Job>>) -> Vec<Box<dyn Job>> {
        let _inside = fork::enter();
        batch
            .into_iter()
            .filter_map(|mut job| {
                let outcome = match job.probe(&self.connection) {
                    Ok(Probe::Write) => return Some(job),
                    Ok(Probe::Done) => Ok(()),
                    Err(cause) => Err(cause),
                };
                job.finish(outcome);
                None
            })
            .collect()
    }

    fn transact(&mut self, batch: &mut Vec<Box<dyn Job>>) -> Result<(), Failed> {
        let held = self.lock.acquire().map_err(Failed::all)?;
        let _inside = fork::enter();
        self.guard.check(Instant::now()).map_err(Failed::all)?;
        let full = self.want_full.load(Ordering::Acquire);
        if full != self.is_full {
            schema::set_full(&self.connection, full).map_err(Failed::all)?;
            self.is_full = full;
        }
        execute(&self.connection, "BEGIN IMMEDIATE").map_err(Failed::all)?;
        let done = self.run_all(batch).and_then(|()| execute(&self.connection, "COMMIT").map_err(Failed::all));
        if done.is_err() && !self.connection.is_autocommit() {
            // Some failures end the transaction by themselves; a rollback that fails leaves nothing to roll back.
            if let Err(cause) = execute(&self.connection, "ROLLBACK") {
                log::error!("rolling back the event store failed: {cause}");
            }
        }
        self.dirty = true;
        drop(held);
        done
    }

    fn run_all(&self, batch: &mut Vec<Box<dyn Job>>) -> Result<(), Failed> {
        let mut withdrawn = Vec::new();
        for (index, job) in batch.iter_mut().enumerate() {
            if !job.start() {
                withdrawn.push(index);
                continue;
            }
            job.run(&self.connection).map_err(|cause| Failed { cause, retry_alone: true })?;
        }
        for index in withdrawn.into_iter().rev() {
            drop(batch.remove(index));
        }
        Ok(())
    }

    /// Retention, delayed events that nobody waits for, and a short log.
    fn housekeep(&mut self, idle: bool) {
        let limits = self.limits.lock().map(|limits| limits.clone()).unwrap_or_default();
        let more = match self.sweep(&limits) {
            Ok(more) => more,
            Err(cause) => {
                log::warn!("housekeeping of {} failed: {cause}", self.path.display());
                false
            }
        };
        if idle && self.dirty && !more {
            self.dirty = false;
            if let Err(cause) = self.truncate_log() {
                log::debug!("the log of {} was not truncated: {cause}", self.path.display());
            }
        }
    }

    fn sweep(&mut self, limits: &[Limits]) -> Result<bool> {
        let mut more = false;
        for limit in limits {
            let tally = self.tallies.entry(limit.bus).or_default();
            let wanted = {
                let _inside = fork::enter();
                retention::is_due(&self.connection, limit, tally)?
            };
            if wanted {
                let held = self.lock.acquire()?;
                let _inside = fork::enter();
                self.guard.check(Instant::now())?;
                let tx = Transaction::new_unchecked(&self.connection, TransactionBehavior::Immediate)?;
                let done = retention::sweep(&tx, limit, tally)?;
                tx.commit()?;
                drop(held);
                more |= done.more;
                if done.promoted {
                    self.bell.ring();
                }
            }
        }
        Ok(more)
    }

    fn truncate_log(&mut self) -> Result<()> {
        let _held = self.lock.acquire()?;
        let _inside = fork::enter();
        self.connection.busy_timeout(Duration::ZERO)?;
        let done = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        self.connection.busy_timeout(Duration::from_secs(5))?;
        Ok(done?)
    }
}

/// Why a transaction failed, and whether its jobs deserve a second try one by one.
struct Failed {
    cause: Error,
    retry_alone: bool,
}

impl Failed {
    fn all(cause: Error) -> Self {
        Self { cause, retry_alone: false }
    }
}

fn execute(connection: &rusqlite::Connection, sql: &str) -> Result<()> {
    connection.prepare_cached(sql)?.execute([])?;
    Ok(())
}
