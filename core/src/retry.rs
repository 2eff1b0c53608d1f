//! When to try again: pure arithmetic, no clock, no sleep, no I/O. Loops sleep, policies compute.

use std::time::Duration;

/// How the delay is spread, so that many failing deliveries do not come back at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Jitter {
    /// Uniform between zero and the computed delay ("full jitter", AWS Architecture Blog, 2015).
    #[default]
    Full,
    /// The computed delay itself.
    None,
}

/// Exponential back-off with a cap. `max_retries` counts retries: 3 means four attempts.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// Retries after the first attempt. Default 3.
    pub max_retries: u32,
    /// Delay before the first retry. Default 1 s.
    pub initial_delay: Duration,
    /// No delay is longer. Default 30 s.
    pub max_delay: Duration,
    /// Each delay is this many times the one before; at least 1. Default 2.
    pub factor: f64,
    /// Default [`Jitter::Full`].
    pub jitter: Jitter,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            max_retries: 3,
            initial_delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(30),
            factor: 2.0,
            jitter: Jitter::Full,
        }
    }
}

impl RetryPolicy {
    /// One attempt and no other.
    pub const NONE: Self = Self {
        max_retries: 0,
        initial_delay: Duration::ZERO,
        max_delay: Duration::ZERO,
        factor: 1.0,
        jitter: Jitter::None,
    };

    /// The delay after failed attempt number `attempt` (from 1), or `None` to give up.
    ///
    /// `random` lies in `0.0..1.0` and spreads the delay; the same inputs give the same delay in every language.
    pub fn delay(&self, attempt: u32, random: f64) -> Option<Duration> {
        if attempt > self.max_retries {
            return None;
        }
        // f64 powers saturate at infinity, so a large attempt ends at the cap instead of overflowing.
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let raw = self.initial_delay.as_secs_f64() * self.factor.powi(exponent);
        let capped = raw.min(self.max_delay.as_secs_f64());
        let spread = match self.jitter {
            Jitter::Full => capped * random.clamp(0.0, 1.0),
            Jitter::None => capped,
        };
        Some(Duration::from_secs_f64(spread.max(0.0)))
    }

    /// The longest time between the first attempt and the last, without what the attempts take.
    pub fn longest(&self) -> Duration {
        // What follows after so many is at the cap, or as good as for ever.
        const SUMMED: u32 = 1000;
        let first = (1..=self.max_retries.min(SUMMED)).filter_map(|attempt| self.delay(attempt, 1.0));
        let rest = self.max_delay.saturating_mul(self.max_retries.saturating_sub(SUMMED));
        first.fold(rest, Duration::saturating_add)
    }

    /// Attempts in all, the first included.
    pub fn max_attempts(&self) -> u32 {
        self.max_retries.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_up_after_max_retries() {
        let policy = RetryPolicy { max_retries: 3, jitter: Jitter::None, ..Default::default() };
        let delays: Vec<_> = (1..=5).map(|attempt| policy.delay(attempt, 0.5).map(|d| d.as_secs())).collect();
        assert_eq!(delays, [Some(1), Some(2), Some(4), None, None]);
    }

    #[test]
    fn a_huge_attempt_stays_at_the_cap() {
        let policy = RetryPolicy { max_retries: u32::MAX, jitter: Jitter::None, ..Default::default() };
        assert_eq!(policy.delay(u32::MAX, 0.0), Some(Duration::from_secs(30)));
    }

    #[test]
    fn the_longest_time_is_the_sum_of_the_delays() {
        assert_eq!(RetryPolicy::default().longest(), Duration::from_secs(1 + 2 + 4));
        let steady = RetryPolicy { max_retries: 2000, initial_delay: Duration::from_secs(30), ..Default::default() };
        assert_eq!(steady.longest(), Duration::from_secs(30 * 2000));
    }

    #[test]
    fn full_jitter_spreads_from_zero_to_the_delay() {
        let policy = RetryPolicy::default();
        assert_eq!(policy.delay(2, 0.0), Some(Duration::ZERO));
        assert_eq!(policy.delay(2, 0.25), Some(Duration::from_millis(500)));
    }
}
