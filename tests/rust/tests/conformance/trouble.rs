//! Failing handlers: retries, dead letters, replay.
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::dead_letter::DeadLetterFilter;
use polybus_core::delivery::{DeadReason, Failure};
use polybus_core::handler::{Outcome, from_fn};
use polybus_core::{ErrorKind, Pattern, SubscribeOptions};

crate::behaviours![
    failed_events_come_again: ack + dead_letters,
    attempts_count_up_without_gaps: ack,
    a_handler_chooses_its_delay: ack,
    exhausted_and_rejected_become_dead_letters: ack + dead_letters,
    a_panic_is_a_failure: ack,
    errors_of_many_members_do_not_lose_events: ack,
    one_stuck_handler_blocks_only_its_slot: ack,
    a_timed_out_handler_is_retried: ack,
    dead_letters_are_listed_filtered_and_paged: ack + dead_letters,
    replay_keeps_the_id_and_happens_once: ack + dead_letters,
    dead_letters_can_be_switched_off: ack + dead_letters,
    purged_ones_are_gone: ack + dead_letters,
];

/// W4: the first two fail once, all hundred arrive.
async fn failed_events_come_again(world: World) {
    let bus = world.bus();
    let failures = AtomicU32::new(0);
    let (_, mut seen) =
        subscribe(&bus, "n", SubscribeOptions::new("s"), move |_| match failures.fetch_add(1, Ordering::SeqCst) {
            0 | 1 => failed(),
            _ => Outcome::Done,
        })
        .await;
    publish_numbers(&bus, "n", 100).await;
    seen.all_numbers(100).await;
    finished(&bus, "test/s").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
}

/// N2, N6, I6: attempts 1..n; the payload of each is the same.
async fn attempts_count_up_without_gaps(world: World) {
    let bus = world.bus();
    let (_, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("s"), |job| match job.attempt {
        1..=3 => failed(),
        _ => Outcome::Done,
    })
    .await;
    publish(&bus, "n", "{\"x\":[1]}").await;
    let jobs = seen.take(4).await;
    assert_eq!(
        jobs.iter().map(|job| (job.attempt, job.redelivered)).collect::<Vec<_>>(),
        [(1, false), (2, true), (3, true), (4, true)]
    );
    assert!(jobs.iter().all(|job| payload(job) == "{\"x\":[1]}" && job.event.meta.id == jobs[0].event.meta.id));
    finished(&bus, "test/s").await;
}

/// N3.
async fn a_handler_chooses_its_delay(world: World) {
    let bus = world.bus();
    let wait = Duration::from_millis(150);
    let (_, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("s"), move |job| match job.attempt {
        1 => Outcome::RetryAfter(wait, Failure::new("Retry", "later", "")),
        _ => Outcome::Done,
    })
    .await;
    publish(&bus, "n", "1").await;
    let jobs = seen.take(2).await;
    let gap = jobs[1].received_at.duration_since(jobs[0].received_at).unwrap();
    assert!(gap + Duration::from_millis(2) >= wait, "early: {gap:?}");
}

async fn exhausted_and_rejected_become_dead_letters(world: World) {
    let bus = world.bus();
    let (_, _seen) = subscribe(&bus, "*", SubscribeOptions::new("s"), |job| match job.event.event_type.as_str() {
        "bad" => Outcome::Rejected(Failure::new("Reject", "no such order", "")),
        _ => failed(),
    })
    .await;
    let (bad, poor) = (publish(&bus, "bad", "1").await, publish(&bus, "poor", "2").await);
    eventually("both are dead", || async { Ok(bus.dead_count(Default::default()).await? == 2) }).await;
    let letters = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    let of = |id| letters.iter().find(|letter| letter.event.as_ref().is_some_and(|event| event.meta.id == id)).unwrap();
    let (bad, poor) = (of(bad.id), of(poor.id));
    assert_eq!((bad.reason, bad.attempts), (DeadReason::Rejected, 1));
    assert_eq!((bad.error.kind.as_str(), bad.error.message.as_str()), ("Reject", "no such order"));
    assert_eq!((poor.reason, poor.attempts), (DeadReason::Exhausted, 4));
    assert_eq!((&*poor.group, &*poor.subscription, poor.error.stack.as_str()), ("test/s", "s", "at test"));
    assert!(poor.first_failed_at < poor.last_failed_at);
    finished(&bus, "test/s").await;
}

async fn a_panic_is_a_failure(world: World) {
    let bus = world.bus();
    let runs = Arc::new(AtomicU32::new(0));
    let counted = runs.clone();
    let handler = from_fn(move |job| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move {
            assert!(job.attempt > 1, "the first attempt panics");
            Outcome::Done
        }
    });
    bus.subscribe("n", handler, SubscribeOptions::new("s")).await.unwrap();
    publish(&bus, "n", "1").await;
    eventually("it ran twice", || async { Ok(runs.load(Ordering::SeqCst) == 2) }).await;
    finished(&bus, "test/s").await;
}

/// W8: members that only fail and leave lose nothing.
async fn errors_of_many_members_do_not_lose_events(world: World) {
    let keeper = world.bus();
    let (first, _) = listen(&keeper, "n", "s").await;
    first.drain(DEADLINE).await;
    publish_numbers(&keeper, "n", 50).await;
    for _ in 0..3 {
        let bus = world.bus();
        let options = SubscribeOptions { retry: Some(quick(1_000)), ..SubscribeOptions::new("s") };
        let (_, mut seen) = subscribe(&bus, "n", options, |_| failed()).await;
        seen.take(100).await;
        bus.close(DEADLINE).await;
    }
    let options = SubscribeOptions { retry: Some(quick(1_000)), ..SubscribeOptions::new("s") };
    let (_, mut seen) = subscribe(&keeper, "n", options, |_| Outcome::Done).await;
    seen.all_numbers(50).await;
}

async fn one_stuck_handler_blocks_only_its_slot(world: World) {
    let bus = world.bus();
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_fn(move |job| {
        let sender = sender.clone();
        async move {
            if payload(&job) == "0" {
                std::future::pending::<()>().await;
            }
            let _ = sender.send(());
            Outcome::Done
        }
    });
    let options = SubscribeOptions { concurrency: Some(2), ..SubscribeOptions::new("s") };
    bus.subscribe("n", handler, options).await.unwrap();
    publish_numbers(&bus, "n", 20).await;
    for _ in 1..20 {
        within(seen.recv()).await.unwrap();
    }
    bus.close(Duration::ZERO).await;
}

async fn a_timed_out_handler_is_retried(world: World) {
    let bus = world.bus();
    let handler = from_fn(|job| async move {
        if job.attempt == 1 {
            std::future::pending::<()>().await;
        }
        Outcome::Done
    });
    let options = SubscribeOptions { timeout: Some(Duration::from_millis(20)), ..SubscribeOptions::new("s") };
    let subscription = bus.subscribe("n", handler, options).await.unwrap();
    publish(&bus, "n", "1").await;
    eventually("the second attempt ended", || async {
        Ok(subscription.counters().completed.load(Ordering::SeqCst) == 1)
    })
    .await;
    assert_eq!(subscription.counters().timed_out.load(Ordering::SeqCst), 1);
}

async fn bury(bus: &polybus_core::Bus, count: usize) {
    let options = SubscribeOptions { retry: Some(quick(0)), concurrency: Some(1), ..SubscribeOptions::new("s") };
    let (subscription, _) = subscribe(bus, "n.*", options, |_| failed()).await;
    for number in 0..count {
        publish(bus, &format!("n.{}", number % 2), &number.to_string()).await;
    }
    eventually("all are dead", || async { Ok(bus.dead_count(Default::default()).await? == count as u64) }).await;
    subscription.drain(DEADLINE).await;
}

async fn dead_letters_are_listed_filtered_and_paged(world: World) {
    let bus = world.bus();
    bury(&bus, 10).await;
    let body =
        |letter: &polybus_core::dead_letter::DeadLetter| letter.event.as_ref().map(|event| event.payload.to_vec());
    let first = bus.dead_letters(Default::default(), None, 4).await.unwrap();
    let rest = bus.dead_letters(Default::default(), Some(first[3].id.clone()), 100).await.unwrap();
    let all: Vec<_> = first.iter().chain(&rest).filter_map(body).collect();
    assert_eq!(all, (0..10).map(|number| number.to_string().into_bytes()).collect::<Vec<_>>());
    let odd = DeadLetterFilter { pattern: Some(Pattern::new("*.1").unwrap()), ..Default::default() };
    assert_eq!(bus.dead_count(odd.clone()).await.unwrap(), 5);
    assert_eq!(bus.dead_letters(odd, None, 3).await.unwrap().len(), 3);
    let other = DeadLetterFilter { group: Some("test/other".into()), ..Default::default() };
    assert_eq!(bus.dead_count(other).await.unwrap(), 0);
    let one = DeadLetterFilter { id: Some(first[2].id.clone()), ..Default::default() };
    assert_eq!(bus.dead_letters(one, None, 10).await.unwrap().iter().filter_map(body).collect::<Vec<_>>(), [b"2"]);
    let later = DeadLetterFilter { since: Some(rest[5].last_failed_at + Duration::from_secs(1)), ..Default::default() };
    assert_eq!(bus.dead_count(later).await.unwrap(), 0);
}

/// X12.
async fn replay_keeps_the_id_and_happens_once(world: World) {
    let bus = world.bus();
    bury(&bus, 3).await;
    let letters = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    let options = SubscribeOptions { retry: Some(quick(0)), ..SubscribeOptions::new("s") };
    let (_, mut seen) =
        subscribe(&bus, "n.*", options, |job| if payload(job) == "1" { failed() } else { Outcome::Done }).await;
    let one = DeadLetterFilter { id: Some(letters[1].id.clone()), ..Default::default() };
    assert_eq!(bus.dead_replay(one.clone()).await.unwrap(), 1);
    assert_eq!(bus.dead_replay(one).await.unwrap_err().kind(), ErrorKind::NotFound);
    let job = seen.next().await;
    assert_eq!((job.attempt, &job.event.meta.id), (1, &letters[1].event.as_ref().unwrap().meta.id));
    eventually("it died again", || async { Ok(bus.dead_count(Default::default()).await? == 3) }).await;
    let again = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    assert!(again.iter().any(|letter| letter.replayed_from.as_ref() == Some(&letters[1].id)));
    let rest = DeadLetterFilter { pattern: Some(Pattern::new("n.0").unwrap()), ..Default::default() };
    assert_eq!(bus.dead_replay(rest).await.unwrap(), 2);
    seen.take(2).await;
    finished(&bus, "test/s").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 1);
}

async fn dead_letters_can_be_switched_off(world: World) {
    let bus = world.bus();
    let options = SubscribeOptions { retry: Some(quick(0)), drop_dead: true, ..SubscribeOptions::new("s") };
    let (subscription, mut seen) = subscribe(&bus, "n", options, |_| failed()).await;
    publish(&bus, "n", "1").await;
    seen.next().await;
    finished(&bus, "test/s").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
    assert_eq!(subscription.counters().dropped.load(Ordering::SeqCst), 1);
}

async fn purged_ones_are_gone(world: World) {
    let bus = world.bus();
    bury(&bus, 4).await;
    let odd = DeadLetterFilter { pattern: Some(Pattern::new("n.1").unwrap()), ..Default::default() };
    assert_eq!(bus.dead_purge(odd).await.unwrap(), 2);
    let unknown = DeadLetterFilter { id: Some("987654".into()), ..Default::default() };
    assert_eq!(bus.dead_purge(unknown).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bus.dead_purge(Default::default()).await.unwrap(), 2);
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 0);
}
