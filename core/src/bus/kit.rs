//! What only a test bus can do.

use std::time::Duration;

use super::{Bus, Kit};
use crate::error::{Error, Result};
use crate::event::Event;
use crate::pattern::Pattern;

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

    /// Moves time: retries, delays, expiries and handler deadlines that fall due happen now.
    pub fn advance(&self, by: Duration) -> Result<()> {
        self.kit().map(|_| self.0.clock.advance(by))
    }

    /// Waits until nothing is left to do at this moment of the bus's time. Who is paused has nothing to do.
    pub async fn idle(&self) -> Result<()> {
        self.kit()?;
        self.open().await?.idle().await
    }
}
