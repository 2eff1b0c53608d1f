//! What a test bus adds to a memory bus: it remembers what was published, moves time, and breaks things on request.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::event::Event;
use crate::pattern::Pattern;

/// Faults that were asked for and have not happened yet.
#[derive(Default)]
pub(crate) struct Faults {
    fail: Mutex<Vec<(Pattern, u32)>>,
    duplicate: Mutex<Vec<(Pattern, u32)>>,
}

impl Faults {
    pub fn fail_next(&self, pattern: Pattern, times: u32) {
        lock(&self.fail).push((pattern, times));
    }

    pub fn duplicate_next(&self, pattern: Pattern, times: u32) {
        lock(&self.duplicate).push((pattern, times));
    }

    /// Whether the handling of `event` is to fail; counts it.
    pub fn take_failure(&self, event: &Event) -> bool {
        Self::take(&self.fail, event)
    }

    /// Whether `event` is to be published twice; counts it.
    pub fn take_duplicate(&self, event: &Event) -> bool {
        Self::take(&self.duplicate, event)
    }

    fn take(faults: &Mutex<Vec<(Pattern, u32)>>, event: &Event) -> bool {
        let mut faults = lock(faults);
        let Some(fault) = faults.iter().position(|(pattern, _)| pattern.matches(event.event_type.as_str())) else {
            return false;
        };
        faults[fault].1 -= 1;
        if faults[fault].1 == 0 {
            faults.remove(fault);
        }
        true
    }
}

/// The events that a bus published, in order.
#[derive(Default)]
pub(crate) struct Published {
    events: Mutex<Vec<Event>>,
    arrived: Notify,
}

impl Published {
    pub fn add(&self, events: impl IntoIterator<Item = Event>) {
        lock(&self.events).extend(events);
        self.arrived.notify_waiters();
    }

    pub fn matching(&self, pattern: &Pattern) -> Vec<Event> {
        let events = lock(&self.events);
        events.iter().filter(|event| pattern.matches(event.event_type.as_str())).cloned().collect()
    }

    /// The first matching event, published before or after the call.
    pub async fn first(&self, pattern: &Pattern) -> Event {
        loop {
            let arrived = self.arrived.notified();
            if let Some(event) = self.matching(pattern).into_iter().next() {
                return event;
            }
            arrived.await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
