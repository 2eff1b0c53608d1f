//! Where an event loop of Python, or a pool of its threads, meets the core.
//!
//! A [`Bridge`] is a core `Host` with a wake that takes no GIL: a file descriptor that the loop watches, or a condition
//! variable that threads wait on with the GIL released. Rust threads never call into Python; Python pulls.
//! All methods are called with the GIL held, `take` and `spawn` on the loop's thread.

use std::future::Future;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use polybus_core::delivery::Failure;
use polybus_core::event::Text;
use polybus_core::handler::{Job, Outcome};
use polybus_core::host::{Host, HostHandler, HostJob};
use polybus_core::{ErrorKind, Result, codec, process};
use pyo3::PyClass;
use pyo3::exceptions::PyRuntimeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::error::to_py;
use crate::event::{Delivery, PyEvent};
use crate::{json, log};

/// Turns a result of the core into a Python object, where the GIL is held.
type Convert = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;
type Answer = Result<Convert>;
type Boxed = Pin<Box<dyn Future<Output = Answer> + Send>>;

/// A value that a forked child leaks instead of dropping: its destructor could wait for threads, or for locks, that only
/// the parent has.
pub struct Here<T> {
    pid: u32,
    value: ManuallyDrop<T>,
}

impl<T> Here<T> {
    pub fn new(value: T) -> Self {
        Self { pid: std::process::id(), value: ManuallyDrop::new(value) }
    }

    pub fn is_ours(&self) -> bool {
        self.pid == std::process::id()
    }
}

impl<T> Deref for Here<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> Drop for Here<T> {
    fn drop(&mut self) {
        if self.is_ours() {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.value) }
        }
    }
}

/// Something the core is to do, not begun: awaited through a bridge, or waited for by the calling thread.
#[pyclass(module = "polybus._native", frozen)]
pub struct Operation(Here<Mutex<Option<Boxed>>>);

impl Operation {
    pub fn new<T: Send + 'static>(
        operation: impl Future<Output = Result<T>> + Send + 'static,
        convert: impl FnOnce(Python<'_>, T) -> PyResult<Py<PyAny>> + Send + 'static,
    ) -> Self {
        let boxed: Boxed = Box::pin(async move {
            let output = operation.await?;
            Ok(Box::new(move |py: Python<'_>| convert(py, output)) as Convert)
        });
        Self(Here::new(Mutex::new(Some(boxed))))
    }

    fn begin(&self) -> PyResult<Boxed> {
        lock(&self.0).take().ok_or_else(|| PyRuntimeError::new_err("this operation has begun already"))
    }
}

#[pymethods]
impl Operation {
    /// Runs it on the calling thread, with the GIL released. Signals are looked at every 50 ms, so that Ctrl-C works.
    fn wait(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let mut operation = self.begin()?;
        let runtime = &process::current().runtime;
        loop {
            let sliced = py.detach(|| {
                runtime.block_on(async { tokio::time::timeout(Duration::from_millis(50), &mut operation).await })
            });
            match sliced {
                Ok(answer) => return finish(py, answer),
                Err(_) => py.check_signals()?,
            }
        }
    }
}

fn finish(py: Python<'_>, answer: Answer) -> PyResult<Py<PyAny>> {
    match answer {
        Ok(convert) => convert(py),
        Err(error) => Err(to_py(py, &error)),
    }
}

/// Jobs and finished operations for one event loop, or jobs for one pool of threads.
#[pyclass(module = "polybus._native", frozen, weakref)]
pub struct Bridge {
    host: Here<Host<Answer>>,
    wake: Arc<Wake>,
    futures: Mutex<AHashMap<u64, Py<PyAny>>>,
    next: AtomicU64,
    groups: Mutex<AHashMap<u32, Text>>,
}

/// How the consumer is woken.
pub enum Wake {
    /// A loop watches this descriptor.
    Loop { bell: Bell, stopped: AtomicBool },
    /// Threads wait.
    Threads { state: Mutex<Waiting>, changed: Condvar, idle: AtomicUsize },
}

#[derive(Default)]
pub struct Waiting {
    rung: bool,
    stopped: bool,
}

impl Wake {
    /// Returns whether somebody will come.
    pub fn ring(&self) -> bool {
        match self {
            Self::Loop { bell, stopped } => {
                bell.ring();
                !stopped.load(Ordering::Relaxed)
            }
            Self::Threads { state, changed, .. } => {
                let mut waiting = lock(state);
                waiting.rung = true;
                changed.notify_one();
                !waiting.stopped
            }
        }
    }
}

#[pymethods]
impl Bridge {
    /// For a loop, or for threads.
    #[new]
    fn new(threads: bool) -> PyResult<Self> {
        let wake = Arc::new(match threads {
            true => Wake::Threads { state: Mutex::default(), changed: Condvar::new(), idle: AtomicUsize::new(0) },
            false => Wake::Loop { bell: Bell::new()?, stopped: AtomicBool::new(false) },
        });
        log::watch(&wake);
        let bell = wake.clone();
        Ok(Self {
            host: Here::new(Host::new(move || {
                bell.ring();
            })),
            wake,
            futures: Mutex::default(),
            next: AtomicU64::new(0),
            groups: Mutex::default(),
        })
    }

    /// Readable when `take` has something.
    fn fileno(&self) -> PyResult<i32> {
        match &*self.wake {
            Wake::Loop { bell, .. } => Ok(bell.watched().as_raw_fd()),
            Wake::Threads { .. } => Err(PyRuntimeError::new_err("threads wait, they do not watch")),
        }
    }

    /// Begins `operation`; `future` gets its result, now or in a later `take`. Returns the key for `forget`.
    fn spawn(&self, py: Python<'_>, operation: &Operation, future: Bound<'_, PyAny>) -> PyResult<u64> {
        let key = self.next.fetch_add(1, Ordering::Relaxed);
        let operation = operation.begin()?;
        match self.host.spawn(key, operation) {
            Some(answer) => resolve(py, &future, answer)?,
            None => drop(lock(&self.futures).insert(key, future.unbind())),
        }
        Ok(key)
    }

    /// The result is not wanted any more: what was begun is dropped.
    fn forget(&self, key: u64) {
        let future = lock(&self.futures).remove(&key);
        drop(future);
        self.host.forget(key);
    }

    /// Resolves what finished and returns what is to be started and stopped: `(jobs, cancelled)`. Jobs come in order as
    /// `(subscription, [(job, event), …])`, those of a batch as `((job, …), [event, …])`, what is cancelled as `(subscription, job)`.
    fn take(&self, py: Python<'_>, max: usize) -> PyResult<Given> {
        if let Wake::Loop { bell, .. } = &*self.wake {
            bell.hear();
        }
        let taken = self.host.take(max);
        for (key, answer) in taken.finished {
            let future = lock(&self.futures).remove(&key);
            if let Some(future) = future {
                resolve(py, future.bind(py), answer)?;
            }
        }
        let cancelled = taken.cancelled.iter().map(|stop| (stop.subscription, stop.job)).collect();
        Ok((self.started(py, taken.jobs)?, cancelled))
    }

    /// Waits for one job, with the GIL released. `None` when the bridge was stopped, or when there is something else to
    /// look at. With `signals`, looks at them every 50 ms.
    fn wait(&self, py: Python<'_>, signals: bool) -> PyResult<Option<Given>> {
        let Wake::Threads { state, changed, idle } = &*self.wake else {
            return Err(PyRuntimeError::new_err("a loop watches, it does not wait"));
        };
        idle.fetch_add(1, Ordering::SeqCst);
        let stopped = py.detach(|| {
            let mut waiting = lock(state);
            while !waiting.rung && !waiting.stopped {
                if signals {
                    let (guard, slept) = changed
                        .wait_timeout(waiting, Duration::from_millis(50))
                        .unwrap_or_else(PoisonError::into_inner);
                    waiting = guard;
                    if slept.timed_out() {
                        break;
                    }
                } else {
                    waiting = changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                }
            }
            waiting.rung = false;
            waiting.stopped
        });
        idle.fetch_sub(1, Ordering::SeqCst);
        if stopped {
            return Ok(None);
        }
        if signals {
            py.check_signals()?;
        }
        self.take(py, 1).map(Some)
    }

    /// A subscription has ended.
    fn remove(&self, subscription: u32) {
        lock(&self.groups).remove(&subscription);
    }

    /// How many threads wait for a job.
    fn idle(&self) -> usize {
        match &*self.wake {
            Wake::Threads { idle, .. } => idle.load(Ordering::SeqCst),
            Wake::Loop { .. } => 0,
        }
    }

    /// Nobody will take any more. Ends every `wait`, now and later.
    fn stop(&self) {
        match &*self.wake {
            Wake::Loop { stopped, .. } => stopped.store(true, Ordering::Relaxed),
            Wake::Threads { state, changed, .. } => {
                lock(state).stopped = true;
                changed.notify_all();
            }
        }
    }
}

/// A Python object that the garbage collector does not visit. pyo3 makes every class a collected one; these hold nothing
/// that refers back to them, and there may be many.
pub fn untracked<T: PyClass<BaseType = PyAny> + Into<PyClassInitializer<T>>>(
    py: Python<'_>,
    value: T,
) -> PyResult<Py<T>> {
    let object = Py::new(py, value)?;
    // SAFETY: a live object of a collected type, which has just been made and is ours alone.
    unsafe { pyo3::ffi::PyObject_GC_UnTrack(object.as_ptr().cast()) };
    Ok(object)
}

/// What one call of a handler is given.
#[derive(IntoPyObject)]
enum Work {
    /// A job and its event.
    One(u64, Py<PyEvent>),
    /// The jobs of a batch, as a tuple, and their events, as a list.
    Batch(Py<PyTuple>, Vec<Py<PyEvent>>),
}

/// Work of one subscription, in order.
type Started = (u32, Vec<Work>);
/// What is to be started, and what is to be stopped.
type Given = (Vec<Started>, Vec<(u32, u64)>);

impl Bridge {
    /// A handler whose jobs this bridge hands out under `subscription`.
    pub fn handler(&self, subscription: u32, group: Text) -> Arc<HostHandler> {
        lock(&self.groups).insert(subscription, group);
        self.host.handler(subscription)
    }

    fn started(&self, py: Python<'_>, jobs: Vec<HostJob>) -> PyResult<Vec<Started>> {
        let mut started: Vec<Started> = Vec::new();
        let mut group = Text::default();
        for HostJob { subscription, job, batch } in jobs {
            if started.last().is_none_or(|(last, _)| *last != subscription) {
                // The lock is not held while objects are made: that may run a finalizer, which may come back here.
                group = lock(&self.groups).get(&subscription).cloned().unwrap_or_default();
                started.push((subscription, Vec::new()));
            }
            let work = match batch {
                None => Work::One(job.id, delivered(py, job, &group)?),
                Some(others) => {
                    let jobs = std::iter::once(job).chain(others);
                    let (ids, events): (Vec<_>, Vec<_>) = jobs.map(|job| (job.id, delivered(py, job, &group))).unzip();
                    let events = events.into_iter().collect::<PyResult<_>>()?;
                    Work::Batch(PyTuple::new(py, ids)?.unbind(), events)
                }
            };
            if let Some((_, works)) = started.last_mut() {
                works.push(work);
            }
        }
        Ok(started)
    }
}

/// The event of a job, as its handler sees it.
fn delivered(py: Python<'_>, job: Job, group: &Text) -> PyResult<Py<PyEvent>> {
    let Job { event, attempt, redelivered, received_at, .. } = job;
    let delivery = Delivery { attempt, redelivered, group: group.clone(), received_at };
    untracked(py, PyEvent::delivered(event, delivery))
}

fn resolve(py: Python<'_>, future: &Bound<'_, PyAny>, answer: Answer) -> PyResult<()> {
    if future.call_method0(intern!(py, "done"))?.is_truthy()? {
        return Ok(()); // cancelled: nobody waits
    }
    match finish(py, answer) {
        Ok(value) => future.call_method1(intern!(py, "set_result"), (value,))?,
        Err(error) => future.call_method1(intern!(py, "set_exception"), (error.into_value(py),))?,
    };
    Ok(())
}

/// Takes what handlers said to the core.
#[pyclass(module = "polybus._native", frozen)]
pub struct Reporter(pub Here<Arc<HostHandler>>);

#[pymethods]
impl Reporter {
    /// These jobs returned.
    fn done(&self, jobs: Vec<u64>) {
        self.report(jobs.into_iter().map(|job| (job, Outcome::Done)));
    }

    /// These jobs were stopped, or never started; the attempt does not count.
    fn abandoned(&self, jobs: Vec<u64>) {
        self.report(jobs.into_iter().map(|job| (job, Outcome::Abandoned)));
    }

    /// This job returned what is the reply to its request.
    fn replied(&self, job: u64, payload: &Bound<'_, PyAny>) -> PyResult<()> {
        let payload = json::encode(payload, "reply", codec::MAX_DEPTH)?;
        self.report([(job, Outcome::Replied(payload.into()))]);
        Ok(())
    }

    /// This job raised. `after` asks for another attempt in that many seconds.
    #[pyo3(signature = (job, kind, message, stack, after=None, code=None))]
    fn failed(&self, job: u64, kind: String, message: String, stack: String, after: Option<f64>, code: Option<&str>) {
        let failure = Failure::new(kind, message, stack).coded(code.and_then(ErrorKind::from_code));
        let after = after.map(|after| Duration::try_from_secs_f64(after.max(0.0)).unwrap_or(Duration::MAX));
        let outcome = after.map_or(Outcome::Failed(failure.clone()), |after| Outcome::RetryAfter(after, failure));
        self.report([(job, outcome)]);
    }

    /// This job was only asked for the key of its event; `None`: the one that the event carries.
    #[pyo3(signature = (job, key))]
    fn key(&self, job: u64, key: Option<&str>) {
        self.report([(job, Outcome::Key(key.map(Into::into)))]);
    }

    /// This job refused its event.
    fn rejected(&self, job: u64, kind: String, message: String, stack: String) {
        self.report([(job, Outcome::Rejected(Failure::new(kind, message, stack)))]);
    }
}

impl Reporter {
    fn report(&self, outcomes: impl IntoIterator<Item = (u64, Outcome)>) {
        if self.0.is_ours() {
            self.0.report(outcomes);
        }
    }
}

/// A descriptor that becomes readable: an eventfd on Linux, a pipe elsewhere.
pub struct Bell {
    read: OwnedFd,
    #[cfg(not(target_os = "linux"))]
    write: OwnedFd,
}

impl Bell {
    #[cfg(target_os = "linux")]
    fn new() -> std::io::Result<Self> {
        use rustix::event::{EventfdFlags, eventfd};
        Ok(Self { read: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)? })
    }

    #[cfg(not(target_os = "linux"))]
    fn new() -> std::io::Result<Self> {
        let (read, write) = rustix::pipe::pipe()?;
        for end in [&read, &write] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(end, true)?;
        }
        Ok(Self { read, write })
    }

    fn watched(&self) -> &OwnedFd {
        &self.read
    }

    /// A full descriptor is readable already: nothing is lost when the write fails.
    fn ring(&self) {
        #[cfg(target_os = "linux")]
        let _ = rustix::io::write(&self.read, &1_u64.to_ne_bytes());
        #[cfg(not(target_os = "linux"))]
        let _ = rustix::io::write(&self.write, &[1]);
    }

    fn hear(&self) {
        let _ = rustix::io::read(&self.read, &mut [0_u8; 64]);
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
