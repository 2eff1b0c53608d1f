//! The write lock between processes: the kernel wakes the next in line, where SQLite's own busy handler would sleep.
//!
//! Two files, because `flock` is not fair: a process that releases a lock and asks again at once beats the one that
//! is still waking up. Who wants the store first takes the turn (`.bell`), then the lock (`.lock`), then gives the turn
//! back; while a waiter holds the turn, the previous holder of the lock queues behind it.
//!
//! Nothing depends on these files for safety: should somebody delete them, SQLite's own lock still serialises writers.

use std::sync::Arc;

use super::fork::PrivateFile;
use crate::error::{Error, Result};

/// Both files, opened.
pub(super) struct WriteLock {
    turn: Arc<PrivateFile>,
    lock: PrivateFile,
}

/// Held until dropped.
pub(super) struct Held<'a>(&'a WriteLock);

impl WriteLock {
    /// `turn` is the doorbell's file, used here only for its lock.
    pub(super) fn new(turn: Arc<PrivateFile>, lock: PrivateFile) -> Self {
        Self { turn, lock }
    }

    /// Waits, without limit, until this process may write.
    pub(super) fn acquire(&self) -> Result<Held<'_>> {
        let failed = |cause: std::io::Error| {
            Error::connection_failed(format!("locking the event store failed ({cause})")).caused_by(cause)
        };
        self.turn.lock().map_err(failed)?;
        let locked = self.lock.lock();
        let returned = self.turn.unlock();
        locked.map_err(failed)?;
        let held = Held(self);
        returned.map_err(failed)?;
        Ok(held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if let Err(cause) = self.0.lock.unlock() {
            log::error!("unlocking the event store failed: {cause}");
        }
    }
}
