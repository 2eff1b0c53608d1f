//! Time as the core sees it: real, or moved by a test.
//!
//! Policies take times as arguments; only loops wait, and they wait here, so that a test bus can move every timer of
//! the memory transport and of the dispatchers with one call.

use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

/// A clock that never goes back. Cheap to clone; clones share virtual time.
#[derive(Clone)]
pub struct Clock {
    epoch: SystemTime,
    started: Instant,
    moved: Option<watch::Sender<Duration>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { epoch: SystemTime::now(), started: Instant::now(), moved: None }
    }
}

impl Clock {
    /// A clock that stands still until [`Clock::advance`].
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
            Some(moved) => drop(moved.subscribe().wait_for(|now| *now >= due).await),
        }
    }

    /// Moves a stopped clock; a real one stays as it is.
    pub fn advance(&self, by: Duration) {
        if let Some(moved) = &self.moved {
            moved.send_modify(|now| *now = now.saturating_add(by));
        }
    }

    /// Whether [`Clock::advance`] moves it.
    pub fn is_virtual(&self) -> bool {
        self.moved.is_some()
    }
}
