//! Time as the core sees it: real, or moved by a test.
//!
//! Policies take times as arguments; only loops wait, and they wait here, so that a test bus can move every timer of
//! the memory transport and of the dispatchers with one call.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

/// A clock that never goes back. Cheap to clone; clones share virtual time.
#[derive(Clone)]
pub struct Clock {
    epoch: SystemTime,
    started: Instant,
    moved: Option<watch::Sender<Duration>>,
    /// What waits for a stopped clock: how many for each time.
    timers: Arc<Mutex<BTreeMap<Duration, usize>>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { epoch: SystemTime::now(), started: Instant::now(), moved: None, timers: Arc::default() }
    }
}

impl Clock {
    /// A clock that stands still until [`Clock::move_to`].
    pub fn stopped() -> Self {
        Self { moved: Some(watch::Sender::new(Duration::ZERO)), ..Self::default() }
    }

    /// Time since this clock was made.
    pub fn elapsed(&self) -> Duration {
        self.moved.as_ref().map_or_else(|| self.started.elapsed(), |moved| *moved.borrow())
    }

    /// Time of day, counted from the moment the clock was made: setting the system's clock does not move it.
    pub fn now(&self) -> SystemTime {
        self.epoch + self.elapsed()
    }

    /// Waits until [`Clock::elapsed`] has reached `due`.
    pub async fn sleep_until(&self, due: Duration) {
        match &self.moved {
            None => tokio::time::sleep(due.saturating_sub(self.started.elapsed())).await,
            Some(moved) => {
                let _timer = Timer::new(&self.timers, due);
                drop(moved.subscribe().wait_for(|now| *now >= due).await);
            }
        }
    }

    /// Moves a stopped clock forward; a real one stays as it is.
    pub fn move_to(&self, time: Duration) {
        if let Some(moved) = &self.moved {
            moved.send_modify(|now| *now = time.max(*now));
        }
    }

    /// The first time after now that something waits for, of a stopped clock.
    pub(crate) fn next_timer(&self) -> Option<Duration> {
        let later = (Bound::Excluded(self.elapsed()), Bound::Unbounded);
        lock(&self.timers).range(later).next().map(|(due, _)| *due)
    }

    /// Whether [`Clock::move_to`] moves it.
    pub fn is_virtual(&self) -> bool {
        self.moved.is_some()
    }
}

/// Says that somebody waits, until it is dropped.
struct Timer<'a> {
    timers: &'a Mutex<BTreeMap<Duration, usize>>,
    due: Duration,
}

impl<'a> Timer<'a> {
    fn new(timers: &'a Mutex<BTreeMap<Duration, usize>>, due: Duration) -> Self {
        *lock(timers).entry(due).or_default() += 1;
        Self { timers, due }
    }
}

impl Drop for Timer<'_> {
    fn drop(&mut self) {
        let mut timers = lock(self.timers);
        if let Some(count) = timers.get_mut(&self.due) {
            *count -= 1;
            if *count == 0 {
                timers.remove(&self.due);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
