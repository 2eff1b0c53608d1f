//! The table as the relay sees it: claim rows, end the claims, look after what is dead.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::floor::Floor;
use super::sql::{Wanted, Writer};
use crate::error::{Error, ErrorKind, Result};
use crate::outbox::dialect::{Dialect, Style};
use crate::outbox::statement::{Param, Statement};
use crate::outbox::table::{RELAY_RIGHTS, Table};
use crate::transport::Task;

/// What runs the relay's statements: a connection of our own, or the application's driver.
///
/// Every statement is a transaction of its own. Statements that are given one after the other, without waiting for
/// answers, run in that order.
pub trait Executor: Send + Sync + 'static {
    /// Runs a statement and answers with its rows. `ConnectionFailed` when the database cannot be reached or ended the
    /// connection: the next call tries to connect again.
    fn run(&self, statement: Statement) -> Task<Result<Answer>>;

    /// Runs two statements in one transaction, the second with a snapshot younger than the first. They reach the database
    /// together: it never waits for us between them. `None`: it can run only one at a time.
    fn run_both(&self, _: Statement, _: Statement) -> Option<Task<Result<[Answer; 2]>>> {
        None
    }

    /// Which database it is.
    fn dialect(&self) -> Dialect;

    /// How it writes placeholders.
    fn style(&self) -> Style;

    /// Another number with each connection. What was proven about the table on one may not hold on the next: a server
    /// that took over after a failure can have lost the newest rows, and their numbers come again.
    fn connection(&self) -> u64 {
        0
    }
}

/// What a statement gave.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Rows that were changed.
    pub affected: u64,
    /// Rows that were returned.
    pub rows: Vec<Vec<Param>>,
}

/// A claimed row.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub seq: i64,
    /// Failed attempts so far.
    pub attempts: u32,
    pub key: Option<String>,
    pub event: Bytes,
}

/// What becomes of a row that was not published.
#[derive(Debug, Clone)]
pub(super) struct Verdict {
    pub seq: i64,
    /// After so long; `None`: it is dead.
    pub retry: Option<Duration>,
    pub error: String,
}

/// Rows that are ours, in order.
#[derive(Debug, Default)]
pub(super) struct Claim {
    pub token: String,
    pub rows: Vec<Row>,
    /// Nothing was taken although there is something: another relay was faster, or a larger window is needed.
    pub again: bool,
}

/// How many rows of each state, counted on the live table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RelayStats {
    /// Not finished, whatever they wait for.
    pub pending: u64,
    /// Of those, claimed by a relay.
    pub claimed: u64,
    /// Of those, waiting for another attempt.
    pub retrying: u64,
    /// Dead letters.
    pub dead: u64,
    /// Age of the oldest that is not finished.
    pub oldest: Option<Duration>,
}

/// A row that will not be published unless somebody replays it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadRow {
    /// Place in the table; pages of [`super::Relay::dead_letters`] continue after it.
    pub seq: i64,
    /// Id of the event.
    pub event_id: String,
    /// Type of the event, as the row says it.
    pub event_type: String,
    /// What the row holds: an event's wire form, if all is well.
    pub event: String,
    /// Lane.
    pub partition_key: Option<String>,
    /// Failed attempts.
    pub attempts: u32,
    /// Why it failed, the last time: code and message.
    pub last_error: String,
    /// Milliseconds since 1970, by the database's clock: when the row was written.
    pub created_at_ms: i64,
    /// When it died.
    pub dead_at_ms: i64,
}

/// A window of more than so many batches is wide.
const WIDE: i64 = 4;

/// How many rows a window has more than what was taken of the last one.
fn slack(batch: i64) -> i64 {
    (batch / 4).max(64)
}

/// What a claim saw of its window.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Rows in it.
    count: i64,
    /// Of those, to be claimed.
    picked: i64,
    /// How many rows deep the last of these was.
    depth: i64,
}

/// See the head of the file.
pub(super) struct Store {
    executor: Arc<dyn Executor>,
    writer: Writer,
    floor: Floor,
    window: AtomicI64,
}

impl Store {
    pub fn new(executor: Arc<dyn Executor>, table: Table, floor: Floor) -> Self {
        let writer = Writer { table, dialect: executor.dialect(), style: executor.style() };
        Self { executor, writer, floor, window: AtomicI64::new(0) }
    }

    async fn run(&self, statement: Statement) -> Result<Answer> {
        self.executor.run(statement).await
    }

    /// Fails if the table is missing, of another version or not readable, or if the user may not relay from it.
    pub async fn check(&self) -> Result<()> {
        let Writer { table, dialect, style } = &self.writer;
        self.run(table.outbox_check(*dialect, *style)).await?;
        if *dialect != Dialect::Postgres {
            return Ok(());
        }
        let answer = self.run(self.writer.lacking()).await?;
        match answer.rows.first().map(Vec::as_slice) {
            Some([Param::Text(lacking), Param::Text(user)]) => Err(Error::new(
                ErrorKind::AuthFailed,
                format!(
                    "the database user {user} lacks {lacking} on the table {}; run: {}",
                    table.full(),
                    table.grant(*dialect, RELAY_RIGHTS, Some(user))
                ),
            )),
            _ => Ok(()),
        }
    }

    /// The same, and in MySQL a claim of nothing: fails if the user may not write, or the server is too old.
    pub async fn rehearse(&self) -> Result<()> {
        self.check().await?;
        if self.writer.dialect == Dialect::MySql {
            let wanted = Wanted { floor: 0, window: 1, batch: 1, lease_ms: 0, token: "" };
            self.run(self.writer.take(wanted, &[0], "1970-01-01")).await?;
        }
        Ok(())
    }

    /// Claims up to `batch` rows for `lease`.
    pub async fn claim(&self, batch: usize, lease: Duration) -> Result<Claim> {
        let token = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let batch = batch as i64;
        let window = self.window.load(Ordering::Relaxed).max(batch + slack(batch));
        let floor = self.floor.value(self.executor.connection());
        let wanted = Wanted { floor, window, batch, lease_ms: millis(lease), token: &token };
        match self.writer.dialect {
            Dialect::Postgres => self.claim_by_record(wanted).await,
            Dialect::MySql => self.claim_in_steps(wanted).await,
            Dialect::Sqlite => self.claim_at_once(wanted).await,
        }
    }

    async fn claim_at_once(&self, wanted: Wanted<'_>) -> Result<Claim> {
        let answer = self.run(self.writer.claim(wanted)).await?;
        let mut rows = answer.rows.into_iter().map(claimed).collect::<Result<Vec<_>>>()?;
        rows.sort_unstable_by_key(|row| row.seq);
        let picked = rows.len() as i64;
        let (count, depth) = match picked == wanted.batch {
            true => (wanted.window, wanted.window),
            false => (number(&self.run(self.writer.open(wanted.floor, wanted.window)).await?, 0)?, picked),
        };
        let again = self.seen(wanted, Seen { count, picked, depth });
        Ok(Claim { token: wanted.token.to_owned(), again: again && rows.is_empty(), rows })
    }

    /// See [`super::record`].
    async fn claim_by_record(&self, wanted: Wanted<'_>) -> Result<Claim> {
        let oldest = self.floor.oldest_claim(self.executor.connection());
        // In a wide window the database should not handle events that it will not pick.
        let narrow = wanted.window <= wanted.batch.saturating_mul(WIDE);
        let both = || self.executor.run_both(self.writer.turn(oldest), self.writer.claim_in_turn(wanted, oldest));
        let (turn, seen, mut rows) = match narrow.then(both).flatten() {
            Some(both) => self.in_turn(both).await?,
            None => self.recorded(wanted, oldest).await?,
        };
        let token = wanted.token.to_owned();
        if number(&turn, 0)? == 0 {
            return Ok(Claim { token, again: true, rows: Vec::new() });
        }
        let again = self.seen(wanted, seen) || number(&turn, 1)? > 0;
        rows.sort_unstable_by_key(|row| integer(row.first()).unwrap_or(i64::MAX));
        let rows = ready(rows)?;
        if rows.is_empty() && seen.picked > 0 {
            self.run(self.writer.end(&token, &[], &[])).await?;
        }
        Ok(Claim { token, again: again && rows.is_empty(), rows })
    }

    /// The answers of one transaction: whose turn it was, what was seen, and rows as [`ready`] reads them.
    async fn in_turn(&self, both: Task<Result<[Answer; 2]>>) -> Result<(Answer, Seen, Vec<Vec<Param>>)> {
        let [turn, claimed] = both.await?;
        let (mut seen, mut rows) = (Seen { count: 0, picked: 0, depth: 0 }, Vec::new());
        for mut row in claimed.rows {
            let (lowest, depth) = (row.pop(), row.pop());
            let Some(Param::Integer(depth)) = depth else {
                rows.push(row);
                continue;
            };
            seen = Seen { count: integer(row.first())?, picked: integer(row.get(1))?, depth };
            if let Some(Param::Integer(lowest)) = lowest {
                self.floor.claims_from(self.executor.connection(), lowest);
            }
        }
        Ok((turn, seen, rows))
    }

    /// The same in two steps, for executors that run one statement at a time.
    async fn recorded(&self, wanted: Wanted<'_>, oldest: i64) -> Result<(Answer, Seen, Vec<Vec<Param>>)> {
        let turn = self.run(self.writer.record(wanted, oldest)).await?;
        let column = |column| number(&turn, column);
        let seen = Seen { count: column(2)?, picked: column(3)?, depth: column(4)? };
        let mut rows = Vec::new();
        if seen.picked > 0 {
            rows = self.run(self.writer.held(wanted.token, oldest)).await?.rows;
        }
        for row in &mut rows {
            self.floor.claims_from(self.executor.connection(), integer(row.pop().as_ref())?);
        }
        Ok((turn, seen, rows))
    }

    /// Adapts the window to what was seen in it. Whether an empty claim is no reason to wait.
    fn seen(&self, wanted: Wanted<'_>, seen: Seen) -> bool {
        // What stands in front and cannot be taken must not hide what can: look further, as far as it takes.
        let hidden = seen.picked < wanted.batch && seen.count >= wanted.window;
        let next = if hidden { wanted.window.saturating_mul(4) } else { seen.depth + slack(wanted.batch) };
        self.window.store(next, Ordering::Relaxed);
        hidden || seen.picked > 0
    }

    /// See [`super::mysql_claim`].
    async fn claim_in_steps(&self, wanted: Wanted<'_>) -> Result<Claim> {
        let (mut rows, mut time) = (Vec::new(), String::new());
        let mut seen = Seen { count: 0, picked: 0, depth: 0 };
        for mut row in self.run(self.writer.pick(wanted)).await?.rows {
            for at in [0, 1, 4, 5] {
                row.get_mut(at).map(as_integer);
            }
            let Ok([seq, attempts, key, event, depth, count, now]) = <[Param; 7]>::try_from(row) else {
                return Err(strange());
            };
            let (Param::Integer(depth), Param::Integer(count), Param::Text(now)) = (depth, count, now) else {
                return Err(strange());
            };
            seen.count = count;
            if event == Param::Null || seen.picked == wanted.batch {
                continue;
            }
            rows.push(claimed(vec![seq, attempts, key, event])?);
            (seen.picked, seen.depth, time) = (rows.len() as i64, depth, now);
        }
        let again = self.seen(wanted, seen);
        let token = wanted.token.to_owned();
        if rows.is_empty() {
            return Ok(Claim { token, again, rows });
        }
        let seqs: Vec<_> = rows.iter().map(|row: &Row| row.seq).collect();
        let taken = self.run(self.writer.take(wanted, &seqs, &time)).await?.affected;
        if taken < seqs.len() as u64 {
            let ours = self.run(self.writer.taken(&token, &seqs)).await?;
            let ours = ours.rows.iter().map(|row| integer(row.first())).collect::<Result<HashSet<_>>>()?;
            let mut missed = HashSet::new();
            let mut behind = Vec::new();
            rows.retain(|row| {
                let lane = row.key.as_ref();
                if !ours.contains(&row.seq) {
                    missed.extend(lane.cloned());
                    return false;
                }
                let waits = lane.is_some_and(|key| missed.contains(key));
                if waits {
                    behind.push(row.seq);
                }
                !waits
            });
            if !behind.is_empty() {
                self.give_back(&token, &behind).await?;
            }
        }
        Ok(Claim { token, again: again && rows.is_empty(), rows })
    }

    /// Whether claims are records, and so cheap enough to make the next one while this one is published.
    pub fn claims_are_records(&self) -> bool {
        self.writer.dialect == Dialect::Postgres
    }

    /// Moves the lower end of what claims look at. Called now and then.
    pub async fn advance(&self) -> Result<()> {
        if self.writer.dialect != Dialect::Postgres {
            return Ok(()); // elsewhere it takes no floor, or there is no proof: docs/decisions/0021
        }
        let connection = self.executor.connection();
        if let Some(running) = self.floor.running(connection) {
            if !running.is_empty() && number(&self.run(self.writer.running(&running)).await?, 0)? > 0 {
                return Ok(());
            }
            // A statement of its own: its snapshot must be younger than the end of those transactions.
            let (from, below) = self.floor.proving(connection);
            let first = number(&self.run(self.writer.first(from, below)).await?, 0)?;
            self.floor.proved(connection, first);
        }
        let answer = self.run(self.writer.horizon()).await?;
        let below = number(&answer, 0)?;
        let running = match answer.rows.first().and_then(|row| row.get(1)) {
            Some(Param::Text(list)) => list.clone(),
            _ => String::new(),
        };
        self.floor.prove(connection, below, running);
        Ok(())
    }

    /// Says that rows were delivered. Resolves to how many of them were still ours.
    pub async fn delivered(&self, token: &str, seqs: &[i64], again: bool) -> Result<u64> {
        Ok(self.run(self.writer.delivered(token, seqs, again)).await?.affected)
    }

    /// Says that one row failed, likewise.
    pub async fn failed(&self, token: &str, verdict: &Verdict) -> Result<u64> {
        Ok(self.run(self.writer.failed(token, verdict)).await?.affected)
    }

    /// Ends a claim that is a record: these rows were delivered, these failed, the others go back. Resolves to how many of
    /// the first were still ours, or `None` if the claim was not. `again`: a first try got no answer, and may have worked.
    pub async fn end(&self, token: &str, delivered: &[i64], failed: &[Verdict], again: bool) -> Result<Option<u64>> {
        let answer = self.run(self.writer.end(token, delivered, failed)).await?;
        if number(&answer, 0)? > 0 {
            return Ok(Some(number(&answer, 1)?.unsigned_abs()));
        }
        if !again {
            return Ok(None);
        }
        let marked = number(&self.run(self.writer.marked(delivered)).await?, 0)?.unsigned_abs();
        Ok((marked > 0).then_some(marked))
    }

    /// Gives rows back, all of a claim if it is a record. Resolves to how many of them were still ours.
    pub async fn give_back(&self, token: &str, seqs: &[i64]) -> Result<u64> {
        if self.claims_are_records() {
            return Ok(self.end(token, &[], &[], false).await?.map_or(0, |_| seqs.len() as u64));
        }
        Ok(self.run(self.writer.give_back(token, seqs)).await?.affected)
    }

    /// Holds a claim for another lease.
    pub async fn extend(&self, token: &str, seqs: &[i64], lease: Duration) -> Result<()> {
        let lease = millis(lease);
        let records = self.claims_are_records();
        self.run(if records { self.writer.renew(token, lease) } else { self.writer.extend(token, seqs, lease) })
            .await?;
        Ok(())
    }

    pub async fn stats(&self) -> Result<RelayStats> {
        let answer = self.run(self.writer.stats()).await?;
        let count = |column| number(&answer, column).map(|n| u64::try_from(n).unwrap_or(0));
        let pending = count(0)?;
        let oldest = (pending > 0).then(|| count(4).map(Duration::from_millis)).transpose()?;
        Ok(RelayStats { pending, claimed: count(1)?, retrying: count(2)?, dead: count(3)?, oldest })
    }

    pub async fn dead(&self, after: i64, limit: usize) -> Result<Vec<DeadRow>> {
        let answer = self.run(self.writer.dead(after, limit as i64)).await?;
        answer.rows.into_iter().map(dead_row).collect()
    }

    pub async fn replay(&self, event_id: Option<&str>, limit: usize) -> Result<u64> {
        Ok(self.run(self.writer.replay(event_id, limit as i64)).await?.affected)
    }

    pub async fn purge_dead(&self, event_id: Option<&str>, limit: usize) -> Result<u64> {
        Ok(self.run(self.writer.purge_dead(event_id, limit as i64)).await?.affected)
    }

    /// Removes what was delivered longer ago, a page of the table at a time; no statement holds many rows.
    pub async fn purge(&self, older_than: Duration, page: usize) -> Result<u64> {
        let (mut after, mut removed) = (i64::MIN, 0);
        let older = millis(older_than);
        loop {
            let answer = self.run(self.writer.page(after, page as i64, older)).await?;
            let (last, count, old) = (number(&answer, 0)?, number(&answer, 1)?, number(&answer, 2)?);
            if old == 0 {
                return Ok(removed); // what follows is younger, give or take a transaction: it is for next time
            }
            removed += self.run(self.writer.purge(after, last, older)).await?.affected;
            if count < page as i64 {
                return Ok(removed);
            }
            after = last;
        }
    }
}

/// Rows that have an event, without those that stand behind one of their key that has none.
fn ready(rows: Vec<Vec<Param>>) -> Result<Vec<Row>> {
    let (mut ready, mut missed) = (Vec::with_capacity(rows.len()), HashSet::new());
    for mut row in rows {
        if let Some(Param::Null) = row.get(3) {
            missed.extend(row.swap_remove(2).text());
            continue;
        }
        let row = claimed(row)?;
        if row.key.as_ref().is_none_or(|key| !missed.contains(key)) {
            ready.push(row);
        }
    }
    Ok(ready)
}

fn claimed(mut row: Vec<Param>) -> Result<Row> {
    row.iter_mut().take(2).for_each(as_integer);
    let Ok([Param::Integer(seq), Param::Integer(attempts), key, Param::Text(event)]) = <[Param; 4]>::try_from(row)
    else {
        return Err(strange());
    };
    Ok(Row { seq, attempts: u32::try_from(attempts).unwrap_or(0), key: key.text(), event: Bytes::from(event) })
}

fn dead_row(row: Vec<Param>) -> Result<DeadRow> {
    let mut row = row.into_iter();
    let text = |row: &mut std::vec::IntoIter<Param>| match row.next() {
        Some(Param::Text(text)) => Some(text),
        _ => None,
    };
    let number = |row: &mut std::vec::IntoIter<Param>| match row.next() {
        Some(Param::Integer(number)) => Some(number),
        Some(Param::Text(text)) => text.parse().ok(),
        _ => None,
    };
    Ok(DeadRow {
        seq: number(&mut row).ok_or_else(strange)?,
        event_id: text(&mut row).unwrap_or_default(),
        event_type: text(&mut row).unwrap_or_default(),
        event: text(&mut row).unwrap_or_default(),
        partition_key: text(&mut row),
        attempts: number(&mut row).and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        last_error: text(&mut row).unwrap_or_default(),
        created_at_ms: number(&mut row).unwrap_or(0),
        dead_at_ms: number(&mut row).unwrap_or(0),
    })
}

fn number(answer: &Answer, column: usize) -> Result<i64> {
    integer(answer.rows.first().and_then(|row| row.get(column)))
}

fn integer(cell: Option<&Param>) -> Result<i64> {
    match cell {
        Some(Param::Integer(number)) => Ok(*number),
        Some(Param::Text(text)) => text.parse().map_err(|_| strange()),
        Some(Param::Null) => Ok(0),
        None => Err(strange()),
    }
}

/// Where a driver hands out large integers as text, as node-postgres does.
fn as_integer(param: &mut Param) {
    if let Param::Text(text) = param
        && let Ok(number) = text.parse()
    {
        *param = Param::Integer(number);
    }
}

fn strange() -> Error {
    Error::invalid_config(
        "the database answered a statement of the relay with other columns than it asked for; an executor gives rows as the driver does: integers, text and null",
    )
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}
