//! What belongs to one process **id**: the tokio runtime, the name that owns leases, and every other shared thing.
//!
//! Everything is made on first use and looked up by process id, so that a forked child (gunicorn `--preload`,
//! `multiprocessing`, Celery prefork) gets its own. The parent's copy is leaked in the child, never dropped: its
//! threads do not exist there, and joining them, or taking a lock that one of them held, would hang.

use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::event::Text;
use crate::lease::LeaseKeeper;

/// 0: to be asked for.
static ID: AtomicU32 = AtomicU32::new(0);

/// The id of this process. Asking the system costs a system call, and a publish wants to know it eight times.
fn id() -> u32 {
    match ID.load(Ordering::Relaxed) {
        0 => ask_id(),
        known => known,
    }
}

#[cold]
fn ask_id() -> u32 {
    static WATCHING: Once = Once::new();
    // First: a fork from here on is noticed.
    WATCHING.call_once(|| {
        // SAFETY: the function lives as long as the program, and does nothing that is forbidden after fork.
        unsafe { libc::pthread_atfork(None, None, Some(forget_id)) };
    });
    let id = std::process::id();
    ID.store(id, Ordering::Relaxed);
    id
}

extern "C" fn forget_id() {
    ID.store(0, Ordering::Relaxed);
}

/// A value made anew in each process id that asks for it.
pub struct PerProcess<T>(AtomicPtr<(u32, T)>);

impl<T> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> PerProcess<T> {
    /// Holds nothing yet.
    pub const fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    /// The value of the calling process, if it was made.
    pub fn get(&self) -> Option<&T> {
        // SAFETY: a non-null pointer comes from Box::into_raw in `get_or_init` and is freed only by `drop`, which
        // has `&mut self`.
        let (pid, value) = unsafe { self.0.load(Ordering::Acquire).as_ref() }?;
        (*pid == id()).then_some(value)
    }

    /// The value of the calling process, made by `init` if this process id has none. A parent's value is leaked.
    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        if let Some(value) = self.get() {
            return value;
        }
        let seen = self.0.load(Ordering::Acquire);
        let made = Box::into_raw(Box::new((id(), init())));
        match self.0.compare_exchange(seen, made, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: as in `get`; what we just stored, or what another thread of this process stored first.
            Ok(_) => unsafe { &(*made).1 },
            Err(winner) => {
                // SAFETY: `made` was never shared.
                drop(unsafe { Box::from_raw(made) });
                // SAFETY: as in `get`.
                unsafe { &(*winner).1 }
            }
        }
    }
}

impl<T> Drop for PerProcess<T> {
    fn drop(&mut self) {
        if self.get().is_some() {
            // SAFETY: `get` saw a live pointer of this process, and nobody else can use it: we have `&mut self`.
            drop(unsafe { Box::from_raw(*self.0.get_mut()) });
        }
    }
}

/// The context of one process.
pub struct Process {
    /// `host-pid-random`: `instanceId` of the events made here, and the owner of leases.
    pub instance_id: Text,
    /// Runs dispatchers and timers; never user code of another language.
    pub runtime: Runtime,
    /// Keeps this process's leases alive.
    pub(crate) leases: LeaseKeeper,
}

/// A tokio runtime that may be dropped anywhere, also on a thread of another runtime, where tokio's own would panic.
pub struct Runtime(Option<tokio::runtime::Runtime>);

impl std::ops::Deref for Runtime {
    type Target = tokio::runtime::Runtime;

    fn deref(&self) -> &tokio::runtime::Runtime {
        match &self.0 {
            Some(runtime) => runtime,
            None => unreachable!("taken only by drop"),
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// The context of the calling process, made now if this process id has none.
///
/// # Panics
/// When the operating system refuses to start a thread.
pub fn current() -> &'static Process {
    static CURRENT: PerProcess<Process> = PerProcess::new();
    CURRENT.get_or_init(Process::new)
}

impl Process {
    fn new() -> Self {
        let pid = id();
        // fork copies the state of the random generator: without a new seed, parent and child would draw the same
        // lease tokens.
        fastrand::seed(std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), pid));
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy();
        let host: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(40).collect();
        let threads = std::thread::available_parallelism().map_or(1, |n| (n.get() / 2).clamp(1, 4));
        #[expect(clippy::expect_used, reason = "without threads there is no bus, and no caller who could do better")]
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name("polybus")
            .enable_all()
            .build()
            .expect("polybus: the operating system refused to start a thread");
        let leases = LeaseKeeper::new(runtime.handle().clone());
        let instance_id = format!("{host}-{pid}-{:06x}", fastrand::u32(..) & 0xff_ffff).into();
        Self { instance_id, runtime: Runtime(Some(runtime)), leases }
    }
}
