//! The bus over the memory transport: the life of a delivery, with time under the test's control.
#![allow(clippy::unwrap_used, reason = "in a test, a panic is the report")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use polybus_core::bus::new_event;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Outcome, from_fn};
use polybus_core::options::Key;
use polybus_core::transport::Outgoing;
use polybus_core::{Bus, BusOptions, ErrorKind, Event, SubscribeOptions};

fn event(event_type: &str) -> Event {
    new_event(event_type, br#"{"n":1}"#.as_slice().into(), None, 1 << 20).unwrap()
}

fn now(event: Event) -> Vec<Outgoing> {
    vec![Outgoing { event, delay: None, expires_in: None }]
}

fn test_bus() -> Bus {
    Bus::new("memory://", BusOptions { virtual_clock: true, ..BusOptions::new("test") }).unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("the deadline passed")
}

fn fail() -> Outcome {
    Outcome::Failed(Failure::new("Oops", "no", ""))
}

#[tokio::test]
async fn a_failing_handler_is_retried_then_buried_then_replayed() {
    let bus = test_bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |_| {
        let run = counted.fetch_add(1, Ordering::SeqCst);
        async move { if run < 4 { fail() } else { Outcome::Done } }
    });
    bus.subscribe("order.*", handler, SubscribeOptions::new("mail")).await.unwrap();
    bus.publish(now(event("order.placed"))).await.unwrap();
    bus.idle().await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    bus.advance(Duration::from_secs(90)).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 4, "three retries, then no more");
    let dead = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    assert_eq!((dead.len(), dead[0].attempts, dead[0].reason.as_str()), (1, 4, "exhausted"));
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    bus.idle().await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 5);
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
}

/// Two subscriptions that fail, one every second and one every three, and a delayed event: each at its time.
#[tokio::test]
async fn time_goes_from_one_due_time_to_the_next() {
    use polybus_core::retry::{Jitter, RetryPolicy};
    let begin = std::time::SystemTime::now();
    let bus = test_bus();
    let seen = Arc::new(std::sync::Mutex::new(Vec::<(&str, u32, u64)>::new()));
    for (name, secs) in [("quick", 1), ("slow", 3)] {
        let seen = seen.clone();
        let handler = from_fn(move |job| {
            let at = job.received_at.duration_since(begin).unwrap().as_secs();
            seen.lock().unwrap().push((name, job.attempt, at));
            async move { if job.attempt < 4 { fail() } else { Outcome::Done } }
        });
        let wait = Duration::from_secs(secs);
        let retry =
            RetryPolicy { max_retries: 5, initial_delay: wait, max_delay: wait, factor: 1.0, jitter: Jitter::None };
        let options = SubscribeOptions { retry: Some(retry), ..SubscribeOptions::new(name) };
        bus.subscribe(name, handler, options).await.unwrap();
    }
    bus.publish(now(event("quick"))).await.unwrap();
    bus.idle().await.unwrap();
    bus.publish(now(event("slow"))).await.unwrap();
    bus.idle().await.unwrap();
    within(bus.advance(Duration::from_secs(8))).await.unwrap();
    let expected = [("quick", 1, 0), ("slow", 1, 0), ("quick", 2, 1), ("quick", 3, 2)];
    let (mut first, mut rest) = (seen.lock().unwrap().clone(), Vec::new());
    rest.extend(first.drain(4..));
    assert_eq!(first, expected);
    rest.sort_unstable();
    assert_eq!(rest, [("quick", 4, 3), ("slow", 2, 3), ("slow", 3, 6)]);
    within(bus.advance(Duration::from_secs(3600))).await.unwrap();
    assert_eq!(seen.lock().unwrap().last(), Some(&("slow", 4, 9)));
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
}

/// A stuck handler of one subscription holds up neither time nor the others.
#[tokio::test]
async fn time_goes_on_beside_a_handler_that_never_returns() {
    let bus = test_bus();
    bus.subscribe("n", from_fn(|_| std::future::pending()), SubscribeOptions::new("stuck")).await.unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |job| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move { if job.attempt < 3 { fail() } else { Outcome::Done } }
    });
    bus.subscribe("n", handler, SubscribeOptions::new("fails")).await.unwrap();
    bus.publish(now(event("n"))).await.unwrap();
    within(bus.advance(Duration::from_secs(3600))).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_handler_that_never_returns_is_cancelled_and_retried() {
    let bus = test_bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |job| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            if job.attempt == 1 {
                std::future::pending::<()>().await;
            }
            Outcome::Done
        }
    });
    let options = SubscribeOptions { timeout: Some(Duration::from_secs(5)), ..SubscribeOptions::new("slow") };
    let subscription = bus.subscribe("**", handler, options).await.unwrap();
    bus.publish(now(event("a"))).await.unwrap();
    while runs.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    bus.advance(Duration::from_secs(6)).await.unwrap();
    bus.idle().await.unwrap();
    bus.advance(Duration::from_secs(2)).await.unwrap();
    bus.idle().await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    assert_eq!(subscription.counters().timed_out.load(Ordering::SeqCst), 1);
    assert_eq!(subscription.counters().completed.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn closing_hands_back_without_counting_the_attempt() {
    let options = || BusOptions::new("test");
    let first = Bus::new("memory://handback", options()).unwrap();
    let started = Arc::new(tokio::sync::Notify::new());
    let ring = started.clone();
    let stuck = from_fn(move |_| {
        ring.notify_one();
        std::future::pending()
    });
    first.subscribe("a", stuck, SubscribeOptions::new("s")).await.unwrap();
    first.publish(now(event("a"))).await.unwrap();
    started.notified().await;
    let second = Bus::new("memory://handback", options()).unwrap();
    let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_fn(move |job| {
        sender.send((job.attempt, job.redelivered)).unwrap();
        async { Outcome::Done }
    });
    second.subscribe("a", handler, SubscribeOptions::new("s")).await.unwrap();
    first.close(Duration::ZERO).await;
    let seen = tokio::time::timeout(Duration::from_secs(10), received.recv()).await.unwrap();
    assert_eq!(seen, Some((1, true)));
    assert_eq!(first.publish(now(event("a"))).await.unwrap_err().kind(), ErrorKind::BusClosed);
}

#[tokio::test]
async fn a_second_subscription_of_one_name_is_refused() {
    let bus = test_bus();
    let noop = || from_fn(|_| async { Outcome::Done });
    let first = bus.subscribe("a", noop(), SubscribeOptions::new("s")).await.unwrap();
    let error = bus.subscribe("b", noop(), SubscribeOptions::new("s")).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::DuplicateSubscription);
    first.drain(Duration::from_secs(1)).await;
    bus.subscribe("b", noop(), SubscribeOptions::new("s")).await.unwrap();
}

#[tokio::test]
async fn a_paused_subscription_starts_nothing_and_goes_on_when_resumed() {
    let bus = test_bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Outcome::Done }
    });
    let subscription = bus.subscribe("**", handler, SubscribeOptions::new("s")).await.unwrap();
    bus.publish(now(event("a"))).await.unwrap();
    bus.idle().await.unwrap();
    for run in 2..50 {
        subscription.pause();
        bus.publish(now(event("a"))).await.unwrap();
        // The take that was under way may bring it; it is handed back.
        while bus.group_stats("test/s").await.unwrap().lag == 0 {
            tokio::task::yield_now().await;
        }
        within(bus.idle()).await.unwrap(); // it has nothing to do
        assert_eq!(runs.load(Ordering::SeqCst), run - 1);
        subscription.resume();
        within(bus.idle()).await.unwrap(); // and from now on it has
        assert_eq!(runs.load(Ordering::SeqCst), run);
        assert_eq!(subscription.counters().completed.load(Ordering::SeqCst), u64::from(run));
    }
}

#[tokio::test]
async fn an_open_breaker_waits_for_the_clock() {
    use polybus_core::BreakerOptions;
    use polybus_core::breaker::Phase;
    let bus = test_bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |_| {
        let run = counted.fetch_add(1, Ordering::SeqCst);
        async move { if run < 2 { fail() } else { Outcome::Done } }
    });
    let breaker = Some(BreakerOptions { threshold: 2, recovery: Duration::from_secs(300), ..Default::default() });
    let options = SubscribeOptions { breaker, concurrency: Some(1), ..SubscribeOptions::new("s") };
    let subscription = bus.subscribe("n", handler, options).await.unwrap();
    for _ in 0..5 {
        bus.publish(now(event("n"))).await.unwrap();
    }
    bus.idle().await.unwrap(); // not for ever, although three are ready
    assert_eq!((runs.load(Ordering::SeqCst), subscription.breaker()), (2, Some(Phase::Open)));
    bus.advance(Duration::from_secs(299)).await.unwrap();
    bus.idle().await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    bus.advance(Duration::from_secs(1)).await.unwrap();
    bus.idle().await.unwrap();
    assert_eq!((runs.load(Ordering::SeqCst), subscription.breaker()), (7, Some(Phase::Closed)));
    let text = polybus_core::metrics::render(&bus);
    assert!(
        text.contains(
            "polybus_breaker_openings_total{service=\"test\",bus=\"default\",subscription=\"s\",group=\"test/s\"} 1\n"
        ),
        "{text}"
    );
}

#[tokio::test]
async fn a_batch_that_is_not_full_waits_for_the_clock() {
    use polybus_core::BatchOptions;
    use polybus_core::handler::{Job, from_batch_fn};
    let bus = test_bus();
    let (sizes, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_batch_fn(move |jobs: Vec<Job>| {
        sizes.send(jobs.len()).unwrap();
        async move { jobs.iter().map(|job| (job.id, Outcome::Done)).collect() }
    });
    let batch = Some(BatchOptions { size: 3, wait: Duration::from_secs(5) });
    bus.subscribe("n", handler, SubscribeOptions { batch, ..SubscribeOptions::new("s") }).await.unwrap();
    for _ in 0..4 {
        bus.publish(now(event("n"))).await.unwrap();
    }
    bus.idle().await.unwrap();
    assert_eq!(seen.try_recv().ok(), Some(3));
    assert_eq!(seen.try_recv().ok(), None);
    bus.advance(Duration::from_secs(5)).await.unwrap();
    bus.idle().await.unwrap();
    assert_eq!(seen.try_recv().ok(), Some(1));
}

#[tokio::test]
async fn a_full_store_is_waited_for_until_the_timeout() {
    let options = BusOptions {
        publish_buffer_bytes: Some(1024),
        publish_timeout: Duration::from_millis(20),
        ..BusOptions::new("test")
    };
    let bus = Bus::new("memory://", options).unwrap();
    let handler = from_fn(|_| async { Outcome::Done });
    let subscription = bus.subscribe("n", handler, SubscribeOptions::new("s")).await.unwrap();
    subscription.pause();
    let big = || new_event("n", format!("\"{}\"", "x".repeat(2000)).into(), None, 1 << 20).unwrap();
    bus.publish(now(big())).await.unwrap();
    let error = bus.publish(now(big())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BufferFull);
    subscription.resume();
    while bus.publish(now(big())).await.is_err() {}
}

fn with_key(key: &str) -> Event {
    let meta = format!(r#"{{"idempotencyKey":{key:?}}}"#);
    new_event("paid", b"1".as_slice().into(), Some(meta.as_bytes()), 1 << 20).unwrap()
}

#[tokio::test]
async fn a_handled_key_is_forgotten_after_its_retention_and_not_before() {
    let options = BusOptions { idempotency_window: Some(Duration::ZERO), ..BusOptions::new("test") };
    let bus = Bus::new("memory://", BusOptions { virtual_clock: true, ..options }).unwrap();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Outcome::Done }
    });
    let options = SubscribeOptions {
        idempotent: Some(Key::Event),
        idempotent_retention: Some(Duration::from_secs(60)),
        ..SubscribeOptions::new("s")
    };
    let subscription = bus.subscribe("paid", handler, options).await.unwrap();
    for (wait, expected) in [(0, 1), (59, 1), (1, 2), (59, 2)] {
        bus.advance(Duration::from_secs(wait)).await.unwrap();
        bus.publish(now(with_key("k"))).await.unwrap();
        bus.idle().await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), expected, "{wait} s later");
    }
    assert_eq!(subscription.counters().duplicates.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_published_key_is_forgotten_after_an_hour_and_not_before() {
    let bus = test_bus();
    for (wait, duplicate) in [(0, false), (3599, true), (1, false), (3599, true)] {
        bus.advance(Duration::from_secs(wait)).await.unwrap();
        let receipts = bus.publish(now(with_key("k"))).await.unwrap();
        assert_eq!(receipts[0].duplicate, duplicate, "{wait} s later");
    }
    assert_eq!(bus.published("paid").unwrap().len(), 2);
}

/// What the test kit publishes twice comes twice, whatever its key: the handler is to be tested, not the publisher.
#[tokio::test]
async fn an_injected_duplicate_is_absorbed_by_the_subscription() {
    let bus = test_bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
        async { Outcome::Done }
    });
    let options = SubscribeOptions { idempotent: Some(Key::Event), ..SubscribeOptions::new("s") };
    let subscription = bus.subscribe("*", handler, options).await.unwrap();
    for (number, event) in [event("paid"), with_key("k")].into_iter().enumerate() {
        bus.duplicate_next("paid", 1).unwrap();
        assert_eq!(bus.publish(now(event)).await.unwrap().len(), 1);
        bus.idle().await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), number as u32 + 1);
        // Without moving time: who waits for the key goes on when it is free.
        assert_eq!(subscription.counters().duplicates.load(Ordering::SeqCst), number as u64 + 1);
    }
    let text = polybus_core::metrics::render(&bus);
    for status in ["completed", "duplicate"] {
        let line = text.lines().find(|line| {
            line.starts_with("polybus_events_processed_total{") && line.contains(&format!("status=\"{status}\""))
        });
        assert!(line.is_some_and(|line| line.ends_with("} 2")), "{status}: {text}");
    }
}
