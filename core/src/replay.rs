//! Replay: the loop of batches that hands a part of the log to one group again.

use crate::bus::Bus;
use crate::error::{Error, Result};
use crate::history::{ReplayResult, ReplayStep};
use crate::options::ReplayOptions;

/// Events handed out in one step. Each step is atomic on the store, and the writer is free for others after it.
const BATCH: u64 = 500;

/// A replay under way. The languages take it step by step, so that a callback of theirs runs between two steps on their
/// own loop; [`Replay::run`] is the same for Rust.
///
/// It covers what the group had been given when the first step ran. Dropping it between two steps loses nothing: a
/// new one goes on after [`ReplayResult::position`].
pub struct Replay {
    bus: Bus,
    step: ReplayStep,
    left: Option<u64>,
    result: ReplayResult,
    ended: bool,
}

impl Replay {
    /// A replay that has not begun. `InvalidConfig` for a limit of 0 or a time that ends before it begins.
    pub fn new(bus: Bus, options: ReplayOptions) -> Result<Self> {
        let ReplayOptions { group, filter, after, limit } = options;
        filter.check()?;
        if limit == Some(0) {
            return Err(Error::invalid_config("limit=0 is not valid; give at least 1"));
        }
        let result = ReplayResult { position: after.clone(), ..ReplayResult::default() };
        let step = ReplayStep { group, filter, after, end: None, max: 0 };
        Ok(Self { bus, step, left: limit, result, ended: false })
    }

    /// Hands out the next batch. `None` when the step before was the last.
    ///
    /// `NotFound` for an unknown group, `InvalidConfig` for a text that is no position, `BusClosed`, `ConnectionFailed`,
    /// `Unsupported`. After a failure nothing of this batch was handed out (on a bus with partitions: of this batch
    /// in one partition), and the next call tries again.
    pub async fn next(&mut self) -> Result<Option<ReplayResult>> {
        if self.ended {
            return Ok(None);
        }
        self.step.max = self.left.map_or(BATCH, |left| left.min(BATCH)) as usize;
        let batch = self.bus.replay_step(self.step.clone()).await?;
        self.step.end = Some(batch.end);
        if batch.position.is_some() {
            self.step.after.clone_from(&batch.position);
            self.result.position = batch.position;
        }
        self.result.count += batch.handed;
        self.result.skipped += batch.skipped;
        self.result.done = batch.done;
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(batch.handed);
        }
        self.ended = batch.done || self.left == Some(0);
        Ok(Some(self.result.clone()))
    }

    /// Whether there is no step left.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// All batches; `progress` is told after each, the last included.
    pub async fn run(mut self, mut progress: impl FnMut(&ReplayResult)) -> Result<ReplayResult> {
        while let Some(result) = self.next().await? {
            progress(&result);
        }
        Ok(self.result)
    }
}
