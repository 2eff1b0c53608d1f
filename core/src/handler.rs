//! What runs user code: takes a batch of jobs, reports an outcome for each, in any order, from any thread.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::delivery::{Delivery, Failure};
use crate::event::{Event, Text};

/// One delivery, ready to run.
#[derive(Debug, Clone)]
pub struct Job {
    /// Names the job within its subscription; give it back with the outcome.
    pub id: u64,
    /// The event.
    pub event: Event,
    /// From 1; 0 asks for the event's key ([`Outcome::Key`]) and for nothing else, in a subscription that tells events by
    /// [`Key::Handler`](crate::options::Key::Handler). The job itself follows under another id.
    pub attempt: u32,
    /// Whether somebody took this delivery before.
    pub redelivered: bool,
    /// When this process took it.
    pub received_at: SystemTime,
}

impl Job {
    /// The job of a delivery that carries `event`.
    pub fn new(id: u64, event: Event, delivery: &Delivery) -> Self {
        let Delivery { attempt, redelivered, received_at, .. } = *delivery;
        Self { id, event, attempt, redelivered, received_at }
    }

    /// Whether only the event's key is wanted.
    pub fn asks_for_key(&self) -> bool {
        self.attempt == 0
    }
}

/// What a handler said.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// It returned.
    Done,
    /// It returned this payload, JSON text, for whoever made the request; without a request the same as `Done`.
    Replied(Bytes),
    /// It failed; the policy decides.
    Failed(Failure),
    /// It asked for another attempt after this long.
    RetryAfter(Duration, Failure),
    /// It refused the event.
    Rejected(Failure),
    /// It was stopped before it ended, or never started; the attempt does not count.
    Abandoned,
    /// It was asked for the event's key; `None`, or an empty one: the key that the event carries, else its id.
    Key(Option<Text>),
}

/// Why a running job is asked to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelReason {
    /// It ran longer than its timeout; the dispatcher has already decided what becomes of it.
    Timeout,
    /// Another process has the delivery now.
    LeaseLost,
    /// The subscription is closing and its deadline passed.
    Closing,
}

/// Runs jobs. Methods must return at once: they are called from the dispatcher's task.
pub trait Handler: Send + Sync + 'static {
    /// Starts the jobs. Each must be reported once through `reporter`, also after [`Handler::cancel`].
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter);

    /// Starts one call for all of these; each is reported as if it were alone. Called instead of [`Handler::start`] for a
    /// subscription with [`batch`](crate::options::SubscribeOptions::batch).
    fn start_batch(&self, batch: Vec<Job>, reporter: &Reporter) {
        self.start(batch, reporter);
    }

    /// Asks running jobs to stop. Their later reports are ignored. One job of a batch stands for all of it.
    fn cancel(&self, jobs: &[u64], reason: CancelReason);
}

/// Where outcomes go. Cheap to clone; reports after the subscription ended are ignored.
#[derive(Clone, Default)]
pub struct Reporter(Arc<Reports>);

#[derive(Default)]
struct Reports {
    outcomes: Mutex<Vec<(u64, Outcome)>>,
    arrived: Notify,
}

impl Reporter {
    /// Reports outcomes; one call for many is cheapest.
    pub fn report(&self, outcomes: impl IntoIterator<Item = (u64, Outcome)>) {
        self.0.outcomes.lock().unwrap_or_else(PoisonError::into_inner).extend(outcomes);
        self.0.arrived.notify_one();
    }

    /// Waits until something was reported, then takes it all. Dropping the future loses nothing.
    pub(crate) async fn next(&self) -> Vec<(u64, Outcome)> {
        loop {
            let outcomes = std::mem::take(&mut *self.0.outcomes.lock().unwrap_or_else(PoisonError::into_inner));
            if !outcomes.is_empty() {
                return outcomes;
            }
            self.0.arrived.notified().await;
        }
    }
}

/// A handler made of an async function: one tokio task for each job, aborted when it is cancelled; a panic is a
/// failure. For services in Rust, and for tests.
pub fn from_fn<F, R>(run: F) -> Arc<dyn Handler>
where
    F: Fn(Job) -> R + Send + Sync + 'static,
    R: Future<Output = Outcome> + Send + 'static,
{
    Arc::new(FnHandler { run: Arc::new(run), running: Arc::default() })
}

type KeyFunction = Box<dyn Fn(&Event) -> Option<Text> + Send + Sync>;

/// `handler`, with a function that tells the key of an event, for [`Key::Handler`](crate::options::Key::Handler).
pub fn keyed(
    handler: Arc<dyn Handler>,
    key: impl Fn(&Event) -> Option<Text> + Send + Sync + 'static,
) -> Arc<dyn Handler> {
    Arc::new(KeyedHandler { handler, key: Box::new(key) })
}

struct KeyedHandler {
    handler: Arc<dyn Handler>,
    key: KeyFunction,
}

impl Handler for KeyedHandler {
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter) {
        let (asked, jobs): (Vec<_>, Vec<_>) = jobs.into_iter().partition(Job::asks_for_key);
        if !asked.is_empty() {
            reporter.report(asked.into_iter().map(|job| (job.id, Outcome::Key((self.key)(&job.event)))));
        }
        if !jobs.is_empty() {
            self.handler.start(jobs, reporter);
        }
    }

    fn cancel(&self, jobs: &[u64], reason: CancelReason) {
        self.handler.cancel(jobs, reason);
    }
}

struct FnHandler<F> {
    run: Arc<F>,
    running: Arc<Mutex<ahash::AHashMap<u64, tokio::task::AbortHandle>>>,
}

impl<F, R> Handler for FnHandler<F>
where
    F: Fn(Job) -> R + Send + Sync + 'static,
    R: Future<Output = Outcome> + Send + 'static,
{
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter) {
        for job in jobs {
            let (run, reporter, running, id) = (self.run.clone(), reporter.clone(), self.running.clone(), job.id);
            // Held until the task is known, so that it cannot end before it is there to be removed.
            let mut known = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let task = tokio::spawn(async move {
                let outcome = tokio::spawn(async move { run(job).await });
                let _stop = AbortOnDrop(outcome.abort_handle());
                let outcome =
                    outcome.await.unwrap_or_else(|cause| Outcome::Failed(Failure::new("Panic", cause.to_string(), "")));
                running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                reporter.report([(id, outcome)]);
            });
            known.insert(id, task.abort_handle());
        }
    }

    fn cancel(&self, jobs: &[u64], _: CancelReason) {
        let mut known = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.iter().filter_map(|job| known.remove(job)).for_each(|task| task.abort());
    }
}

/// As [`from_fn`] for batches: `run` is given all jobs of one and says what came of each.
pub fn from_batch_fn<F, R>(run: F) -> Arc<dyn Handler>
where
    F: Fn(Vec<Job>) -> R + Send + Sync + 'static,
    R: Future<Output = Vec<(u64, Outcome)>> + Send + 'static,
{
    Arc::new(BatchFnHandler { run: Arc::new(run), running: Arc::default() })
}

/// Batches that run: their jobs, and what stops them.
type Running = Arc<Mutex<Vec<(Vec<u64>, tokio::task::AbortHandle)>>>;

struct BatchFnHandler<F> {
    run: Arc<F>,
    running: Running,
}

impl<F, R> Handler for BatchFnHandler<F>
where
    F: Fn(Vec<Job>) -> R + Send + Sync + 'static,
    R: Future<Output = Vec<(u64, Outcome)>> + Send + 'static,
{
    fn start(&self, jobs: Vec<Job>, reporter: &Reporter) {
        jobs.into_iter().for_each(|job| self.start_batch(vec![job], reporter));
    }

    fn start_batch(&self, batch: Vec<Job>, reporter: &Reporter) {
        let (run, reporter, running) = (self.run.clone(), reporter.clone(), self.running.clone());
        let jobs: Vec<u64> = batch.iter().map(|job| job.id).collect();
        let ours = jobs.clone();
        let mut known = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let task = tokio::spawn(async move {
            let outcomes = tokio::spawn(async move { run(batch).await });
            let _stop = AbortOnDrop(outcomes.abort_handle());
            let outcomes = outcomes.await.unwrap_or_else(|cause| {
                let failure = Failure::new("Panic", cause.to_string(), "");
                ours.iter().map(|job| (*job, Outcome::Failed(failure.clone()))).collect()
            });
            running.lock().unwrap_or_else(PoisonError::into_inner).retain(|(jobs, _)| *jobs != ours);
            reporter.report(outcomes);
        });
        known.push((jobs, task.abort_handle()));
    }

    fn cancel(&self, jobs: &[u64], _: CancelReason) {
        let mut known = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(batch, task)| {
            let stop = batch.iter().any(|job| jobs.contains(job));
            if stop {
                task.abort();
            }
            !stop
        });
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
