//! Where one JavaScript environment (the main thread, or a worker) meets the core.
//!
//! Threads: everything bound here runs on the environment's own thread, except the wake, which any thread may call.
//! The wake is a weak thread-safe function that carries no data: it holds neither the process nor an event. JavaScript
//! answers it with [`Bridge::take`] and reports with [`Bridge::complete`]; both move numbers through a `Float64Array`
//! that JavaScript owns, and texts in one string, because each value that crosses alone costs a microsecond.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use log::LevelFilter;
use napi::bindgen_prelude::{Float64ArraySlice, Function};
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi::{Env, JsString};
use napi_derive::napi;
use polybus_core::codec;
use polybus_core::delivery::Failure;
use polybus_core::handler::{CancelReason, Job, Outcome};
use polybus_core::host::{Cancelled, Host, HostHandler, HostJob};
use polybus_core::{Bus, Error, ErrorKind, Pattern, Subscription, logs, process};

use crate::error::{text, throw};
use crate::event::{lengths, units};
use crate::watch::Drain;

/// What an operation ends with: a JSON text, or an error.
pub type Output = Result<String, Error>;

/// How long the end of an environment waits to hand back what its handlers hold.
const LAST_WORDS: Duration = Duration::from_millis(250);

/// Numbers before the entries: how many finished, cancelled and new, whether more is waiting, whether the log is.
const HEAD: usize = 5;
/// Numbers for one job: subscription, job, attempt, redelivered, received at, the lengths of type, payload, meta, all, and
/// 0, or for a handler of batches how many more jobs of the batch there are, this one included.
const JOB: usize = 10;
/// Numbers for one cancelled job: subscription, job, reason.
const CANCELLED: usize = 3;
/// Numbers for one finished operation: key, whether it succeeded, length.
const FINISHED: usize = 3;

/// What the bound objects of one environment share.
pub struct Shared {
    pub host: Host<Output>,
    subscriptions: Mutex<HashMap<u32, Held>>,
    buses: Mutex<HashMap<u32, Bus>>,
    leftover: Mutex<Leftover>,
    /// The core has log records for us.
    logs: AtomicBool,
    /// The environment is going away.
    ended: AtomicBool,
}

struct Held {
    handler: Arc<HostHandler>,
    subscription: Option<Subscription>,
}

/// What did not fit into the numbers of one take.
#[derive(Default)]
struct Leftover {
    /// Each with its last number.
    jobs: VecDeque<(u32, Job, usize)>,
    cancelled: VecDeque<Cancelled>,
    finished: VecDeque<(u64, Output)>,
}

impl Shared {
    /// Starts an operation. Its JSON text if it is done at once; else `take` hands it out under `key`.
    pub fn start(
        &self,
        key: u32,
        operation: impl Future<Output = Output> + Send + 'static,
    ) -> napi::Result<Option<String>> {
        self.host.spawn(u64::from(key), operation).transpose().map_err(throw)
    }

    /// The handler of a new subscription.
    pub fn handler(&self, id: u32) -> Arc<HostHandler> {
        let handler = self.host.handler(id);
        lock(&self.subscriptions).insert(id, Held { handler: handler.clone(), subscription: None });
        handler
    }

    pub fn subscribed(&self, id: u32, subscription: Subscription) {
        if let Some(held) = lock(&self.subscriptions).get_mut(&id) {
            held.subscription = Some(subscription);
        }
    }

    pub fn subscription(&self, id: u32) -> Option<Subscription> {
        lock(&self.subscriptions).get(&id)?.subscription.clone()
    }

    /// Remembers a bus that is in use, to close it with the environment.
    pub fn opened(&self, id: u32, bus: &Bus) {
        lock(&self.buses).entry(id).or_insert_with(|| bus.clone());
    }

    pub fn closed(&self, id: u32) {
        let bus = lock(&self.buses).remove(&id);
        drop(bus); // outside the lock
    }

    /// Whether this environment will fetch the log.
    fn fetch_logs(&self) -> bool {
        if self.ended.load(Ordering::Relaxed) {
            return false;
        }
        if !self.logs.swap(true, Ordering::AcqRel) {
            self.host.ring();
        }
        true
    }

    /// The environment is going away: nobody will run what it was handed.
    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        let buses: Vec<_> = lock(&self.buses).drain().map(|(_, bus)| bus).collect();
        if buses.is_empty() {
            return;
        }
        let close = async move {
            for bus in buses {
                bus.close(Duration::ZERO).await;
            }
        };
        let runtime = &process::current().runtime;
        let closing = runtime.spawn(close);
        drop(runtime.block_on(async { tokio::time::timeout(LAST_WORDS, closing).await }));
    }
}

/// The bridge of one environment. One for each; all its buses share it.
#[napi]
pub struct Bridge(Arc<Shared>, Option<Rc<Drain>>);

impl Bridge {
    pub fn shared(&self) -> Arc<Shared> {
        self.0.clone()
    }

    /// For sockets that the event loop watches, where it can.
    pub fn watching(&self) -> Option<Rc<Drain>> {
        self.1.clone()
    }
}

#[napi]
impl Bridge {
    /// `wake` is called without arguments, on this thread, when there is something to take. `watches`: this runtime's
    /// event loop is libuv, and lets addons use it.
    #[napi(constructor)]
    pub fn new(env: Env, wake: Function<(), ()>, watches: bool) -> napi::Result<Self> {
        let drain = watches.then(|| Drain::new(env, &wake)).transpose()?;
        let wake = wake.build_threadsafe_function::<()>().weak::<true>().callee_handled::<false>().build()?;
        let host = Host::new(move || {
            // A closing environment refuses the call, and needs none.
            wake.call((), ThreadsafeFunctionCallMode::NonBlocking);
        });
        let shared = Arc::new(Shared {
            host,
            subscriptions: Mutex::default(),
            buses: Mutex::default(),
            leftover: Mutex::default(),
            logs: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let watching = Arc::downgrade(&shared);
        logs::watch(LevelFilter::Warn, move || watching.upgrade().is_some_and(|shared| shared.fetch_logs()));
        env.add_env_cleanup_hook(shared.clone(), |shared| shared.end())?;
        Ok(Self(shared, drain))
    }

    /// Takes what is ready: finished operations, cancelled jobs, new jobs. Counts and lengths go into `numbers`, texts
    /// are in the string, in the same order.
    #[napi]
    pub fn take<'env>(&self, env: &'env Env, mut numbers: Float64ArraySlice) -> napi::Result<JsString<'env>> {
        // SAFETY: JavaScript is suspended in this call, on this thread, and nothing else sees its array.
        let numbers = unsafe { numbers.as_mut() };
        let (head, mut room) = numbers.split_at_mut(HEAD);
        let mut left = lock(&self.0.leftover);
        let mut texts = Vec::new();
        let taken = self.0.host.take((room.len() / JOB).saturating_sub(left.jobs.len()));
        taken.jobs.into_iter().for_each(|job| left.add(job));
        left.cancelled.extend(taken.cancelled);
        left.finished.extend(taken.finished);

        texts.reserve(left.jobs.iter().map(|job| job.1.event.payload.len() + 512).sum());
        head[0] = fill(&mut left.finished, &mut room, FINISHED, |(key, output), numbers| {
            let ok = output.is_ok();
            let output = output.unwrap_or_else(|error| text(&error));
            numbers.copy_from_slice(&[key as f64, f64::from(u8::from(ok)), units(output.as_bytes()) as f64]);
            texts.extend_from_slice(output.as_bytes());
        });
        head[1] = fill(&mut left.cancelled, &mut room, CANCELLED, |cancelled, numbers| {
            let reason = match cancelled.reason {
                CancelReason::Timeout => 0.0,
                CancelReason::LeaseLost => 1.0,
                CancelReason::Closing => 2.0,
            };
            numbers.copy_from_slice(&[f64::from(cancelled.subscription), cancelled.job as f64, reason]);
        });
        head[2] = fill(&mut left.jobs, &mut room, JOB, |(subscription, job, more), numbers| {
            let layout = codec::write(&mut texts, &job.event);
            let received = job.received_at.duration_since(UNIX_EPOCH).unwrap_or_default();
            numbers[0] = f64::from(subscription);
            numbers[1] = job.id as f64;
            numbers[2] = f64::from(job.attempt);
            numbers[3] = f64::from(u8::from(job.redelivered));
            numbers[4] = received.as_secs_f64() * 1000.0;
            numbers[5..9].copy_from_slice(&lengths(&texts, &layout));
            numbers[9] = more as f64;
        });
        head[3] = f64::from(u8::from(!left.is_empty()));
        head[4] = f64::from(u8::from(self.0.logs.swap(false, Ordering::AcqRel)));
        if texts.is_ascii() {
            return env.create_string_latin1(texts);
        }
        env.create_string(String::from_utf8_lossy(&texts))
    }

    /// Reports jobs that are done: pairs of subscription and job.
    #[napi]
    pub fn complete(&self, pairs: Float64ArraySlice, count: u32) {
        let pairs: &[f64] = &pairs;
        let pairs = &pairs[..(count as usize * 2).min(pairs.len())];
        let (pairs, _) = pairs.as_chunks::<2>();
        for run in pairs.chunk_by(|a, b| a[0] == b[0]) {
            self.report(run[0][0] as u32, run.iter().map(|pair| (pair[1] as u64, Outcome::Done)));
        }
    }

    /// Reports a job that returned the reply to its request, as JSON text.
    #[napi]
    pub fn reply(&self, subscription: u32, job: f64, payload: String) {
        self.report(subscription, [(job as u64, Outcome::Replied(payload.into()))]);
    }

    /// Reports a job that failed, with the code of the error if it was one of ours. `kind`: 0 failed, 1 try again after `after_ms`, 2 rejected, 3 abandoned.
    #[napi]
    #[allow(clippy::too_many_arguments, reason = "flat arguments cross faster than an object")]
    pub fn fail(
        &self,
        subscription: u32,
        job: f64,
        kind: u32,
        after_ms: f64,
        name: String,
        message: String,
        stack: String,
        code: Option<String>,
    ) {
        let code = code.as_deref().and_then(ErrorKind::from_code);
        let failure = Failure::new(name, message, stack).coded(code);
        let outcome = match kind {
            0 => Outcome::Failed(failure),
            1 => Outcome::RetryAfter(Duration::from_secs_f64((after_ms / 1000.0).clamp(0.0, 1e9)), failure),
            2 => Outcome::Rejected(failure),
            _ => Outcome::Abandoned,
        };
        self.report(subscription, [(job as u64, outcome)]);
    }

    /// Reports a job that was only asked for the key of its event; none: the one that the event carries.
    #[napi]
    pub fn tell_key(&self, subscription: u32, job: f64, key: Option<String>) {
        self.report(subscription, [(job as u64, Outcome::Key(key.map(Into::into)))]);
    }

    fn report(&self, subscription: u32, outcomes: impl IntoIterator<Item = (u64, Outcome)>) {
        let handler = lock(&self.0.subscriptions).get(&subscription).map(|held| held.handler.clone());
        if let Some(handler) = handler {
            handler.report(outcomes);
        }
    }

    /// The log records that wait, oldest first: pairs of level and message.
    #[napi]
    pub fn take_logs(&self) -> Vec<String> {
        logs::take().into_iter().flat_map(|(level, message)| [level.as_str().to_ascii_lowercase(), message]).collect()
    }

    /// Logs `level` (`debug`, `info` or `warn`) and above.
    #[napi]
    pub fn set_log_level(&self, level: String) {
        logs::set_level(level.parse().unwrap_or(LevelFilter::Warn));
    }

    /// Checks pattern and options of a subscription that is made later.
    #[napi]
    pub fn check_subscription(&self, pattern: String, options: String) -> napi::Result<()> {
        Pattern::new(&pattern).and_then(|_| crate::options::subscribe(&options)).map(drop).map_err(throw)
    }

    /// Drops an operation whose outcome is not wanted any more.
    #[napi]
    pub fn forget(&self, key: u32) {
        self.0.host.forget(u64::from(key));
    }

    /// Takes nothing more until `resume`.
    #[napi]
    pub fn pause(&self, subscription: u32) {
        if let Some(subscription) = self.0.subscription(subscription) {
            subscription.pause();
        }
    }

    /// Takes again.
    #[napi]
    pub fn resume(&self, subscription: u32) {
        if let Some(subscription) = self.0.subscription(subscription) {
            subscription.resume();
        }
    }

    /// Stops taking, waits for running handlers, and ends the subscription.
    #[napi]
    pub fn drain(&self, key: u32, subscription: u32, timeout_ms: f64) -> napi::Result<Option<String>> {
        let held = self.0.subscription(subscription);
        self.0.start(key, async move {
            if let Some(held) = held {
                held.drain(Duration::from_secs_f64((timeout_ms / 1000.0).clamp(0.0, 1e9))).await;
            }
            Ok(String::new())
        })
    }

    /// Forgets a subscription that has ended.
    #[napi]
    pub fn ended(&self, subscription: u32) {
        let held = lock(&self.0.subscriptions).remove(&subscription);
        drop(held); // outside the lock
    }
}

impl Leftover {
    fn add(&mut self, HostJob { subscription, job, batch }: HostJob) {
        let Some(others) = batch else { return self.jobs.push_back((subscription, job, 0)) };
        let mut more = others.len() + 1;
        for job in std::iter::once(job).chain(others) {
            self.jobs.push_back((subscription, job, more));
            more -= 1;
        }
    }

    fn is_empty(&self) -> bool {
        self.jobs.is_empty() && self.cancelled.is_empty() && self.finished.is_empty()
    }
}

/// Writes as many of `queue` as fit into `room`, `width` numbers each; returns how many.
fn fill<T>(queue: &mut VecDeque<T>, room: &mut &mut [f64], width: usize, mut write: impl FnMut(T, &mut [f64])) -> f64 {
    let count = queue.len().min(room.len() / width);
    let (here, rest) = std::mem::take(room).split_at_mut(count * width);
    *room = rest;
    for (item, numbers) in queue.drain(..count).zip(here.chunks_exact_mut(width)) {
        write(item, numbers);
    }
    count as f64
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
