//! The ground on which a transport is tested: a namespace of its own for each test, and handlers that tell what they
//! saw. Everything waits on signals, with a deadline.
#![allow(clippy::unwrap_used, reason = "a test that cannot set the stage must fail")]
#![allow(missing_docs, reason = "test support")]

pub mod certificates;
pub mod maria_server;
pub mod pgbouncer;
pub mod postgres_server;
pub mod proxy;
pub mod redis_server;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use polybus_core::bus::new_event;
use polybus_core::clock::Clock;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Job, Outcome, from_fn};
use polybus_core::retry::{Jitter, RetryPolicy};
use polybus_core::transport::{
    Confirm, Durability, GroupSpec, Outgoing, Receipt, Settings, Start, Transport, WhenFull, connect,
};
use polybus_core::{Bus, BusOptions, Event, Pattern, Result, SubscribeOptions, Subscription};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::redis_server::{RedisServer, with_shared};

/// Nothing here takes this long; a test that waits longer has failed.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// The transports under test, by the scheme of their URL; in a file, because Python and TypeScript read it too.
pub fn transports() -> Vec<String> {
    serde_json::from_str(include_str!("../../transports.json")).unwrap()
}

/// A place in a store that no other test uses. What is on disk is removed afterwards.
pub struct World {
    pub url: String,
    name: String,
    directory: PathBuf,
}

impl World {
    pub fn new(transport: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let name =
            format!("polybus-{}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst), since.subsec_nanos());
        let directory = std::env::temp_dir().join(&name);
        std::fs::create_dir(&directory).unwrap();
        let url = match transport {
            "memory" => format!("memory://{name}"),
            "sqlite" => format!("sqlite:///{}/bus.db", directory.display()),
            "redis" => with_shared(RedisServer::url),
            "redis+pubsub" => with_shared(RedisServer::pubsub_url),
            other => panic!("no such transport: {other}"),
        };
        Self { url, name, directory }
    }

    pub fn bus(&self) -> Bus {
        self.bus_with(BusOptions::new("test"))
    }

    /// A bare hold on the store of [`World::bus`], without heartbeats: for what a process does that dies.
    pub async fn transport(&self) -> Arc<dyn Transport> {
        let settings = Settings {
            publish_buffer_bytes: None,
            when_full: WhenFull::default(),
            idempotency_window: None,
            bus: format!("{}-default", self.name).into(),
            durability: Durability::Off,
            retention: None,
            max_age: None,
            max_events: None,
            max_bytes: None,
            confirm: Confirm::default(),
            partitions: None,
            max_payload_bytes: 1 << 20,
            clock: Clock::default(),
            allow_network_fs: false,
        };
        connect(&self.url, settings).await.unwrap()
    }

    /// A member of the group that [`Bus::subscribe`] would join under that name, with the shortest lease.
    pub fn spec(&self, pattern: &str, name: &str, ordered: bool) -> GroupSpec {
        GroupSpec {
            group: format!("test/{name}").into(),
            subscription: name.into(),
            service: "test".into(),
            pattern: Pattern::new(pattern).unwrap(),
            start: Start::Beginning,
            broadcast: false,
            ordered,
            responder: false,
            keep_expired: false,
            lease: Duration::from_secs(1),
        }
    }

    /// The name of its bus is unique to this world, because several share a server.
    pub fn bus_with(&self, options: BusOptions) -> Bus {
        let bus = format!("{}-{}", self.name, options.bus);
        let options = BusOptions { bus, retry: quick(3), ..options };
        Bus::new(&self.url, options).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.directory)); // left over in the temporary directory at worst
    }
}

/// Retries without waiting.
pub fn quick(max_retries: u32) -> RetryPolicy {
    let wait = Duration::from_millis(5);
    RetryPolicy { max_retries, initial_delay: wait, max_delay: wait, factor: 1.0, jitter: Jitter::None }
}

pub fn event(event_type: &str, payload: &str) -> Event {
    new_event(event_type, payload.as_bytes().to_vec().into(), None, 1 << 20).unwrap()
}

pub fn outgoing(event: Event) -> Outgoing {
    Outgoing { event, delay: None, expires_in: None }
}

pub async fn publish(bus: &Bus, event_type: &str, payload: &str) -> Receipt {
    bus.publish(vec![outgoing(event(event_type, payload))]).await.unwrap().remove(0)
}

/// Publishes `count` events of that type whose payloads are their numbers.
pub async fn publish_numbers(bus: &Bus, event_type: &str, count: usize) {
    for number in 0..count {
        publish(bus, event_type, &number.to_string()).await;
    }
}

/// What a handler was given, in order.
pub struct Seen(UnboundedReceiver<Job>);

impl Seen {
    pub async fn next(&mut self) -> Job {
        within(self.0.recv()).await.unwrap()
    }

    pub async fn take(&mut self, count: usize) -> Vec<Job> {
        let mut jobs = Vec::new();
        while jobs.len() < count {
            jobs.push(self.next().await);
        }
        jobs
    }

    /// Waits until each of the numbers below `count` was seen, however often.
    pub async fn all_numbers(&mut self, count: usize) {
        let mut missing: std::collections::HashSet<String> = (0..count).map(|number| number.to_string()).collect();
        while !missing.is_empty() {
            missing.remove(&payload(&self.next().await));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

pub fn payload(job: &Job) -> String {
    String::from_utf8(job.event.payload.to_vec()).unwrap()
}

/// Subscribes a handler that tells what it saw and then says what `say` answers.
pub async fn subscribe(
    bus: &Bus,
    pattern: &str,
    options: SubscribeOptions,
    say: impl Fn(&Job) -> Outcome + Send + Sync + 'static,
) -> (Subscription, Seen) {
    attend(bus, pattern, options, move |job| std::future::ready(say(job))).await
}

/// As [`subscribe`], with a handler that takes its time.
pub async fn attend<R: Future<Output = Outcome> + Send + 'static>(
    bus: &Bus,
    pattern: &str,
    options: SubscribeOptions,
    run: impl Fn(&Job) -> R + Send + Sync + 'static,
) -> (Subscription, Seen) {
    let (sender, receiver) = unbounded_channel();
    let handler = from_fn(move |job: Job| {
        let outcome = run(&job);
        drop(sender.send(job)); // nobody listens any more: fine
        outcome
    });
    (bus.subscribe(pattern, handler, options).await.unwrap(), Seen(receiver))
}

/// As [`subscribe`], always content, with [`options_for`] this transport.
pub async fn listen(bus: &Bus, pattern: &str, name: &str) -> (Subscription, Seen) {
    subscribe(bus, pattern, options_for(bus, name).await, |_| Outcome::Done).await
}

/// A group where the transport has them, and a broadcast where it has not: for behaviours that hold for both.
pub async fn options_for(bus: &Bus, name: &str) -> SubscribeOptions {
    let broadcast = !bus.capabilities().await.unwrap().ack;
    SubscribeOptions { broadcast, ..SubscribeOptions::new(name) }
}

pub fn failed() -> Outcome {
    Outcome::Failed(Failure::new("Trouble", "as the test wants", "at test"))
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("the deadline passed")
}

/// Asks again until `probe` says yes: for what a store tells only when asked.
pub async fn eventually<P: Future<Output = Result<bool>>>(what: &str, probe: impl Fn() -> P) {
    let asked = async {
        while !probe().await.unwrap() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, asked).await.is_ok(), "never happened: {what}");
}

/// Waits until a group has nothing unfinished.
pub async fn finished(bus: &Bus, group: &str) {
    eventually("the group finished", || async {
        let stats = bus.group_stats(group).await?;
        Ok(stats.lag + stats.in_flight + stats.retrying == 0)
    })
    .await;
}
