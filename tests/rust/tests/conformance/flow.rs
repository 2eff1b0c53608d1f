//! What holds events back: a breaker, a queue that is full.
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::breaker::Phase;
use polybus_core::delivery::Failure;
use polybus_core::handler::Outcome;
use polybus_core::transport::WhenFull;
use polybus_core::{BreakerOptions, BusOptions, ErrorKind, SubscribeOptions, Subscription};

crate::behaviours![
    an_open_breaker_burns_no_attempt: ack + dead_letters,
    a_failed_probe_opens_it_again: ack + dead_letters,
    an_open_breaker_hands_back_what_is_buffered: ack + dead_letters,
    timeouts_open_the_breaker_and_refusals_do_not: ack + dead_letters,
    a_full_queue_refuses_at_once,
    a_full_queue_is_waited_for,
];

/// Longer than any test.
const NEVER: Duration = Duration::from_secs(3600);

fn guarded(threshold: u32, recovery: Duration) -> SubscribeOptions {
    let breaker = BreakerOptions { threshold, recovery, window: NEVER, probes: 1 };
    SubscribeOptions { concurrency: Some(1), breaker: Some(breaker), ..SubscribeOptions::new("s") }
}

fn openings(subscription: &Subscription) -> u64 {
    subscription.counters().breaker_openings.load(Ordering::Relaxed)
}

async fn is(subscription: &Subscription, phase: Phase) {
    eventually(phase.as_str(), || async { Ok(subscription.breaker() == Some(phase)) }).await;
}

/// X30: two calls fail, then nothing is called until the breaker tries again; nobody else's attempts are counted.
async fn an_open_breaker_burns_no_attempt(world: World) {
    let bus = world.bus();
    let recovery = Duration::from_millis(300);
    let calls = AtomicU32::new(0);
    let (subscription, mut seen) =
        subscribe(&bus, "n", guarded(2, recovery), move |_| match calls.fetch_add(1, Ordering::SeqCst) {
            0 | 1 => failed(),
            _ => Outcome::Done,
        })
        .await;
    assert_eq!(subscription.breaker(), Some(Phase::Closed));
    publish_numbers(&bus, "n", 10).await;
    let jobs = seen.take(12).await;
    let gap = jobs[2].received_at.duration_since(jobs[1].received_at).unwrap();
    assert!(gap + Duration::from_millis(2) >= recovery, "taken while open: {gap:?}");
    finished(&bus, "test/s").await;
    assert!(seen.is_empty());
    let first = jobs.iter().filter(|job| job.attempt == 1).count();
    assert_eq!(first, 10, "two attempts failed, and ten are the first ones");
    is(&subscription, Phase::Closed).await;
    assert_eq!(openings(&subscription), 1);
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
}

async fn a_failed_probe_opens_it_again(world: World) {
    let bus = world.bus();
    let calls = AtomicU32::new(0);
    let (subscription, mut seen) = subscribe(&bus, "n", guarded(2, Duration::from_millis(50)), move |_| {
        match calls.fetch_add(1, Ordering::SeqCst) {
            0..=2 => failed(),
            _ => Outcome::Done,
        }
    })
    .await;
    publish_numbers(&bus, "n", 5).await;
    seen.take(8).await;
    finished(&bus, "test/s").await;
    is(&subscription, Phase::Closed).await;
    assert_eq!(openings(&subscription), 2);
    assert!(seen.is_empty());
}

/// Another process can go on with what this one had taken and not begun.
async fn an_open_breaker_hands_back_what_is_buffered(world: World) {
    let (bus, other) = (world.bus(), world.bus());
    let options = SubscribeOptions { prefetch: 20, ..guarded(1, NEVER) };
    let entered = std::sync::Arc::new(tokio::sync::Notify::new());
    let leave = entered.clone();
    let (subscription, mut seen) = attend(&bus, "n", options, move |_| {
        let leave = leave.clone();
        async move {
            leave.notified().await;
            failed()
        }
    })
    .await;
    publish_numbers(&bus, "n", 11).await;
    seen.next().await;
    eventually("all are held", || async { Ok(bus.group_stats("test/s").await?.in_flight == 11) }).await;
    entered.notify_one();
    is(&subscription, Phase::Open).await;
    let (_, mut elsewhere) = listen(&other, "n", "s").await;
    let jobs = elsewhere.take(11).await;
    assert_eq!(jobs.iter().filter(|job| job.attempt == 1).count(), 10);
    assert_eq!(jobs.iter().filter(|job| job.attempt == 2).count(), 1, "that one has failed");
    finished(&bus, "test/s").await;
    assert!(seen.is_empty());
}

async fn timeouts_open_the_breaker_and_refusals_do_not(world: World) {
    let bus = world.bus();
    let stuck = std::sync::Arc::new(AtomicBool::new(false));
    let gets_stuck = stuck.clone();
    let options = SubscribeOptions { timeout: Some(Duration::from_millis(20)), ..guarded(1, NEVER) };
    let (subscription, mut seen) = attend(&bus, "n", options, move |_| {
        let stuck = gets_stuck.load(Ordering::SeqCst);
        async move {
            if stuck {
                std::future::pending::<()>().await;
            }
            Outcome::Rejected(Failure::new("Reject", "no", ""))
        }
    })
    .await;
    publish_numbers(&bus, "n", 3).await;
    seen.take(3).await;
    finished(&bus, "test/s").await;
    assert_eq!((subscription.breaker(), openings(&subscription)), (Some(Phase::Closed), 0));
    stuck.store(true, Ordering::SeqCst);
    publish(&bus, "n", "3").await;
    is(&subscription, Phase::Open).await;
}

/// Room for less than one of the events of [`flood`].
fn narrow(when_full: WhenFull) -> BusOptions {
    BusOptions { when_full, publish_buffer_bytes: Some(64 << 10), ..BusOptions::new("test") }
}

/// Publishes 20 events of 100 KiB at once.
async fn flood(bus: &polybus_core::Bus) -> Vec<polybus_core::Result<()>> {
    let body = format!("\"{}\"", "x".repeat(100 << 10));
    let all = (0..20).map(|_| {
        let publish = bus.publish(vec![outgoing(event("n", &body))]);
        async move { publish.await.map(drop) }
    });
    within(futures_util::future::join_all(all)).await
}

async fn a_full_queue_refuses_at_once(world: World) {
    let bus = world.bus_with(narrow(WhenFull::Error));
    let (subscription, mut seen) = listen(&bus, "n", "s").await;
    subscription.pause(); // in memory the queue is what nobody handles
    let results = flood(&bus).await;
    let accepted = results.iter().filter(|result| result.is_ok()).count();
    assert!((1..20).contains(&accepted), "{accepted} of 20 were accepted");
    assert!(results.iter().flat_map(|result| result.as_ref().err()).all(|error| error.kind() == ErrorKind::BufferFull));
    subscription.resume();
    seen.take(accepted).await;
    // The last one makes room when it is settled, a moment after its handler has seen it.
    let room = || async { Ok(bus.publish(vec![outgoing(event("n", "1"))]).await.is_ok()) };
    eventually("there is room again", room).await;
    assert_eq!(payload(&seen.next().await), "1");
}

async fn a_full_queue_is_waited_for(world: World) {
    let bus = world.bus_with(narrow(WhenFull::Wait));
    let (_, mut seen) = listen(&bus, "n", "s").await;
    assert!(flood(&bus).await.iter().all(Result::is_ok));
    seen.take(20).await;
}
