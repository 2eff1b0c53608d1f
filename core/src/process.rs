//! What belongs to one process **id**: the tokio runtime, and the name that owns leases.
//!
//! Everything is made on first use and looked up by process id, so that a forked child (gunicorn `--preload`,
//! `multiprocessing`, Celery prefork) gets its own. The parent's copy is leaked in the child, never dropped: its
//! threads do not exist there, and joining them would hang.

use std::sync::atomic::{AtomicPtr, Ordering};

use crate::event::Text;

/// The per-process context.
pub struct Process {
    pid: u32,
    /// `host-pid-random`: `instanceId` of the events made here, and the owner of leases.
    pub instance_id: Text,
    /// Runs dispatchers and timers; never user code of another language.
    pub runtime: tokio::runtime::Runtime,
}

static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());

/// The context of the calling process, made now if this process id has none.
///
/// # Panics
/// When the operating system refuses to start a thread.
pub fn current() -> &'static Process {
    let pid = std::process::id();
    let seen = CURRENT.load(Ordering::Acquire);
    // SAFETY: a non-null pointer comes from Box::into_raw below and is never freed.
    if let Some(process) = unsafe { seen.as_ref() }
        && process.pid == pid
    {
        return process;
    }
    let made = Box::into_raw(Box::new(Process::new(pid)));
    match CURRENT.compare_exchange(seen, made, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: as above.
        Ok(_) => unsafe { &*made },
        Err(winner) => {
            // SAFETY: `made` was never shared; dropping its runtime joins threads of this very process.
            drop(unsafe { Box::from_raw(made) });
            // SAFETY: as above; the winner was made by another thread of this process id.
            unsafe { &*winner }
        }
    }
}

impl Process {
    fn new(pid: u32) -> Self {
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
            .enable_time()
            .build()
            .expect("polybus: the operating system refused to start a thread");
        Self { pid, instance_id: format!("{host}-{pid}-{:06x}", fastrand::u32(..) & 0xff_ffff).into(), runtime }
    }
}
