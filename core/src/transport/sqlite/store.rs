//! One open file: a writer thread, a thread that listens to the doorbell, a few connections for reading.
//!
//! All buses of a process that name the same file share one `Store`; it goes away with the last of them. A process has
//! its own registry, so a forked child opens everything anew and never touches what it inherited: a `Store` that was
//! made under another process id is leaked, not dropped, since its threads do not exist and its locks may be held.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::doorbell::{Doorbell, Listener};
use super::fork::{self, PrivateFile, Tracked};
use super::guard::Guard;
use super::job::{Job, Made, Ticket, Write};
use super::lock::WriteLock;
use super::retention::Limits;
use super::writer::{Message, Writer};
use super::{fault, file, schema};
use crate::error::{Error, ErrorKind, Result};
use crate::process::PerProcess;

/// Reads (statistics, dead-letter lists) at one time.
const READERS: usize = 2;
/// How long a publish that started before its timeout may take to finish, before its outcome is called unknown.
const GRACE: Duration = Duration::from_secs(5);

/// An open file. Cheap to share; see the module.
pub(super) struct Store {
    pid: u32,
    inner: ManuallyDrop<Inner>,
}

pub(super) struct Inner {
    /// Canonical.
    pub path: PathBuf,
    /// Type of the file system.
    pub file_system: String,
    pub bell: Arc<Doorbell>,
    jobs: Sender<Message>,
    want_full: Arc<AtomicBool>,
    limits: Arc<Mutex<Vec<Limits>>>,
    readers: Mutex<Vec<Tracked>>,
    reading: Semaphore,
    /// Buses of this process that use the file; guarded so that the last one and a new one agree.
    users: Mutex<usize>,
    finished: watch::Receiver<bool>,
    stop_listener: OwnedFd,
}

impl Deref for Store {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.inner
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.pid != std::process::id() {
            return; // forked: leak
        }
        self.stop();
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.inner) };
    }
}

/// The open files of this process. A forked child begins with none: the map of its parent may be locked for ever.
static OPEN: PerProcess<Mutex<HashMap<PathBuf, Weak<Store>>>> = PerProcess::new();

/// Runs `work` on a thread that may block, and waits for it without blocking.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match crate::process::current().runtime.spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(cause) => Err(Error::connection_failed("work on the event store was aborted").caused_by(cause)),
    }
}

/// Opens the file, or joins those of this process that have it open.
pub(super) async fn open(path: PathBuf, full: bool, allow_network: bool) -> Result<Arc<Store>> {
    blocking(move || {
        schema::check_library()?;
        let path = file::canonical(&path)?;
        fork::install();
        // Held while opening: two buses that open one file at once must end up with one store.
        let mut stores = OPEN.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        fork::forget_parent();
        if let Some(store) = stores.get(&path).and_then(Weak::upgrade)
            && store.join()
        {
            if full {
                store.want_full.store(true, Ordering::Release);
            }
            return Ok(store);
        }
        stores.retain(|_, store| store.strong_count() > 0);
        let store = Arc::new(Store::start(path.clone(), full, allow_network)?);
        stores.insert(path, Arc::downgrade(&store));
        Ok(store)
    })
    .await
}

impl Store {
    fn start(path: PathBuf, full: bool, allow_network: bool) -> Result<Self> {
        let parent = path.parent().unwrap_or(Path::new("/"));
        let file_system = file::file_system(parent, allow_network)?;
        let connection = Tracked::open(|| schema::open_first(&path))?;
        let bell_file = Arc::new(PrivateFile::new(file::side_file(&path, ".bell")?)?);
        let lock = WriteLock::new(bell_file.clone(), PrivateFile::new(file::side_file(&path, ".lock")?)?);
        {
            let _held = lock.acquire()?;
            let _inside = fork::enter();
            schema::prepare(&connection, &path)?;
        }
        let mut guard = Guard::new(&path)?;
        guard.check(Instant::now())?;
        let bell = Arc::new(Doorbell::new(bell_file));
        let (listener, stop_listener) = Listener::new(&path, &file::beside(&path, ".bell"))?;
        let (jobs, queue) = channel();
        let (finished, when_finished) = watch::channel(false);
        let want_full = Arc::new(AtomicBool::new(full));
        let limits = Arc::new(Mutex::new(Vec::new()));
        let no_thread = |cause: std::io::Error| {
            Error::connection_failed(format!("the operating system refused a thread ({cause})")).caused_by(cause)
        };
        let ears = bell.clone();
        let listener =
            thread::Builder::new().name("polybus-bell".into()).spawn(move || listener.run(&ears)).map_err(no_thread)?;
        let writer = Writer {
            connection,
            path: path.clone(),
            lock,
            guard,
            bell: bell.clone(),
            jobs: queue,
            want_full: want_full.clone(),
            is_full: false,
            limits: limits.clone(),
            tallies: HashMap::new(),
            dirty: true,
            listener,
            finished,
        };
        thread::Builder::new().name("polybus-sqlite".into()).spawn(move || writer.run()).map_err(no_thread)?;
        let inner = Inner {
            path,
            file_system,
            bell,
            jobs,
            want_full,
            limits,
            readers: Mutex::default(),
            reading: Semaphore::new(READERS),
            users: Mutex::new(1),
            finished: when_finished,
            stop_listener,
        };
        Ok(Self { pid: std::process::id(), inner: ManuallyDrop::new(inner) })
    }

    /// One more bus, unless the last one has left already.
    fn join(&self) -> bool {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if *users == 0 {
            return false;
        }
        *users += 1;
        true
    }

    /// One bus less. With the last one the threads end, after all that was queued before.
    pub(super) fn leave(&self) {
        if self.check().is_err() {
            return;
        }
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        *users = users.saturating_sub(1);
        if *users == 0 {
            self.stop();
        }
    }

    fn stop(&self) {
        // Both ends may be gone already: stopping twice is fine. A byte, because a forked child holds the pipe open.
        let _ = rustix::io::write(&self.stop_listener, b"!");
        let _ = self.jobs.send(Message::Stop);
        // Closed after the lock is given back: closing waits for a fork, which may wait for a holder of the lock.
        let readers = std::mem::take(&mut *self.readers.lock().unwrap_or_else(PoisonError::into_inner));
        drop(readers);
    }

    /// Waits until the file is closed, if this process has no more users of it.
    pub(super) async fn closed(&self) {
        let left = *self.users.lock().unwrap_or_else(PoisonError::into_inner) == 0;
        if left {
            let mut finished = self.finished.clone();
            // An error says that the thread is gone, which is as good.
            let _ = finished.wait_for(|done| *done).await;
        }
    }

    /// Fails in a forked child. Call before anything else: the locks in here may be held for ever there.
    pub(super) fn check(&self) -> Result<()> {
        if self.pid == std::process::id() { Ok(()) } else { Err(fault::forked()) }
    }

    /// What each bus keeps.
    pub(super) fn limits(&self) -> &Mutex<Vec<Limits>> {
        &self.limits
    }

    /// Whether commits reach the disk.
    pub(super) fn is_full(&self) -> bool {
        self.want_full.load(Ordering::Acquire)
    }

    /// Queues a job.
    pub(super) fn send(&self, job: Box<dyn Job>) -> Result<()> {
        self.check()?;
        self.jobs.send(Message::Job(job)).map_err(|_| fault::closed())
    }

    /// Runs `work` in a transaction and waits for the commit. It may run twice (see [`super::job`]).
    pub(super) async fn write<T: Send + 'static>(
        &self,
        rows: usize,
        work: impl FnMut(&Connection) -> Result<Made<T>> + Send + 'static,
    ) -> Result<T> {
        let (job, answer) = Write::new((rows, 0), None, work);
        self.send(job)?;
        answered(answer.await)
    }

    /// As [`Store::write`] for `bytes` of events: waits for the start until `deadline`. Gives `room` back when it is done.
    pub(super) async fn publish<T: Send + 'static>(
        &self,
        (rows, bytes): (usize, usize),
        deadline: tokio::time::Instant,
        room: OwnedSemaphorePermit,
        work: impl FnMut(&Connection) -> Result<Made<T>> + Send + 'static,
    ) -> Result<T> {
        self.check()?;
        let ticket = Ticket::default();
        let mut work = work;
        let (job, mut answer) = Write::new((rows, bytes), Some(ticket.clone()), move |tx: &Connection| {
            let _weighs = &room;
            work(tx)
        });
        self.send(job)?;
        if let Ok(answer) = tokio::time::timeout_at(deadline, &mut answer).await {
            return answered(answer);
        }
        if ticket.cancel() {
            return Err(fault::timed_out());
        }
        match tokio::time::timeout(GRACE, answer).await {
            Ok(answer) => answered(answer),
            Err(_) => Err(Error::new(
                ErrorKind::PublishUnknown,
                "the commit did not finish in time; the events may or may not be stored, publish again with the same ids if duplicates are harmless",
            )),
        }
    }

    /// Runs `work` on a reading connection, beside the writer.
    pub(super) async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.check()?;
        let _turn = self.reading.acquire().await.map_err(|_| fault::closed())?;
        let store = self.clone();
        blocking(move || {
            let pooled = store.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let connection = match pooled {
                Some(connection) => connection,
                None => Tracked::open(|| schema::connect_again(&store.path))?,
            };
            let outcome = {
                let _inside = fork::enter();
                work(&connection)
            };
            // After the last bus left nobody but the store itself would close it.
            let used = *store.users.lock().unwrap_or_else(PoisonError::into_inner) > 0;
            if used {
                store.readers.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
            }
            outcome
        })
        .await
    }
}

/// A job's answer; a dropped one says that the writer thread is gone, or that the job was cancelled.
pub(super) fn answered<T>(answer: Result<Result<T>, oneshot::error::RecvError>) -> Result<T> {
    answer.unwrap_or_else(|_| Err(fault::closed()))
}
