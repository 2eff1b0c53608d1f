//! Work for the writer thread.
//!
//! A job runs inside a transaction that it shares with others (group commit). It may run twice: when one job of a
//! transaction fails, all is rolled back and each runs again alone, so that one's failure is not the others'. Its
//! answer goes out only after the commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::error::Result;

/// What a job's look at the store found, before any lock is taken.
pub(super) enum Probe {
    /// It has something to write.
    Write,
    /// It is done, without a transaction.
    Done,
}

/// One piece of work.
pub(super) trait Job: Send {
    /// Reads, outside any transaction.
    fn probe(&mut self, _connection: &Connection) -> Result<Probe> {
        Ok(Probe::Write)
    }

    /// Whether it shall run. Asked right before it runs; from then on the caller cannot cancel it.
    fn start(&mut self) -> bool {
        true
    }

    /// Reads and writes, inside a transaction.
    fn run(&mut self, tx: &Connection) -> Result<()>;

    /// Answers the caller: the transaction was committed, or all of it failed. Returns whether there is now work for
    /// somebody else.
    fn finish(self: Box<Self>, outcome: Result<()>) -> bool;

    /// Rows and bytes that it is about to write, to keep transactions short.
    fn size(&self) -> (usize, usize);
}

/// Lets a caller withdraw a job that has not started.
#[derive(Clone, Default)]
pub(super) struct Ticket(Arc<AtomicU8>);

const WAITING: u8 = 0;
const STARTED: u8 = 1;
const CANCELLED: u8 = 2;

impl Ticket {
    fn turn(&self, to: u8) -> bool {
        self.0.compare_exchange(WAITING, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Whether the job will never run.
    pub(super) fn cancel(&self) -> bool {
        self.turn(CANCELLED)
    }

    /// Whether the job may run; true again for one that runs a second time.
    fn start(&self) -> bool {
        self.turn(STARTED) || self.0.load(Ordering::Acquire) == STARTED
    }
}

/// What a [`Write`] made, and whether others should look.
pub(super) struct Made<T> {
    pub value: T,
    pub ring: bool,
}

impl<T> Made<T> {
    /// Of interest to the caller only.
    pub(super) fn quiet(value: T) -> Self {
        Self { value, ring: false }
    }

    /// Work for others.
    pub(super) fn ring(value: T) -> Self {
        Self { value, ring: true }
    }
}

/// A job made of one function, which must not mind running twice.
pub(super) struct Write<T, F> {
    work: F,
    made: Option<Made<T>>,
    reply: oneshot::Sender<Result<T>>,
    ticket: Option<Ticket>,
    size: (usize, usize),
}

impl<T, F> Write<T, F>
where
    T: Send,
    F: FnMut(&Connection) -> Result<Made<T>> + Send,
{
    /// The job, and where its answer will be.
    pub(super) fn new(
        size: (usize, usize),
        ticket: Option<Ticket>,
        work: F,
    ) -> (Box<Self>, oneshot::Receiver<Result<T>>) {
        let (reply, answer) = oneshot::channel();
        (Box::new(Self { work, made: None, reply, ticket, size }), answer)
    }
}

impl<T, F> Job for Write<T, F>
where
    T: Send,
    F: FnMut(&Connection) -> Result<Made<T>> + Send,
{
    fn start(&mut self) -> bool {
        self.ticket.as_ref().is_none_or(Ticket::start)
    }

    fn run(&mut self, tx: &Connection) -> Result<()> {
        self.made = None;
        self.made = Some((self.work)(tx)?);
        Ok(())
    }

    fn finish(self: Box<Self>, outcome: Result<()>) -> bool {
        let (answer, ring) = match (outcome, self.made) {
            (Ok(()), Some(made)) => (Ok(made.value), made.ring),
            (Ok(()), None) => (Err(super::fault::timed_out()), false), // cancelled; nobody listens
            (Err(cause), _) => (Err(cause), false),
        };
        // Nobody may be waiting any more: the future was dropped.
        let _ = self.reply.send(answer);
        ring
    }

    fn size(&self) -> (usize, usize) {
        self.size
    }
}
