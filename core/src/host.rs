//! Where an event loop of another language meets the core.
//!
//! One [`Host`] belongs to one event loop. Jobs become ready and operations finish on any thread; the loop is woken
//! **once for each burst** and then pulls everything with [`Host::take`]. The wake takes no lock of the other
//! language (an eventfd for Python, a weak thread-safe function for Node). Operations such as publish are polled on
//! the loop's own thread, so an awaited publish crosses no thread that has no work in it.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use ahash::AHashMap;

use crate::handler::{CancelReason, Handler, Job, Outcome, Reporter};

/// Jobs and finished operations, waiting for one event loop. Cheap to clone.
pub struct Host<T>(Arc<Inner<T>>);

impl<T> Clone for Host<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

struct Inner<T> {
    ready: Arc<Ready>,
    operations: Mutex<AHashMap<u64, Operation<T>>>,
}

type Operation<T> = Pin<Box<dyn Future<Output = T> + Send>>;

struct Ready {
    jobs: Mutex<VecDeque<HostJob>>,
    cancelled: Mutex<Vec<Cancelled>>,
    woken: Mutex<Vec<u64>>,
    armed: AtomicBool,
    wake: Box<dyn Fn() + Send + Sync>,
}

/// A job and the subscription that it belongs to.
pub struct HostJob {
    /// As given to [`Host::handler`].
    pub subscription: u32,
    /// What to run.
    pub job: Job,
    /// For a handler of batches: the other jobs of the same batch, to be run with it in one call.
    pub batch: Option<Vec<Job>>,
}

/// A running job that is asked to stop; its outcome no longer counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Cancelled {
    pub subscription: u32,
    pub job: u64,
    pub reason: CancelReason,
}

/// What [`Host::take`] hands out.
pub struct Taken<T> {
    /// To be started now; the core has given each a permit.
    pub jobs: Vec<HostJob>,
    /// To be stopped.
    pub cancelled: Vec<Cancelled>,
    /// Operations that finished, by the key they were spawned under.
    pub finished: Vec<(u64, T)>,
}

impl<T: Send + 'static> Host<T> {
    /// A host whose loop `wake` wakes, from any thread, at most once until the next [`Host::take`].
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        let ready = Ready {
            jobs: Mutex::default(),
            cancelled: Mutex::default(),
            woken: Mutex::default(),
            armed: AtomicBool::new(false),
            wake: Box::new(wake),
        };
        Self(Arc::new(Inner { ready: Arc::new(ready), operations: Mutex::default() }))
    }

    /// Starts an operation under a key of the caller's choice. Returns its output if it is ready at once; otherwise
    /// [`Host::take`] returns it later. Call it on the loop's thread.
    pub fn spawn(&self, key: u64, operation: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let mut operation: Operation<T> = Box::pin(operation);
        let output = self.poll(key, &mut operation);
        if output.is_none() {
            lock(&self.0.operations).insert(key, operation);
        }
        output
    }

    /// Drops an operation: its output is not wanted any more. What it already caused stays.
    pub fn forget(&self, key: u64) {
        let operation = lock(&self.0.operations).remove(&key);
        drop(operation); // outside the lock: its destructor may wake others
    }

    fn poll(&self, key: u64, operation: &mut Operation<T>) -> Option<T> {
        let waker =
            Waker::from(Arc::new(OperationWaker { key, queued: AtomicBool::new(false), ready: self.0.ready.clone() }));
        // Timers inside operations need the runtime's context.
        let _context = crate::process::current().runtime.enter();
        match operation.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    /// Everything that is ready, at most `max` jobs. Call it on the loop's thread whenever it was woken; when jobs
    /// are left over, the loop is woken again.
    pub fn take(&self, max: usize) -> Taken<T> {
        let ready = &self.0.ready;
        // First: whatever arrives from here on rings again.
        ready.armed.store(false, Ordering::SeqCst);
        let woken = std::mem::take(&mut *lock(&ready.woken));
        let finished = woken.into_iter().filter_map(|key| Some((key, self.resume(key)?))).collect();
        let cancelled = std::mem::take(&mut *lock(&ready.cancelled));
        let (jobs, more) = {
            let mut queue = lock(&ready.jobs);
            let count = queue.len().min(max);
            let jobs =
                if count == queue.len() { std::mem::take(&mut *queue).into() } else { queue.drain(..count).collect() };
            (jobs, !queue.is_empty())
        };
        if more {
            ready.ring();
        }
        Taken { jobs, cancelled, finished }
    }

    /// Runs `what` without waking the loop for what becomes ready: for the loop's own thread, which calls [`Host::take`]
    /// next.
    pub fn quietly<R>(&self, what: impl FnOnce() -> R) -> R {
        self.0.ready.armed.store(true, Ordering::SeqCst);
        what()
    }

    fn resume(&self, key: u64) -> Option<T> {
        let mut operation = lock(&self.0.operations).remove(&key)?;
        let output = self.poll(key, &mut operation);
        if output.is_none() {
            lock(&self.0.operations).insert(key, operation);
        }
        output
    }

    /// Wakes the loop, for something that the caller keeps for it.
    pub fn ring(&self) {
        self.0.ready.ring();
    }

    /// A handler whose jobs this host hands out, marked with `subscription`.
    pub fn handler(&self, subscription: u32) -> Arc<HostHandler> {
        Arc::new(HostHandler { subscription, ready: self.0.ready.clone(), reporter: OnceLock::new() })
    }
}

impl Ready {
    fn ring(&self) {
        if !self.armed.swap(true, Ordering::SeqCst) {
            (self.wake)();
        }
    }
}

/// Puts the jobs of one subscription into its host's queue.
pub struct HostHandler {
    subscription: u32,
    ready: Arc<Ready>,
    reporter: OnceLock<Reporter>,
}

impl HostHandler {
    /// Reports outcomes of jobs; one call for many is cheapest.
    pub fn report(&self, outcomes: impl IntoIterator<Item = (u64, Outcome)>) {
        if let Some(reporter) = self.reporter.get() {
            reporter.report(outcomes);
        }
    }
}

impl Handler for HostHandler {
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter) {
        self.reporter.get_or_init(|| reporter.clone());
        let subscription = self.subscription;
        lock(&self.ready.jobs).extend(jobs.into_iter().map(|job| HostJob { subscription, job, batch: None }));
        self.ready.ring();
    }

    fn start_batch(&self, mut batch: Vec<Job>, reporter: &Reporter) {
        self.reporter.get_or_init(|| reporter.clone());
        let others = batch.split_off(1.min(batch.len()));
        let Some(job) = batch.pop() else { return };
        lock(&self.ready.jobs).push_back(HostJob { subscription: self.subscription, job, batch: Some(others) });
        self.ready.ring();
    }

    fn cancel(&self, jobs: &[u64], reason: CancelReason) {
        let subscription = self.subscription;
        let stopped = |job: &Job| jobs.contains(&job.id);
        let ours = |queued: &HostJob| {
            let others = queued.batch.as_deref().unwrap_or_default();
            queued.subscription == subscription && (stopped(&queued.job) || others.iter().any(stopped))
        };
        lock(&self.ready.jobs).retain(|queued| !ours(queued));
        lock(&self.ready.cancelled).extend(jobs.iter().map(|job| Cancelled { subscription, job: *job, reason }));
        self.ready.ring();
    }
}

struct OperationWaker {
    key: u64,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for OperationWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            lock(&self.ready.woken).push(self.key);
            self.ready.ring();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
