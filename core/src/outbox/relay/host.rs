//! An executor and a policy that live in another language.
//!
//! The core asks: questions wait in a line, the language takes them one by one ([`Desk::next`]) and answers each when it
//! can ([`Desk::answer`]). So no thread of ours calls into the language. There are never more questions than statements
//! and rows of the claims under way.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{mpsc, oneshot};

use super::policy::{Decision, Failed, FailurePolicy};
use super::store::{Answer, Executor};
use crate::error::{Error, Result};
use crate::outbox::dialect::{Dialect, Style};
use crate::outbox::statement::Statement;
use crate::retry::RetryPolicy;
use crate::transport::Task;

/// What the core wants to know.
#[derive(Debug)]
pub enum Question {
    /// Run this in a transaction of its own, and commit.
    Run(Statement),
    /// What becomes of this row?
    Decide(Failed),
    /// Nothing: whoever takes the questions may go ([`Desk::dismiss`]).
    End,
}

/// What the language says.
#[derive(Debug)]
pub enum Reply {
    /// The statement was run.
    Ran(Answer),
    /// The row has this future.
    Decided(Decision),
    /// Neither: it failed.
    Failed(Error),
}

/// Where the core asks and a language answers.
pub struct Desk {
    ask: mpsc::UnboundedSender<(u64, Question)>,
    asked: tokio::sync::Mutex<mpsc::UnboundedReceiver<(u64, Question)>>,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Reply>>>,
    count: AtomicU64,
}

impl Desk {
    /// Without questions.
    #[allow(clippy::new_without_default, reason = "it is shared from the start")]
    pub fn new() -> Arc<Self> {
        let (ask, asked) = mpsc::unbounded_channel();
        Arc::new(Self { ask, asked: asked.into(), waiting: Mutex::default(), count: AtomicU64::new(0) })
    }

    /// Waits for a question. Dropping the future loses none.
    pub async fn next(&self) -> Option<(u64, Question)> {
        self.asked.lock().await.recv().await
    }

    /// Answers it. An answer that nobody waits for any more is dropped.
    pub fn answer(&self, id: u64, reply: Reply) {
        if let Some(waiting) = self.waiting().remove(&id) {
            drop(waiting.send(reply));
        }
    }

    /// Lets whoever waits for a question end, after those that were asked.
    pub fn dismiss(&self) {
        let _ = self.ask.send((u64::MAX, Question::End));
    }

    /// An executor that asks here.
    pub fn executor(self: &Arc<Self>, dialect: Dialect, style: Style) -> Arc<dyn Executor> {
        Arc::new(HostExecutor { desk: self.clone(), dialect, style })
    }

    /// A policy that asks here; when the language's fails, `otherwise` decides.
    pub fn policy(self: &Arc<Self>, otherwise: RetryPolicy) -> Arc<dyn FailurePolicy> {
        Arc::new(HostPolicy { desk: self.clone(), otherwise })
    }

    fn ask(&self, question: Question) -> oneshot::Receiver<Reply> {
        let id = self.count.fetch_add(1, Ordering::Relaxed);
        let (reply, waiting) = oneshot::channel();
        self.waiting().insert(id, reply);
        // The receiver lives as long as we do.
        let _ = self.ask.send((id, question));
        waiting
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, oneshot::Sender<Reply>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct HostExecutor {
    desk: Arc<Desk>,
    dialect: Dialect,
    style: Style,
}

impl Executor for HostExecutor {
    fn run(&self, statement: Statement) -> Task<Result<Answer>> {
        let reply = self.desk.ask(Question::Run(statement));
        Box::pin(async move {
            match reply.await {
                Ok(Reply::Ran(answer)) => Ok(answer),
                Ok(Reply::Failed(error)) => Err(error),
                _ => Err(Error::connection_failed("the executor of the relay did not answer")),
            }
        })
    }

    fn dialect(&self) -> Dialect {
        self.dialect
    }

    fn style(&self) -> Style {
        self.style
    }
}

struct HostPolicy {
    desk: Arc<Desk>,
    otherwise: RetryPolicy,
}

impl FailurePolicy for HostPolicy {
    fn decide(&self, failed: Failed) -> Task<Decision> {
        let otherwise = self.otherwise.decide(failed.clone());
        let reply = self.desk.ask(Question::Decide(failed));
        Box::pin(async move {
            match reply.await {
                Ok(Reply::Decided(decision)) => decision,
                Ok(Reply::Failed(error)) => {
                    log::error!("the failure policy of the relay failed, and the retry policy decides: {error}");
                    otherwise.await
                }
                _ => otherwise.await,
            }
        })
    }
}
