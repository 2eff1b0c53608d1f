//! What a relay says about itself.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Relay;
use super::store::RelayStats;
use crate::error::Error;
use crate::metrics::{self, Family};

/// What became of the rows of one claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RelayBatch {
    /// Rows that were claimed.
    pub attempted: u64,
    /// Published, and marked so.
    pub relayed: u64,
    /// Not taken by the bus.
    pub publish_failed: u64,
    /// Published, and not marked, because the database did not answer: they will be published again.
    pub ack_failed: u64,
    /// Rows that another relay had claimed meanwhile, because our lease was over: nothing of theirs was changed.
    pub ownership_mismatches: u64,
    /// Rows that hold no event. They are dead.
    pub malformed: u64,
    /// Rows that will not be tried again, the malformed ones included.
    pub dead_lettered: u64,
    /// Given back untried, or without an attempt counted: the bus was away, or they wait for an earlier one of their key.
    pub returned: u64,
    /// Why the bus took nothing, if it is away.
    pub outage: Option<String>,
}

/// How a relay is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// It runs, reaches the database, and the bus takes events.
    pub healthy: bool,
    /// Workers that run in this process.
    pub workers: u64,
    /// Why the database cannot be used, if so.
    pub database: Option<String>,
    /// Why the bus takes nothing, if so.
    pub bus: Option<String>,
    /// Time since a worker looked at the table with success.
    pub last_look: Option<Duration>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub workers: AtomicU64,
    totals: [AtomicU64; 8],
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    database: Option<String>,
    bus: Option<String>,
    looked: Option<Instant>,
    sample: Option<(Instant, RelayStats)>,
}

/// Names and meanings of the totals, in the order of [`totals`].
const TOTALS: [(&str, &str); 8] = [
    ("relay_attempted_total", "Rows of the outbox that were claimed."),
    ("relay_relayed_total", "Rows that were published and marked so."),
    ("relay_publish_failed_total", "Rows that the bus did not take."),
    ("relay_ack_failed_total", "Rows that were published and could not be marked so."),
    ("relay_ownership_mismatches_total", "Rows that another relay had claimed when ours was done with them."),
    ("relay_malformed_total", "Rows that hold no event."),
    ("relay_dead_lettered_total", "Rows that will not be tried again."),
    ("relay_returned_total", "Rows that were given back without an attempt counted."),
];

fn totals(batch: &RelayBatch) -> [u64; 8] {
    [
        batch.attempted,
        batch.relayed,
        batch.publish_failed,
        batch.ack_failed,
        batch.ownership_mismatches,
        batch.malformed,
        batch.dead_lettered,
        batch.returned,
    ]
}

impl Counters {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a batch.
    pub fn batch(&self, batch: &RelayBatch) {
        for (total, more) in self.totals.iter().zip(totals(batch)) {
            total.fetch_add(more, Ordering::Relaxed);
        }
        if batch.attempted > 0 {
            self.state().bus.clone_from(&batch.outage);
        }
    }

    /// Notes that the table was looked at, or why not. True when that is news.
    pub fn looked(&self, error: Option<&Error>) -> bool {
        let mut state = self.state();
        let news = state.database.is_some() != error.is_some();
        state.database = error.map(ToString::to_string);
        if error.is_none() {
            state.looked = Some(Instant::now());
        }
        news
    }

    /// Keeps what was counted, for metrics.
    pub fn sampled(&self, stats: RelayStats) {
        self.state().sample = Some((Instant::now(), stats));
    }
}

impl Health {
    /// Why it is not healthy, in words.
    pub fn why(&self) -> Vec<String> {
        let mut why = Vec::new();
        if self.workers == 0 {
            why.push("no worker runs: it starts, waits for its database, or has ended".to_owned());
        } else if self.last_look.is_none() {
            why.push("no worker has looked at the outbox yet".to_owned());
        }
        why.extend(self.database.iter().map(|error| format!("database: {error}")));
        why.extend(self.bus.iter().map(|error| format!("bus: {error}")));
        why
    }
}

impl Relay {
    /// How it is.
    pub fn health(&self) -> Health {
        let counters = &self.live().counters;
        let workers = counters.workers.load(Ordering::Relaxed);
        let state = counters.state();
        Health {
            healthy: workers > 0 && state.database.is_none() && state.bus.is_none() && state.looked.is_some(),
            workers,
            database: state.database.clone(),
            bus: state.bus.clone(),
            last_look: state.looked.map(|at| at.elapsed()),
        }
    }

    /// Totals of this process, and what there is to do, for Prometheus. The table is counted every few seconds at most.
    pub async fn metrics(&self) -> String {
        const FRESH: Duration = Duration::from_secs(5);
        const PATIENCE: Duration = Duration::from_secs(2);
        let known = self.live().counters.state().sample;
        let fresh = known.is_some_and(|(at, _)| at.elapsed() < FRESH);
        if !fresh {
            // Whoever asks does not wait for a database that is away: the totals are there.
            match tokio::time::timeout(PATIENCE, self.stats()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => log::debug!("the outbox could not be counted: {error}"),
                Err(_) => log::debug!("the outbox was not counted within {PATIENCE:?}"),
            }
        }
        let labels = [("table", self.0.options.table.clone())];
        let mut families = Vec::new();
        let mut add = |name, kind, help, value| {
            let mut family = Family::new(name, kind, help);
            family.add(labels.clone(), value);
            families.push(family);
        };
        let counters = &self.live().counters;
        for ((name, help), total) in TOTALS.into_iter().zip(&counters.totals) {
            add(name, "counter", help, total.load(Ordering::Relaxed) as f64);
        }
        let health = self.health();
        add("relay_workers", "gauge", "Workers that run in this process.", health.workers as f64);
        add("relay_healthy", "gauge", "1 if database and bus can be used.", f64::from(u8::from(health.healthy)));
        if let Some((_, stats)) = counters.state().sample {
            let oldest = stats.oldest.unwrap_or_default().as_secs_f64();
            for (name, help, value) in [
                ("relay_pending", "Rows that are not finished.", stats.pending as f64),
                ("relay_claimed", "Rows that a relay has claimed.", stats.claimed as f64),
                ("relay_retrying", "Rows that wait for another attempt.", stats.retrying as f64),
                (
                    "relay_dead_letters",
                    "Rows that will not be tried again unless they are replayed.",
                    stats.dead as f64,
                ),
                ("relay_oldest_seconds", "Age of the oldest row that is not finished.", oldest),
            ] {
                add(name, "gauge", help, value);
            }
        }
        metrics::text(families)
    }
}
