//! Heartbeats for everything that is held, running or buffered.
//!
//! They run on a thread of their own, not on the runtime and not in the host language: a Python handler that holds
//! the GIL, a Node handler that blocks its event loop, or a Rust handler that blocks a runtime thread is busy, not
//! dead, and is not redelivered.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use crate::transport::Source;

/// Beats for the sources of one process.
pub(crate) struct LeaseKeeper {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    kept: Vec<Kept>,
    running: bool,
}

struct Kept {
    source: Weak<dyn Source>,
    every: Duration,
    due: Instant,
}

impl LeaseKeeper {
    pub fn new(runtime: tokio::runtime::Handle) -> Self {
        Self { shared: Arc::default(), runtime }
    }

    /// Beats for `source` three times in each `lease`, until it is dropped.
    pub fn keep(&self, source: &Arc<dyn Source>, lease: Duration) {
        let every = lease / 3;
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.kept.push(Kept { source: Arc::downgrade(source), every, due: Instant::now() + every });
        if !state.running {
            let (shared, runtime) = (self.shared.clone(), self.runtime.clone());
            let spawned = std::thread::Builder::new().name("polybus-lease".into()).spawn(move || shared.run(&runtime));
            state.running = spawned.inspect_err(|cause| log::error!("no thread for heartbeats: {cause}")).is_ok();
        }
        self.shared.changed.notify_one();
    }
}

impl Shared {
    fn run(&self, runtime: &tokio::runtime::Handle) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            state.kept.retain(|kept| kept.source.strong_count() > 0);
            if state.kept.is_empty() {
                state.running = false;
                return;
            }
            let now = Instant::now();
            let due: Vec<_> = state
                .kept
                .iter_mut()
                .filter(|kept| kept.due <= now)
                .filter_map(|kept| {
                    kept.due = now + kept.every;
                    kept.source.upgrade()
                })
                .collect();
            if due.is_empty() {
                let next = state.kept.iter().map(|kept| kept.due).min().unwrap_or(now);
                let wait = next.saturating_duration_since(now);
                state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            let beats = join_all(due.iter().map(|source| source.heartbeat(Vec::new())));
            for failed in runtime.block_on(beats).into_iter().filter_map(Result::err) {
                log::warn!("heartbeat failed, leases may be lost: {failed}");
            }
            // Dropping the last hold on a source may take the lock of its transport: not under ours.
            drop(due);
            state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        }
    }
}
