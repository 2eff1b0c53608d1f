//! Handlers that take many events at once.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use polybus_conformance::*;
use polybus_core::handler::{Job, Outcome, from_batch_fn};
use polybus_core::transport::Outgoing;
use polybus_core::{BatchOptions, Bus, BusOptions, ErrorKind, SubscribeOptions, Subscription};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

crate::behaviours![
    full_batches_go_out_one_at_a_time: ack,
    a_batch_that_is_not_full_waits: ack,
    some_of_a_batch_fail: ack + dead_letters,
    one_bad_event_buries_only_itself: ack + dead_letters,
    a_last_attempt_holds_nothing_else: ack,
    a_batch_that_runs_too_long_comes_again: ack,
    a_batch_that_is_not_full_goes_back: ack,
    a_batch_must_fit_into_the_buffer: ack,
    a_broadcast_comes_in_batches: broadcast,
];

const NEVER: Duration = Duration::from_secs(3600);

fn batches(size: usize, wait: Duration) -> SubscribeOptions {
    SubscribeOptions { batch: Some(BatchOptions { size, wait }), ..SubscribeOptions::new("s") }
}

/// Subscribes a handler that tells what it saw and then says what `say` answers for each job.
async fn gather<R: Future<Output = Vec<(u64, Outcome)>> + Send + 'static>(
    bus: &Bus,
    options: SubscribeOptions,
    say: impl Fn(Vec<Job>) -> R + Send + Sync + 'static,
) -> (Subscription, UnboundedReceiver<Vec<Job>>) {
    let (sender, receiver) = unbounded_channel();
    let handler = from_batch_fn(move |jobs: Vec<Job>| {
        drop(sender.send(jobs.clone())); // nobody listens any more: fine
        say(jobs)
    });
    (bus.subscribe("n", handler, options).await.unwrap(), receiver)
}

fn each(jobs: &[Job], say: impl Fn(&Job) -> Outcome) -> Vec<(u64, Outcome)> {
    jobs.iter().map(|job| (job.id, say(job))).collect()
}

fn content(jobs: &[Job]) -> Vec<(u64, Outcome)> {
    each(jobs, |_| Outcome::Done)
}

/// Publishes the numbers below `count`, all in one.
async fn publish_at_once(bus: &Bus, count: usize) {
    let batch: Vec<Outgoing> = (0..count).map(|number| outgoing(event("n", &number.to_string()))).collect();
    bus.publish(batch).await.unwrap();
}

async fn next(seen: &mut UnboundedReceiver<Vec<Job>>) -> Vec<Job> {
    within(seen.recv()).await.unwrap()
}

fn numbers(jobs: &[Job]) -> Vec<usize> {
    let mut numbers: Vec<_> = jobs.iter().map(|job| payload(job).parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers
}

async fn full_batches_go_out_one_at_a_time(world: World) {
    let bus = world.bus();
    let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let highest = most.clone();
    let (_, mut seen) = gather(&bus, batches(5, NEVER), move |jobs| {
        let (running, most) = (running.clone(), most.clone());
        async move {
            most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            running.fetch_sub(1, Ordering::SeqCst);
            content(&jobs)
        }
    })
    .await;
    publish_at_once(&bus, 12).await;
    publish_numbers(&bus, "n", 3).await;
    let mut all = Vec::new();
    for _ in 0..3 {
        let batch = next(&mut seen).await;
        assert_eq!(batch.len(), 5);
        assert!(batch.iter().all(|job| job.attempt == 1));
        all.extend(batch);
    }
    let mut expected: Vec<_> = (0..12).chain(0..3).collect();
    expected.sort_unstable();
    assert_eq!(numbers(&all), expected);
    finished(&bus, "test/s").await;
    assert_eq!(highest.load(Ordering::SeqCst), 1, "concurrency counts batches");
}

async fn a_batch_that_is_not_full_waits(world: World) {
    let bus = world.bus();
    let wait = Duration::from_millis(100);
    let (_, mut seen) = gather(&bus, batches(100, wait), |jobs| async move { content(&jobs) }).await;
    let published = Instant::now();
    publish_at_once(&bus, 3).await;
    let mut batch = next(&mut seen).await;
    assert!(published.elapsed() >= wait, "early: {:?}", published.elapsed());
    while batch.len() < 3 {
        batch.extend(next(&mut seen).await);
    }
    assert_eq!(numbers(&batch), [0, 1, 2]);
    finished(&bus, "test/s").await;
}

async fn some_of_a_batch_fail(world: World) {
    let bus = world.bus();
    let say = |job: &Job| match (payload(job).as_str(), job.attempt) {
        ("1", _) => Outcome::Rejected(polybus_core::delivery::Failure::new("Reject", "no", "")),
        ("3", 1) => failed(),
        _ => Outcome::Done,
    };
    let options = batches(5, Duration::from_millis(20));
    let (subscription, mut seen) = gather(&bus, options, move |jobs| async move { each(&jobs, say) }).await;
    publish_at_once(&bus, 5).await;
    let mut all = Vec::new();
    while all.len() < 6 {
        all.extend(next(&mut seen).await);
    }
    finished(&bus, "test/s").await;
    assert_eq!(numbers(&all), [0, 1, 2, 3, 3, 4]);
    assert!(all.iter().all(|job| job.attempt == 1 || payload(job) == "3"));
    let letters = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    assert_eq!((letters.len(), letters[0].reason.as_str(), letters[0].attempts), (1, "rejected", 1));
    assert_eq!(subscription.counters().completed.load(Ordering::Relaxed), 4);
}

/// The last attempt is made alone: what fails a whole batch does not take the others with it.
async fn one_bad_event_buries_only_itself(world: World) {
    let bus = world.bus();
    let (subscription, mut seen) = gather(&bus, batches(5, Duration::from_millis(20)), |jobs| async move {
        let bad = jobs.iter().any(|job| payload(job) == "2");
        each(&jobs, |_| if bad { failed() } else { Outcome::Done })
    })
    .await;
    publish_at_once(&bus, 5).await;
    eventually("one is dead", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    finished(&bus, "test/s").await;
    let letters = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].attempts, &letters[0].event.as_ref().unwrap().payload[..]), (4, b"2".as_slice()));
    assert_eq!(subscription.counters().completed.load(Ordering::Relaxed), 4);
    while let Ok(batch) = seen.try_recv() {
        assert!(batch.len() == 1 || batch.iter().all(|job| job.attempt < 4), "a last attempt in company");
    }
}

/// Whatever is held when a process ends counts as an attempt of it.
async fn a_last_attempt_holds_nothing_else(world: World) {
    let bus = world.bus();
    let entered = Arc::new(tokio::sync::Semaphore::new(0));
    let leave = entered.clone();
    let options = SubscribeOptions { retry: Some(quick(1)), ..batches(5, NEVER) };
    let (_, mut seen) = gather(&bus, options, move |jobs| {
        let leave = leave.clone();
        async move {
            if jobs[0].attempt == 1 {
                return each(&jobs, |_| failed());
            }
            leave.acquire().await.unwrap().forget();
            content(&jobs)
        }
    })
    .await;
    publish_at_once(&bus, 5).await;
    assert_eq!(next(&mut seen).await.len(), 5);
    let mut all = Vec::new();
    for left in (0..5).rev() {
        let batch = next(&mut seen).await;
        let stats = bus.group_stats("test/s").await.unwrap();
        assert_eq!((batch.len(), batch[0].attempt), (1, 2));
        assert_eq!((stats.in_flight, stats.lag + stats.retrying), (1, left));
        all.extend(batch);
        entered.add_permits(1);
    }
    assert_eq!(numbers(&all), [0, 1, 2, 3, 4]);
    finished(&bus, "test/s").await;
    publish_at_once(&bus, 5).await;
    assert_eq!(next(&mut seen).await.len(), 5, "and then as before");
}

async fn a_batch_that_runs_too_long_comes_again(world: World) {
    let bus = world.bus();
    let options = SubscribeOptions { timeout: Some(Duration::from_millis(50)), ..batches(3, NEVER) };
    let (subscription, mut seen) = gather(&bus, options, |jobs| async move {
        if jobs.iter().any(|job| job.attempt == 1) {
            std::future::pending::<()>().await;
        }
        content(&jobs)
    })
    .await;
    publish_at_once(&bus, 3).await;
    assert_eq!(next(&mut seen).await.len(), 3);
    let again = next(&mut seen).await;
    assert_eq!(numbers(&again), [0, 1, 2]);
    assert!(again.iter().all(|job| job.attempt == 2));
    finished(&bus, "test/s").await;
    assert_eq!(subscription.counters().timed_out.load(Ordering::Relaxed), 3);
}

async fn a_batch_that_is_not_full_goes_back(world: World) {
    let bus = world.bus();
    let (subscription, seen) = gather(&bus, batches(100, NEVER), |jobs| async move { content(&jobs) }).await;
    publish_at_once(&bus, 3).await;
    eventually("all are held", || async { Ok(bus.group_stats("test/s").await?.in_flight == 3) }).await;
    within(subscription.drain(DEADLINE)).await;
    assert!(seen.is_empty());
    let (_, mut elsewhere) = listen(&bus, "n", "s").await;
    assert!(elsewhere.take(3).await.iter().all(|job| job.attempt == 1));
    finished(&bus, "test/s").await;
}

async fn a_batch_must_fit_into_the_buffer(world: World) {
    let bus = world.bus_with(BusOptions { buffer_size: 10, ..BusOptions::new("test") });
    let handler = || from_batch_fn(|jobs: Vec<Job>| async move { content(&jobs) });
    let error = bus.subscribe("n", handler(), batches(11, NEVER)).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    bus.subscribe("n", handler(), batches(10, NEVER)).await.unwrap();
}

async fn a_broadcast_comes_in_batches(world: World) {
    let bus = world.bus();
    let options = SubscribeOptions { broadcast: true, ..batches(3, NEVER) };
    let (subscription, mut seen) = gather(&bus, options, |jobs| async move { each(&jobs, |_| failed()) }).await;
    publish_at_once(&bus, 6).await;
    assert_eq!(numbers(&next(&mut seen).await), [0, 1, 2]);
    assert_eq!(numbers(&next(&mut seen).await), [3, 4, 5]);
    publish_at_once(&bus, 1).await;
    // A pause loses nothing of it: nobody could hand it out again.
    subscription.pause();
    subscription.resume();
    publish_at_once(&bus, 2).await;
    assert_eq!(numbers(&next(&mut seen).await), [0, 0, 1]);
}
