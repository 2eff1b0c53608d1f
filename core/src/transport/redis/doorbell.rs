//! The one connection of a partition that waits.
//!
//! ```text
//! one write:  XREAD BLOCK … STREAMS events bell <from> <bell>     waits for any entry after <from>
//!             XREADGROUP … first waiting group                    executed the moment the first command returns
//!             XREADGROUP … second waiting group
//! ```
//! The server holds the commands behind a blocked one back and runs them when it returns, so a new event reaches its
//! group after one round trip, however many groups wait, and a waiting group costs no connection. The blocking read
//! itself only wakes.
//!
//! A group that begins to wait while the doorbell is armed joins the next turn, which begins where that group stopped
//! reading, so it misses nothing. Should the armed position lie behind that, [`Doorbell::wait`] refuses: it has to read
//! again first, because what woke the doorbell's last turn would not wake this one.
//!
//! `bell` is a stream with one entry, renewed by whatever is not a new event but must wake: given back deliveries,
//! replays, a changed group. A read that times out lets the groups look too, so nothing waits longer than [`BLOCK`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redis::{Cmd, Pipeline, Value};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::fault::{self, Failure};
use super::link::Link;
use super::partition::{Partition, lock};
use super::value::{self, Id};

/// Longest wait of one read.
const BLOCK: Duration = Duration::from_secs(1);
/// How late its answer may be before the connection counts as dead.
const MARGIN: Duration = Duration::from_secs(3);
/// Longest pause after rings that brought nothing because other processes were faster.
const LONGEST_PAUSE: Duration = Duration::from_millis(16);

/// Who waits for events.
pub(super) trait Waiter: Send + Sync {
    /// The read that is to follow the doorbell, which may be under way from now on; `None` when it does not wait any more.
    fn command(&self) -> Option<Cmd>;
    /// Whether it still waits.
    fn waits(&self) -> bool;
    /// Everything at or before this was read.
    fn position(&self) -> Id;
    /// The answer to its command, and the newest entry that the doorbell saw. Whether it got something.
    fn answer(&self, answer: Result<Value, Failure>, seen: Option<Id>) -> bool;
    /// Its read is not under way any more.
    fn disarmed(&self);
}

pub(super) struct Doorbell {
    link: Link,
    state: Mutex<State>,
    wanted: Notify,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    waiters: Vec<Arc<dyn Waiter>>,
    /// Where the blocked read began.
    armed: Option<Id>,
    bell: Id,
}

impl Doorbell {
    pub fn new(link: Link) -> Self {
        Self { link, state: Mutex::default(), wanted: Notify::new(), closed: AtomicBool::new(false) }
    }

    /// Lets `waiter` wait. False when the doorbell already stands after its position: read again first.
    pub fn wait(&self, waiter: &Arc<dyn Waiter>) -> bool {
        let mut state = lock(&self.state);
        if state.armed.is_some_and(|from| from > waiter.position()) {
            return false;
        }
        if !state.waiters.iter().any(|other| Arc::ptr_eq(other, waiter)) {
            state.waiters.push(waiter.clone());
        }
        self.wanted.notify_one();
        true
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        lock(&self.state).waiters.clear();
        self.link.cut();
        self.wanted.notify_one();
    }

    /// Waits, for whoever wants it, until the partition is closed.
    pub async fn run(partition: Arc<Partition>) {
        let bell = &partition.doorbell;
        let mut missed = 0_u32;
        while !bell.closed.load(Ordering::Acquire) {
            let waiters = std::mem::take(&mut lock(&bell.state).waiters);
            let waiting: Vec<_> = waiters.into_iter().filter_map(|waiter| Some((waiter.command()?, waiter))).collect();
            if waiting.is_empty() {
                bell.wanted.notified().await;
                // Those that were rung together begin to wait together.
                tokio::task::yield_now().await;
                continue;
            }
            if missed > 0 {
                // Others of the group are faster: leave it to them for a moment instead of racing for each event.
                tokio::time::sleep(LONGEST_PAUSE.min(Duration::from_millis(1 << missed.min(10)))).await;
            }
            missed = match bell.turn(&partition, waiting).await {
                Turn::Found | Turn::Quiet => 0,
                Turn::Missed => missed.saturating_add(1),
            };
        }
    }

    async fn turn(&self, partition: &Partition, waiting: Vec<(Cmd, Arc<dyn Waiter>)>) -> Turn {
        let from = waiting.iter().map(|(_, waiter)| waiter.position()).min().unwrap_or_default();
        let mut commands = Pipeline::new();
        {
            let mut state = lock(&self.state);
            state.armed = Some(from);
            let keys = &partition.keys;
            commands.cmd("XREAD").arg("COUNT").arg(1).arg("BLOCK").arg(BLOCK.as_millis() as u64).arg("STREAMS");
            commands.arg(&keys.events).arg(&keys.bell).arg(from.to_string()).arg(state.bell.to_string());
        }
        let (reads, waiters): (Vec<_>, Vec<_>) = waiting.into_iter().unzip();
        for read in reads {
            commands.add_command(read);
        }
        commands.ignore_errors();
        let answers = self.link.run_all(&commands, Instant::now() + BLOCK + MARGIN).await;
        let turn = self.hand_out(partition, &waiters, answers);
        waiters.iter().for_each(|waiter| waiter.disarmed());
        let mut state = lock(&self.state);
        for waiter in waiters {
            if waiter.waits() && !state.waiters.iter().any(|other| Arc::ptr_eq(other, &waiter)) {
                state.waiters.push(waiter);
            }
        }
        turn
    }

    fn hand_out(
        &self,
        partition: &Partition,
        waiters: &[Arc<dyn Waiter>],
        answers: Result<Vec<Value>, Failure>,
    ) -> Turn {
        let mut answers = match answers {
            Ok(answers) => answers.into_iter(),
            Err(failure) => {
                lock(&self.state).armed = None;
                for waiter in waiters {
                    let copy = Failure { error: failure.error.clone(), unknown: true, ..fault::closed().into() };
                    waiter.answer(Err(copy), None);
                }
                return Turn::Quiet;
            }
        };
        let rung = answers.next().map_or(Ok(Value::Nil), fault::check).and_then(|value| Ok(value::streams(value)?));
        let rung = rung.unwrap_or_else(|failure| {
            log::debug!("the blocking read on {} failed: {}", partition.keys.events, failure.error);
            Vec::new()
        });
        let (mut seen, mut belled) = (None, false);
        {
            let mut state = lock(&self.state);
            state.armed = None;
            for (stream, entries) in &rung {
                let Some(last) = entries.last() else { continue };
                if *stream == partition.keys.bell {
                    (state.bell, belled) = (last.id, true);
                } else {
                    seen = Some(last.id);
                }
            }
        }
        let mut found = false;
        for waiter in waiters {
            found |= waiter.answer(answers.next().map_or(Ok(Value::Nil), fault::check), seen);
        }
        if belled {
            partition.ring();
        }
        match (found, seen) {
            (true, _) => Turn::Found,
            (false, Some(_)) => Turn::Missed,
            (false, None) => Turn::Quiet,
        }
    }
}

/// What came of one wait.
enum Turn {
    Found,
    /// There was an event, and nobody here got it.
    Missed,
    Quiet,
}
