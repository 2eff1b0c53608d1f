//! The responder's side: a handler around the user's, which posts what that one said before the delivery is settled.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use ahash::AHashMap;
use bytes::Bytes;
use serde_json::json;

use super::{Address, Counts, REPLY_FOR, REPLY_STATUS};
use crate::clock::Clock;
use crate::codec;
use crate::delivery::Failure;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Text};
use crate::handler::{CancelReason, Handler, Job, Outcome, Reporter};
use crate::process;
use crate::retry::RetryPolicy;
use crate::transport::Transport;

/// A reply is kept for so much longer than somebody waits for it: a requester that reads it too late counts it.
const KEPT: Duration = Duration::from_secs(5);
/// Before a post is repeated that failed.
const AGAIN: Duration = Duration::from_millis(50);

pub(crate) struct Responder {
    inner: Arc<dyn Handler>,
    /// Where the user's handler reports to.
    heard: Reporter,
    shared: Arc<Shared>,
    listening: OnceLock<tokio::task::AbortHandle>,
}

/// What answering needs.
pub(crate) struct Facts {
    pub transport: Arc<dyn Transport>,
    pub service: Text,
    pub clock: Clock,
    pub retry: RetryPolicy,
    /// Largest payload.
    pub limit: usize,
    /// How long a handler may run, for the message when it ran longer.
    pub timeout: Option<Duration>,
    pub counts: Arc<Counts>,
}

struct Shared {
    facts: Facts,
    asked: Mutex<AHashMap<u64, Asked>>,
}

/// A request that is being handled.
struct Asked {
    event: Event,
    address: Address,
    attempt: u32,
    /// When this process got it: no clock of another machine is asked.
    since: Duration,
}

impl Responder {
    pub fn new(inner: Arc<dyn Handler>, facts: Facts) -> Self {
        let shared = Arc::new(Shared { facts, asked: Mutex::default() });
        Self { inner, heard: Reporter::default(), shared, listening: OnceLock::new() }
    }
}

impl Handler for Responder {
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter) {
        self.listening.get_or_init(|| {
            let (shared, heard, reporter) = (self.shared.clone(), self.heard.clone(), reporter.clone());
            process::current().runtime.spawn(listen(shared, heard, reporter)).abort_handle()
        });
        let since = self.shared.facts.clock.elapsed();
        let asked = jobs.iter().filter_map(|job| {
            // What was published under the type of a request is handled, and nobody waits for an answer.
            let address = Address::of(&job.event)?;
            Some((job.id, Asked { event: job.event.clone(), address, attempt: job.attempt, since }))
        });
        self.shared.asked().extend(asked);
        self.inner.start(jobs, &self.heard);
    }

    fn cancel(&self, jobs: &[u64], reason: CancelReason) {
        for job in jobs {
            // Lost, or handed back at the end: somebody else answers.
            let Some(asked) = self.shared.asked().remove(job) else { continue };
            if reason == CancelReason::Timeout && self.shared.is_final(&asked) {
                let limit = self.shared.facts.timeout.unwrap_or_default();
                let failure = Failure::new("HandlerTimeout", format!("the handler ran longer than {limit:?}"), "");
                let said = Err(failure.coded(Some(ErrorKind::HandlerTimeout)));
                process::current().runtime.spawn(self.shared.clone().answer(asked, said));
            }
        }
        self.inner.cancel(jobs, reason);
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(listening) = self.listening.get() {
            listening.abort();
        }
    }
}

/// Takes what the handler says, answers, and passes it on. Answers do not wait for each other.
async fn listen(shared: Arc<Shared>, heard: Reporter, reporter: Reporter) {
    loop {
        for (job, outcome) in heard.next().await {
            let asked = shared.asked().remove(&job);
            let answer = asked.and_then(|asked| Some((shared.said(&asked, &outcome)?, asked)));
            let Some((said, asked)) = answer else {
                reporter.report([(job, outcome)]);
                continue;
            };
            let (shared, reporter) = (shared.clone(), reporter.clone());
            process::current().runtime.spawn(async move {
                shared.answer(asked, said).await;
                reporter.report([(job, outcome)]);
            });
        }
    }
}

impl Shared {
    fn asked(&self) -> MutexGuard<'_, AHashMap<u64, Asked>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a failure of this attempt is the last word.
    fn is_final(&self, asked: &Asked) -> bool {
        self.facts.retry.delay(asked.attempt, 0.0).is_none()
    }

    /// What to tell the requester; `None` when there will be another attempt.
    fn said(&self, asked: &Asked, outcome: &Outcome) -> Option<Result<Bytes, Failure>> {
        match outcome {
            Outcome::Done => Some(Ok(Bytes::from_static(b"null"))),
            Outcome::Replied(payload) => Some(Ok(payload.clone())),
            Outcome::Rejected(failure) => Some(Err(failure.clone())),
            Outcome::Failed(failure) | Outcome::RetryAfter(_, failure) => {
                self.is_final(asked).then(|| Err(failure.clone()))
            }
            Outcome::Abandoned | Outcome::Key(_) => None,
        }
    }

    /// Posts the answer while somebody waits for it.
    async fn answer(self: Arc<Self>, asked: Asked, said: Result<Bytes, Failure>) {
        let Address { mailbox, within, .. } = &asked.address;
        let letter = match self.letter(&asked, said) {
            Ok(letter) => letter,
            Err(error) => return log::warn!("no reply to {}: {error}", asked.event.event_type),
        };
        loop {
            let spent = self.facts.clock.elapsed().saturating_sub(asked.since);
            let Some(left) = within.checked_sub(spent).filter(|left| !left.is_zero()) else {
                Counts::count(&self.facts.counts.late);
                return log::debug!("the reply to {} is too late", asked.event.event_type);
            };
            match self.facts.transport.post(mailbox.clone(), letter.clone(), left + KEPT).await {
                Ok(()) => return Counts::count(&self.facts.counts.replies),
                // A second copy, should the first have arrived, is dropped by the requester.
                Err(error) if error.is_retryable() => {
                    log::debug!("the reply to {} was not posted, again soon: {error}", asked.event.event_type);
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return log::warn!("no reply to {}: {error}", asked.event.event_type),
            }
        }
    }

    fn letter(&self, asked: &Asked, said: Result<Bytes, Failure>) -> Result<Bytes> {
        let fits = |payload: Bytes| match codec::check_payload(&payload, self.facts.limit) {
            Ok(()) => Ok(payload.slice_ref(payload.trim_ascii())),
            Err(error) => Err(failure_of(&error)),
        };
        let (status, payload) = match said.and_then(fits) {
            Ok(payload) => ("ok", payload),
            Err(failure) => ("error", told(&failure)),
        };
        let mut meta = asked.event.child_meta(SystemTime::now());
        meta.source = Some(self.facts.service.clone());
        meta.instance_id = Some(process::current().instance_id.clone());
        meta.headers = vec![(REPLY_FOR.into(), asked.address.token.clone()), (REPLY_STATUS.into(), status.into())];
        Ok(codec::encode(&Event::new(asked.event.event_type.clone(), payload, meta))?.into())
    }
}

/// The handler returned what is no payload.
fn failure_of(error: &Error) -> Failure {
    Failure::new(error.kind().class_name(), error.message(), "").coded(Some(error.kind()))
}

/// Class, message and code; the stack stays here.
fn told(failure: &Failure) -> Bytes {
    let code = failure.code.map(ErrorKind::code);
    json!({"type": failure.kind, "message": failure.message, "code": code}).to_string().into()
}
