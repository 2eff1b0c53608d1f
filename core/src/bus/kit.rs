//! What only a test bus can do.

use std::time::Duration;

use super::{Bus, Kit};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::pattern::Pattern;

/// How long time waits for handlers before it moves, how long at each step, and how often in vain until it leaps to its end.
const BEFORE: Duration = Duration::from_millis(200);
const STEP: Duration = Duration::from_secs(1);
const STUCK: u32 = 5;

/// These need a bus with `virtual_clock`, else `Unsupported`.
impl Bus {
    fn kit(&self) -> Result<&Kit> {
        self.0.kit.as_ref().ok_or_else(|| Error::unsupported("only a test bus can do this; make one with TestBus()"))
    }

    /// What this bus published, in order.
    pub fn published(&self, pattern: &str) -> Result<Vec<Event>> {
        Ok(self.kit()?.published.matching(&Pattern::new(pattern)?))
    }

    /// The first matching event, published before or after the call.
    pub async fn wait_for(&self, pattern: &str) -> Result<Event> {
        Ok(self.kit()?.published.first(&Pattern::new(pattern)?).await)
    }

    /// The next `times` attempts to handle a matching event fail before the handler sees it.
    pub fn fail_next(&self, pattern: &str, times: u32) -> Result<()> {
        self.kit()?.faults.fail_next(Pattern::new(pattern)?, times.max(1));
        Ok(())
    }

    /// The next `times` matching events are published twice.
    pub fn duplicate_next(&self, pattern: &str, times: u32) -> Result<()> {
        self.kit()?.faults.duplicate_next(Pattern::new(pattern)?, times.max(1));
        Ok(())
    }

    /// Moves time, from one due time to the next: retries, delays and handler deadlines that fall due on the way happen
    /// each at its time, and what they schedule within it, too. Handlers that do not end are waited for briefly, in real
    /// time: their deadline may be what is waited for.
    pub async fn advance(&self, by: Duration) -> Result<()> {
        self.kit()?;
        let (transport, clock) = (self.open().await?, &self.0.clock);
        let target = clock.elapsed().saturating_add(by);
        let (mut patience, mut stuck, mut arrived) = (BEFORE, 0, false);
        loop {
            let due = match tokio::time::timeout(patience, transport.idle()).await {
                Ok(due) => due?,
                Err(_) => {
                    stuck += 1;
                    None // what it waits for by the clock is among the timers by now
                }
            };
            if arrived {
                return Ok(());
            }
            let next = [due, clock.next_timer()].into_iter().flatten().min().filter(|_| stuck < STUCK);
            clock.move_to(next.map_or(target, |next| next.min(target)));
            (patience, arrived) = (STEP, clock.elapsed() >= target);
        }
    }

    /// Waits until nothing is left to do at this moment of the bus's time. Who is paused has nothing to do.
    pub async fn idle(&self) -> Result<()> {
        self.kit()?;
        self.open().await?.idle().await.map(drop)
    }
}
