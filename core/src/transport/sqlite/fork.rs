//! What must happen when a process that uses a store forks.
//!
//! Three things outlive a fork that must not be used by the child:
//!
//! 1. **Lock files.** A `flock` belongs to the open file description, which the child shares: a child that lives on
//!    would keep a lock that its dead parent held. Their descriptors stand in [`FILES`]; the child closes them.
//! 2. **SQLite's memory of its locks.** POSIX locks do not pass to the child, yet SQLite's per-inode table says that
//!    they are held; a connection that the child opens would trust the table, take no lock of its own, and lose
//!    commits. So the child closes the inherited connections ([`HANDLES`]) before it opens its first one: in the
//!    child that releases nothing of the parent's, and it empties the table.
//! 3. **Mutexes held by threads that do not exist in the child.** Each use of SQLite passes the [`GATE`]; the fork
//!    waits until it is free, at most one transaction, so no mutex of SQLite is held at that instant.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Once, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rusqlite::{Connection, ffi};

use crate::error::{Error, Result};

static GATE: RwLock<()> = RwLock::new(());
static FILES: [AtomicI32; 256] = [const { AtomicI32::new(NONE) }; 256];
static HANDLES: [AtomicPtr<ffi::sqlite3>; 512] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 512];
/// The process that [`HANDLES`] belongs to.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// The gate's guard while the process forks: an `Option<RwLockWriteGuard>` that only the forking thread touches.
static FORKING: AtomicPtr<RwLockWriteGuard<'static, ()>> = AtomicPtr::new(std::ptr::null_mut());
const NONE: i32 = -1;

/// Use of SQLite is allowed while this lives. Hold it for a statement or a transaction, never while waiting for
/// another process.
pub(super) fn enter() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Installs the handlers, once per program. Children inherit them.
pub(super) fn install() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the three functions live as long as the program and keep to what is said at each of them.
        unsafe { libc::pthread_atfork(Some(before), Some(in_parent), Some(in_child)) };
    });
}

extern "C" fn before() {
    let guard = GATE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
    FORKING.store(Box::into_raw(Box::new(guard)), Ordering::Release);
}

extern "C" fn in_parent() {
    let guard = FORKING.swap(std::ptr::null_mut(), Ordering::AcqRel);
    if !guard.is_null() {
        // SAFETY: made by Box::into_raw in `before`, by this thread, and taken out once.
        drop(unsafe { Box::from_raw(guard) });
    }
}

extern "C" fn in_child() {
    for slot in &FILES {
        let descriptor = slot.swap(NONE, Ordering::AcqRel);
        if descriptor != NONE {
            // SAFETY: the descriptor belongs to a `File` that the child leaks, so it is closed exactly once here.
            unsafe { libc::close(descriptor) };
        }
    }
    in_parent();
}

/// Closes what the parent process had open. Call before opening a connection, with the registry's lock held.
pub(super) fn forget_parent() {
    let pid = std::process::id();
    if OWNER.swap(pid, Ordering::AcqRel) == pid {
        return;
    }
    let _inside = enter();
    for slot in &HANDLES {
        let handle = slot.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if handle.is_null() {
            continue;
        }
        // SAFETY: the handle was open and idle when the process forked (the gate), the thread that owned it does not
        // exist here, and its `Connection` is never dropped in this process.
        unsafe {
            loop {
                let statement = ffi::sqlite3_next_stmt(handle, std::ptr::null_mut());
                if statement.is_null() {
                    break;
                }
                ffi::sqlite3_finalize(statement);
            }
            ffi::sqlite3_close(handle);
        }
    }
}

/// A connection that a forked child will know to close. Opening and dropping pass the gate by themselves: the caller
/// must not be inside.
pub(super) struct Tracked {
    connection: ManuallyDrop<Connection>,
    slot: usize,
}

impl Tracked {
    /// Opens a connection and enters it in the table.
    pub(super) fn open(open: impl FnOnce() -> Result<Connection>) -> Result<Self> {
        let _inside = enter();
        let connection = open()?;
        // SAFETY: the handle is only stored; who uses it says why it may.
        let handle = unsafe { connection.handle() };
        let free = |slot: &AtomicPtr<ffi::sqlite3>| {
            slot.compare_exchange(std::ptr::null_mut(), handle, Ordering::AcqRel, Ordering::Acquire).is_ok()
        };
        match HANDLES.iter().position(free) {
            Some(slot) => Ok(Self { connection: ManuallyDrop::new(connection), slot }),
            None => Err(Error::connection_failed("this process has too many event stores open; close some")),
        }
    }
}

impl std::ops::Deref for Tracked {
    type Target = Connection;
    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let _inside = enter();
        HANDLES[self.slot].store(std::ptr::null_mut(), Ordering::Release);
        // SAFETY: dropped once, here.
        unsafe { ManuallyDrop::drop(&mut self.connection) };
    }
}

/// A file whose descriptor a forked child closes.
pub(super) struct PrivateFile {
    file: File,
    slot: usize,
}

impl PrivateFile {
    /// Enters `file` in the table.
    pub(super) fn new(file: File) -> Result<Self> {
        let descriptor = file.as_raw_fd();
        let free =
            |slot: &AtomicI32| slot.compare_exchange(NONE, descriptor, Ordering::AcqRel, Ordering::Acquire).is_ok();
        match FILES.iter().position(free) {
            Some(slot) => Ok(Self { file, slot }),
            None => Err(Error::connection_failed("this process has too many event stores open; close some")),
        }
    }
}

impl std::ops::Deref for PrivateFile {
    type Target = File;
    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for PrivateFile {
    fn drop(&mut self) {
        FILES[self.slot].store(NONE, Ordering::Release);
    }
}
