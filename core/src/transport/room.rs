//! A bounded queue of publishes: how much may wait, and what happens to the next one.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result, closed};

/// What a publish does when there is no room for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// It waits for room, until its timeout.
    #[default]
    Wait,
    /// It fails at once.
    Error,
}

/// Bytes of publishes that may wait, unless the user says otherwise.
const BYTES: usize = 64 << 20;
/// What one waiting event weighs beside its bytes: bounds the queue to about 130,000 entries.
const ENTRY: usize = 512;

/// Room for a bus's publishes on their way to the store.
pub(super) struct Room {
    bytes: usize,
    free: Arc<Semaphore>,
    when_full: WhenFull,
}

impl Room {
    /// Room for so many bytes, by default 64 MiB.
    pub fn new(bytes: Option<usize>, when_full: WhenFull) -> Self {
        let bytes = bytes.unwrap_or(BYTES).clamp(1, u32::MAX as usize);
        Self { bytes, free: Arc::new(Semaphore::new(bytes)), when_full }
    }

    /// Takes room for a batch, until the permit is dropped. A batch larger than all the room is alone in the queue.
    /// `BufferFull` at once, or when the deadline passed.
    pub async fn enter(&self, events: usize, bytes: usize, deadline: Instant) -> Result<OwnedSemaphorePermit> {
        let weight = bytes.saturating_add(events.saturating_mul(ENTRY)).min(self.bytes);
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        match self.free.clone().try_acquire_many_owned(weight) {
            Ok(permit) => return Ok(permit),
            Err(_) if self.when_full == WhenFull::Error => return Err(self.full("is full")),
            Err(_) => {}
        }
        match tokio::time::timeout_at(deadline, self.free.clone().acquire_many_owned(weight)).await {
            Ok(permit) => permit.map_err(|_| closed()),
            Err(_) => Err(self.full("stayed full until the timeout passed")),
        }
    }

    fn full(&self, what: &str) -> Error {
        let message = format!(
            "the queue of publishes ({} KiB) {what}; nothing was stored, publish slower or in larger batches",
            self.bytes.div_ceil(1024)
        );
        Error::new(ErrorKind::BufferFull, message)
    }
}
