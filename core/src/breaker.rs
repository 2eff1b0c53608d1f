//! Stops taking while what the handlers depend on is down. A pure state machine: time is an argument.
//!
//! ```text
//!            `threshold` failures within `window`          `recovery` passed
//!   closed ───────────────────────────────────────► open ───────────────────► half-open
//!     ▲                                               ▲                         │  │
//!     │                                               └─────── one failed ──────┘  │
//!     └─────────────────────── `probes` succeeded ─────────────────────────────────┘
//! ```
//! What counts is a call of the handler: one delivery, or one batch. A call carries the [`Ticket`] of the state in which
//! it began, and says nothing about a later one: a straggler of the outage neither opens nor closes anything.

use std::collections::VecDeque;
use std::time::Duration;

/// When a subscription stops taking, and how it starts again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerOptions {
    /// So many failed calls … Default 5.
    pub threshold: u32,
    /// … within this time open it. Default 60 s.
    pub window: Duration,
    /// How long nothing is taken then. Default 30 s.
    pub recovery: Duration,
    /// How many calls are tried afterwards, at once, and have to succeed. Default 1.
    pub probes: u32,
}

impl Default for BreakerOptions {
    fn default() -> Self {
        Self { threshold: 5, window: Duration::from_secs(60), recovery: Duration::from_secs(30), probes: 1 }
    }
}

/// Where a breaker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Everything runs.
    Closed,
    /// Nothing is taken.
    Open,
    /// A few are tried.
    HalfOpen,
}

impl Phase {
    /// The word that all languages use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }

    /// As a gauge: 0 closed, 1 open, 2 half-open.
    pub const fn number(self) -> u64 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::HalfOpen => 2,
        }
    }

    /// The phase of a gauge.
    pub const fn of(number: u64) -> Self {
        match number {
            0 => Self::Closed,
            1 => Self::Open,
            _ => Self::HalfOpen,
        }
    }
}

/// What a call says about what it depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It works.
    Succeeded,
    /// It does not: the handler failed, asked for another attempt, or ran too long.
    Failed,
    /// Nothing: the event was refused, the handler was stopped, the lease was lost.
    Neither,
}

/// The state in which a call began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// See the module's page. Times are those of one clock, and do not go back.
#[derive(Debug)]
pub struct Breaker {
    options: BreakerOptions,
    state: State,
    /// Changes with each change of state.
    term: u64,
}

#[derive(Debug)]
enum State {
    /// When the last failures ended, oldest first; fewer than the threshold.
    Closed(VecDeque<Duration>),
    Open {
        until: Duration,
    },
    HalfOpen {
        running: u32,
        succeeded: u32,
    },
}

impl Breaker {
    /// A closed one.
    pub fn new(options: BreakerOptions) -> Self {
        Self { options, state: State::Closed(VecDeque::new()), term: 0 }
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Closed(_) => Phase::Closed,
            State::Open { .. } => Phase::Open,
            State::HalfOpen { .. } => Phase::HalfOpen,
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &BreakerOptions {
        &self.options
    }

    /// How many calls may begin now.
    pub fn free(&self) -> usize {
        match self.state {
            State::Closed(_) => usize::MAX,
            State::Open { .. } => 0,
            State::HalfOpen { running, succeeded } => self.options.probes.saturating_sub(running + succeeded) as usize,
        }
    }

    /// When [`Breaker::advance`] will change something.
    pub fn due(&self) -> Option<Duration> {
        match self.state {
            State::Open { until } => Some(until),
            _ => None,
        }
    }

    /// Lets time pass. Whether the state changed.
    pub fn advance(&mut self, now: Duration) -> bool {
        let recovered = matches!(self.state, State::Open { until } if until <= now);
        if recovered {
            self.turn(State::HalfOpen { running: 0, succeeded: 0 });
        }
        recovered
    }

    /// A call begins; only while one is [`free`](Breaker::free).
    pub fn begin(&mut self) -> Ticket {
        if let State::HalfOpen { running, .. } = &mut self.state {
            *running += 1;
        }
        Ticket(self.term)
    }

    /// A call ended. Whether the state changed.
    pub fn end(&mut self, Ticket(term): Ticket, ended: Ended, now: Duration) -> bool {
        if term != self.term {
            return false;
        }
        let before = self.term;
        match (&mut self.state, ended) {
            (State::Closed(failures), Ended::Failed) => {
                let since = now.saturating_sub(self.options.window);
                while failures.front().is_some_and(|failed| *failed < since) {
                    failures.pop_front();
                }
                failures.push_back(now);
                if failures.len() >= self.options.threshold as usize {
                    self.open(now);
                }
            }
            (State::HalfOpen { .. }, Ended::Failed) => self.open(now),
            (State::HalfOpen { running, succeeded }, ended) => {
                *running = running.saturating_sub(1);
                *succeeded += u32::from(ended == Ended::Succeeded);
                if *succeeded >= self.options.probes {
                    self.turn(State::Closed(VecDeque::new()));
                }
            }
            (State::Closed(_) | State::Open { .. }, _) => {}
        }
        before != self.term
    }

    fn open(&mut self, now: Duration) {
        self.turn(State::Open { until: now.saturating_add(self.options.recovery) });
    }

    fn turn(&mut self, state: State) {
        self.state = state;
        self.term += 1;
    }
}
