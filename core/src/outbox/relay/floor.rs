//! Where the unfinished rows begin.
//!
//! In PostgreSQL a row that is finished stays in the index of unfinished ones until vacuum removes it, and while anybody
//! holds an old snapshot (a backup, a forgotten `BEGIN`) vacuum may not. A claim that starts at the beginning would walk
//! over everything that was relayed since: a backlog would take quadratic time. So a relay remembers a **floor**: no
//! unfinished row has a lower `seq`, and none will appear there. This is not a cursor: it is moved only by proof.
//!
//! 1. *horizon*: read the highest visible `seq`, and then which transactions have a lock on the table as inserting takes
//!    it. Whoever inserts has that lock before it draws a number and until after its commit is visible. So a row below the
//!    horizon belongs to one of them, or is visible, or never comes.
//! 2. When none of them runs any more, look for the first unfinished row below the horizon, with a new snapshot. That is
//!    the new floor; without one it is the horizon.
//!
//! A replayed row takes a new number. Whoever makes an old row pending by hand has it found by the look from the very
//! beginning that happens [now and then](SWEEP), and after each new connection.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a claim starts at the beginning.
const SWEEP: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Floor(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    connection: u64,
    value: i64,
    claims: i64,
    proof: Option<Proof>,
    swept: Option<Instant>,
}

#[derive(Debug)]
struct Proof {
    below: i64,
    running: String,
}

impl Floor {
    /// Where a claim starts.
    pub fn value(&self, connection: u64) -> i64 {
        let mut state = self.of(connection);
        if state.swept.is_none_or(|at| at.elapsed() >= SWEEP) {
            state.swept = Some(Instant::now());
            state.claims = i64::MIN;
            return i64::MIN;
        }
        if state.value == 0 { i64::MIN } else { state.value }
    }

    /// No claim that is a record has a lower number. See [`super::record`].
    pub fn oldest_claim(&self, connection: u64) -> i64 {
        self.of(connection).claims
    }

    /// This is the lowest number of a living record.
    pub fn claims_from(&self, connection: u64, oldest: i64) {
        self.of(connection).claims = oldest;
    }

    /// The transactions that a proof waits for, if one is under way.
    pub fn running(&self, connection: u64) -> Option<String> {
        self.of(connection).proof.as_ref().map(|proof| proof.running.clone())
    }

    /// Where to look for the first unfinished row.
    pub fn proving(&self, connection: u64) -> (i64, i64) {
        let state = self.of(connection);
        let from = if state.value == 0 { i64::MIN } else { state.value };
        (from, state.proof.as_ref().map_or(from, |proof| proof.below))
    }

    /// The proof is done.
    pub fn proved(&self, connection: u64, value: i64) {
        let mut state = self.of(connection);
        if state.proof.take().is_some() {
            state.value = value;
        }
    }

    /// Begins another.
    pub fn prove(&self, connection: u64, below: i64, running: String) {
        self.of(connection).proof = Some(Proof { below, running });
    }

    fn of(&self, connection: u64) -> MutexGuard<'_, State> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.connection != connection {
            *state = State { connection, claims: i64::MIN, ..State::default() };
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_by_proof_and_forgets_with_the_connection() {
        let floor = Floor::default();
        assert_eq!(floor.value(1), i64::MIN); // the sweep
        floor.prove(1, 100, "3/7".into());
        assert_eq!((floor.value(1), floor.running(1)), (i64::MIN, Some("3/7".into())));
        assert_eq!(floor.proving(1), (i64::MIN, 100));
        floor.proved(1, 60);
        assert_eq!((floor.value(1), floor.running(1)), (60, None));
        assert_eq!((floor.value(2), floor.running(2)), (i64::MIN, None));
        floor.proved(2, 60); // a proof of another connection
        floor.value(2);
        assert_eq!(floor.value(2), i64::MIN);
    }
}
