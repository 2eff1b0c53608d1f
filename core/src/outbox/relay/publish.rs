//! From claimed rows to a bus, in order: which were taken, which failed, and which wait for others.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::policy::{Decision, Failed, FailurePolicy, is_outage};
use super::store::{Row, Verdict};
use crate::bus::Bus;
use crate::codec;
use crate::error::{Error, Result};
use crate::transport::{Outgoing, Task};

/// Bytes of events in one publish, unless one alone is larger.
const CHUNK: usize = 4 << 20;
/// Characters of an error that are kept in the table.
const MAX_ERROR: usize = 500;

/// Where events go.
pub trait Publisher: Send + Sync + 'static {
    /// Stores the events in order, whole or not at all. An error that lists failures says which of them can not be
    /// stored.
    fn publish(&self, batch: Vec<Outgoing>) -> Task<Result<()>>;

    /// Largest payload that it takes, in bytes.
    fn limit(&self) -> usize;

    /// `InvalidConfig` if an event that it took may be lost by intention.
    fn check(&self) -> Result<()> {
        Ok(())
    }
}

impl Publisher for Bus {
    fn publish(&self, batch: Vec<Outgoing>) -> Task<Result<()>> {
        let bus = self.clone();
        Box::pin(async move { Bus::publish(&bus, batch).await.map(drop) })
    }

    fn limit(&self) -> usize {
        self.options().max_payload_bytes
    }

    fn check(&self) -> Result<()> {
        match self.options().fail_open {
            true => Err(Error::invalid_config(
                "this bus drops what it cannot publish (fail_open), and rows of the outbox would be lost; give the relay a bus of its own without it",
            )),
            false => Ok(()),
        }
    }
}

/// What became of the rows of one claim: each is in one of three lists.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub token: String,
    pub attempted: u64,
    /// Until then the rows are surely ours.
    pub leased_until: Option<Instant>,
    pub delivered: Vec<i64>,
    pub failed: Vec<Verdict>,
    pub back: Vec<i64>,
    pub malformed: u64,
    pub dead: u64,
    /// How many the bus did not take: those that failed, and all that were given to it when it was away.
    pub refused: u64,
    /// Why nothing more was tried.
    pub outage: Option<Error>,
}

struct Ready {
    row: Row,
    size: usize,
    outgoing: Outgoing,
    /// With others it was refused, and the error does not say who is to blame.
    alone: bool,
}

/// Publishes the rows in order.
pub(super) async fn publish(rows: Vec<Row>, bus: &dyn Publisher, policy: &dyn FailurePolicy) -> Published {
    let mut done = Published::default();
    let mut ready = VecDeque::with_capacity(rows.len());
    for row in rows {
        match codec::decode(&row.event, bus.limit()) {
            Ok(event) => {
                let (size, outgoing) = (row.event.len(), Outgoing { event, delay: None, expires_in: None });
                ready.push_back(Ready { row, size, outgoing, alone: false });
            }
            // No attempt will make an event of it.
            Err(error) => {
                done.malformed += 1;
                done.dead += 1;
                done.failed.push(verdict(&row, None, &error));
            }
        }
    }
    // Keys that wait for a retry, and which row of theirs does: what comes after it waits, too.
    let mut held = HashMap::new();
    loop {
        let mut chunk = next_chunk(&mut ready, &held, &mut done.back);
        if chunk.is_empty() {
            return done;
        }
        let batch = chunk.iter().map(|ready| ready.outgoing.clone()).collect();
        let Err(error) = bus.publish(batch).await else {
            done.delivered.extend(chunk.iter().map(|ready| ready.row.seq));
            continue;
        };
        let mut blamed: Vec<(usize, Error)> = match error.failures() {
            [] if is_outage(&error) => {
                done.refused += chunk.len() as u64;
                done.back.extend(chunk.iter().chain(&ready).map(|ready| ready.row.seq));
                done.outage = Some(error);
                return done;
            }
            [] if chunk.len() == 1 => vec![(0, error)],
            [] => Vec::new(),
            listed => listed.to_vec(),
        };
        if blamed.is_empty() {
            chunk.iter_mut().for_each(|ready| ready.alone = true);
        }
        blamed.sort_by_key(|(index, _)| *index);
        let mut chunk: Vec<_> = chunk.into_iter().map(Some).collect();
        for (index, error) in blamed {
            let Some(Ready { row, outgoing, .. }) = chunk.get_mut(index).and_then(Option::take) else { continue };
            done.refused += 1;
            if waits(&held, &row) {
                done.back.push(row.seq);
                continue;
            }
            let decision = policy.decide(Failed {
                event_id: outgoing.event.meta.id.to_string(),
                event_type: outgoing.event.event_type.to_string(),
                attempts: row.attempts.saturating_add(1),
                error: error.clone(),
            });
            let retry = match decision.await {
                Decision::Retry(after) => Some(after),
                Decision::DeadLetter => None,
            };
            match (retry, &row.key) {
                (Some(_), Some(key)) => drop(held.insert(key.clone(), row.seq)),
                (Some(_), None) => {}
                (None, _) => done.dead += 1,
            }
            done.failed.push(verdict(&row, retry, &error));
        }
        // The others go again, in front.
        chunk.into_iter().flatten().rev().for_each(|other| ready.push_front(other));
    }
}

/// Whether a row stands behind one of its key that waits for a retry.
fn waits(held: &HashMap<String, i64>, row: &Row) -> bool {
    let first = row.key.as_ref().and_then(|key| held.get(key));
    first.is_some_and(|first| *first < row.seq)
}

/// Takes what goes in the next publish from the front; what has to wait goes `back`.
fn next_chunk(ready: &mut VecDeque<Ready>, held: &HashMap<String, i64>, back: &mut Vec<i64>) -> Vec<Ready> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while let Some(next) = ready.pop_front() {
        if waits(held, &next.row) {
            back.push(next.row.seq);
            continue;
        }
        if !chunk.is_empty() && (next.alone || bytes + next.size > CHUNK) {
            ready.push_front(next);
            break;
        }
        bytes += next.size;
        let alone = next.alone;
        chunk.push(next);
        if alone {
            break;
        }
    }
    chunk
}

fn verdict(row: &Row, retry: Option<Duration>, error: &Error) -> Verdict {
    let text = format!("{}: {}", error.kind().code(), error.message());
    // PostgreSQL's text holds no NUL.
    let error = text.chars().filter(|c| *c != '\0').take(MAX_ERROR).collect();
    Verdict { seq: row.seq, retry, error }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::bus::new_event;
    use crate::retry::{Jitter, RetryPolicy};

    /// Takes what its list does not name, and says which those are, or that it is away, or only that something is wrong.
    struct Picky {
        bad: &'static [i64],
        how: &'static str,
        took: Mutex<Vec<i64>>,
    }

    impl Publisher for Picky {
        fn publish(&self, batch: Vec<Outgoing>) -> Task<Result<()>> {
            let numbers = batch.iter().map(|o| std::str::from_utf8(&o.event.payload).unwrap().parse().unwrap());
            let numbers: Vec<i64> = numbers.collect();
            let bad = numbers.iter().enumerate().filter(|(_, n)| self.bad.contains(n));
            let bad: Vec<_> = bad.map(|(i, _)| (i, Error::connection_failed("no"))).collect();
            let result = match (bad.is_empty(), self.how) {
                (true, _) => {
                    self.took.lock().unwrap().extend(numbers);
                    Ok(())
                }
                (_, "lists") => Err(Error::connection_failed("some").listing(bad)),
                (_, "away") => Err(Error::connection_failed("away")),
                (_, _) => Err(Error::invalid_event("something")),
            };
            Box::pin(std::future::ready(result))
        }

        fn limit(&self) -> usize {
            100
        }
    }

    fn row(seq: i64, key: &str) -> Row {
        let event = new_event("a.b", seq.to_string().into(), None, 100).unwrap();
        let event = codec::encode(&event).unwrap().into();
        Row { seq, attempts: 0, key: (!key.is_empty()).then(|| key.to_owned()), event }
    }

    async fn publish_rows(how: &'static str, bad: &'static [i64], retries: u32) -> (Published, Vec<i64>) {
        let bus = Picky { bad, how, took: Mutex::default() };
        let policy = RetryPolicy { max_retries: retries, jitter: Jitter::None, ..RetryPolicy::default() };
        let mut rows: Vec<_> =
            [(1, "a"), (2, "b"), (3, "a"), (4, ""), (5, "a"), (6, "b")].map(|(s, k)| row(s, k)).into();
        rows.push(Row { event: "no event".into(), ..row(7, "b") });
        rows.push(row(8, "b"));
        let done = publish(rows, &bus, &policy).await;
        (done, bus.took.into_inner().unwrap())
    }

    fn failed(done: &Published) -> Vec<(i64, bool)> {
        done.failed.iter().map(|verdict| (verdict.seq, verdict.retry.is_some())).collect()
    }

    #[tokio::test]
    async fn a_failing_row_holds_back_its_key_only() {
        let (done, took) = publish_rows("lists", &[3], 1).await;
        assert_eq!((took, &done.delivered), (vec![1, 2, 4, 6, 8], &vec![1, 2, 4, 6, 8]));
        assert_eq!((failed(&done), &done.back), (vec![(7, false), (3, true)], &vec![5]));
        assert_eq!((done.malformed, done.dead, done.refused), (1, 1, 1));
    }

    #[tokio::test]
    async fn the_key_of_a_dead_row_goes_on() {
        let (done, took) = publish_rows("lists", &[3, 5], 0).await;
        assert_eq!((took, failed(&done)), (vec![1, 2, 4, 6, 8], vec![(7, false), (3, false), (5, false)]));
        assert_eq!((done.dead, done.back.len()), (3, 0));
    }

    #[tokio::test]
    async fn who_is_to_blame_is_found_one_by_one() {
        let (done, took) = publish_rows("hides", &[2, 5], 9).await;
        // That error is one that no retry mends.
        assert_eq!((took, failed(&done)), (vec![1, 3, 4, 6, 8], vec![(7, false), (2, false), (5, false)]));
    }

    #[tokio::test]
    async fn when_the_bus_is_away_nothing_counts() {
        let (done, took) = publish_rows("away", &[4], 1).await;
        assert_eq!((took, &done.back), (vec![], &vec![1, 2, 3, 4, 5, 6, 8]));
        assert_eq!((failed(&done), done.refused), (vec![(7, false)], 7));
        assert!(done.outage.is_some());
    }
}
