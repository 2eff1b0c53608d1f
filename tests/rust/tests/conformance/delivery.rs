//! Who gets an event, how often, and from where.
use std::time::{Duration, SystemTime};

use polybus_conformance::*;
use polybus_core::handler::Outcome;
use polybus_core::transport::Start;
use polybus_core::{BusOptions, ErrorKind, SubscribeOptions};

crate::behaviours![
    groups_each_get_all_and_members_share: ack,
    a_new_group_starts_now,
    a_new_group_can_start_at_the_beginning: start_position,
    a_new_group_can_start_at_a_time: start_position,
    a_group_goes_on_where_it_stopped: ack + start_position,
    the_log_keeps_what_nobody_reads_yet: start_position,
    broadcast_reaches_every_process: broadcast,
    buses_do_not_see_each_other,
    pause_and_resume: ack,
    concurrency_is_respected: ack,
    a_slow_group_does_not_hold_up_another: ack,
    the_newest_pattern_is_the_groups: ack,
    a_deleted_group_is_gone: ack,
    stats_count_what_is_there: ack,
];

fn from(start: Start) -> SubscribeOptions {
    SubscribeOptions { start, ..SubscribeOptions::new("s") }
}

/// W16: each group gets every event once; the members of one group share them.
async fn groups_each_get_all_and_members_share(world: World) {
    let (first, second) = (world.bus(), world.bus());
    let (_, mut shared_a) = listen(&first, "n", "shared").await;
    let (_, mut shared_b) = listen(&second, "n", "shared").await;
    let (_, mut alone) = listen(&first, "n", "alone").await;
    publish_numbers(&first, "n", 50).await;
    alone.all_numbers(50).await;
    finished(&first, "test/shared").await;
    let mut shared = 0;
    for seen in [&mut shared_a, &mut shared_b] {
        while !seen.is_empty() {
            seen.next().await;
            shared += 1;
        }
    }
    assert_eq!(shared, 50);
    assert!(alone.is_empty());
}

async fn a_new_group_starts_now(world: World) {
    let bus = world.bus();
    publish(&bus, "a", "0").await;
    let (_, mut seen) = listen(&bus, "a", "s").await;
    publish(&bus, "a", "1").await;
    assert_eq!(payload(&seen.next().await), "1");
}

/// W15: the past in order, then the present.
async fn a_new_group_can_start_at_the_beginning(world: World) {
    let bus = world.bus();
    publish_numbers(&bus, "n", 20).await;
    publish(&bus, "other", "\"no\"").await;
    let options = SubscribeOptions { concurrency: Some(1), ..from(Start::Beginning) };
    let (_, mut seen) = subscribe(&bus, "n", options, |_| Outcome::Done).await;
    publish(&bus, "n", "20").await;
    let numbers: Vec<_> = seen.take(21).await.iter().map(payload).collect();
    assert_eq!(numbers, (0..=20).map(|number| number.to_string()).collect::<Vec<_>>());
}

async fn a_new_group_can_start_at_a_time(world: World) {
    let bus = world.bus();
    publish(&bus, "n", "0").await;
    tokio::time::sleep(Duration::from_millis(20)).await; // time itself is what is waited for
    let since = SystemTime::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    publish(&bus, "n", "1").await;
    let (_, mut seen) = subscribe(&bus, "n", from(Start::At(since)), |_| Outcome::Done).await;
    assert_eq!(payload(&seen.next().await), "1");
}

/// W1, W6: what is published while nobody is there waits; `start` is for new groups only.
async fn a_group_goes_on_where_it_stopped(world: World) {
    let keeper = world.bus();
    keeper.start().await.unwrap(); // a memory store lives as long as somebody holds it
    for round in 0..4 {
        let bus = world.bus();
        let (_, mut seen) = subscribe(&bus, "n", from(Start::Beginning), |_| Outcome::Done).await;
        if round > 0 {
            seen.all_numbers(25).await;
        }
        finished(&bus, "test/s").await;
        bus.close(DEADLINE).await;
        publish_numbers(&keeper, "n", 25).await;
    }
}

async fn the_log_keeps_what_nobody_reads_yet(world: World) {
    let bus = world.bus();
    publish_numbers(&bus, "n", 10).await;
    let (_, mut seen) = subscribe(&bus, "n", from(Start::Beginning), |_| Outcome::Done).await;
    seen.all_numbers(10).await;
}

async fn broadcast_reaches_every_process(world: World) {
    let (first, second) = (world.bus(), world.bus());
    let options = || SubscribeOptions { broadcast: true, ..SubscribeOptions::new("s") };
    let (_, mut here) = subscribe(&first, "n", options(), |_| Outcome::Done).await;
    let (_, mut there) = subscribe(&second, "n", options(), |_| failed()).await;
    publish_numbers(&first, "n", 10).await;
    here.all_numbers(10).await;
    there.all_numbers(10).await;
    let can = first.capabilities().await.unwrap();
    if can.dead_letters {
        assert_eq!(first.dead_count(Default::default()).await.unwrap(), 0);
    }
    if can.ack {
        assert_eq!(first.group_stats("test/s").await.unwrap_err().kind(), ErrorKind::NotFound);
    }
}

async fn buses_do_not_see_each_other(world: World) {
    let bus = world.bus();
    let other = world.bus_with(BusOptions { bus: "other".into(), ..BusOptions::new("test") });
    let (_, mut seen) = listen(&bus, "*", "s").await;
    let (_, mut there) = listen(&other, "*", "s").await;
    publish(&other, "a", "1").await;
    publish(&bus, "a", "2").await;
    assert_eq!(payload(&seen.next().await), "2");
    assert_eq!(payload(&there.next().await), "1");
    assert!(seen.is_empty() && there.is_empty());
}

async fn pause_and_resume(world: World) {
    let bus = world.bus();
    let (paused, mut seen) = listen(&bus, "n", "s").await;
    let (_, mut other) = listen(&bus, "n", "other").await;
    publish(&bus, "n", "0").await;
    seen.next().await;
    finished(&bus, "test/s").await;
    paused.pause();
    publish_numbers(&bus, "n", 50).await;
    other.take(51).await;
    finished(&bus, "test/other").await;
    let before = bus.group_stats("test/s").await.unwrap();
    // What had been asked for before the pause may still come in; it is held, not handled by anyone else.
    assert!(before.lag + before.in_flight + before.retrying > 0);
    paused.resume();
    seen.all_numbers(50).await;
}

/// N9.
async fn concurrency_is_respected(world: World) {
    let bus = world.bus();
    let (running, most) = (
        std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0)),
        std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0)),
    );
    let (now, peak) = (running.clone(), most.clone());
    let handler = polybus_core::handler::from_fn(move |_| {
        let (now, peak) = (now.clone(), peak.clone());
        async move {
            let count = now.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
            peak.fetch_max(count, std::sync::atomic::Ordering::SeqCst);
            tokio::task::yield_now().await;
            now.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
            Outcome::Done
        }
    });
    let options = SubscribeOptions { concurrency: Some(3), prefetch: 10, ..SubscribeOptions::new("s") };
    let subscription = bus.subscribe("n", handler, options).await.unwrap();
    publish_numbers(&bus, "n", 100).await;
    finished(&bus, "test/s").await;
    assert!((1..=3).contains(&most.load(std::sync::atomic::Ordering::SeqCst)));
    assert_eq!(subscription.counters().completed.load(std::sync::atomic::Ordering::SeqCst), 100);
}

/// X31: one group that never ends does not hold up another.
async fn a_slow_group_does_not_hold_up_another(world: World) {
    let bus = world.bus();
    let stuck = polybus_core::handler::from_fn(|_| std::future::pending());
    bus.subscribe("n", stuck, SubscribeOptions::new("stuck")).await.unwrap();
    let (_, mut seen) = listen(&bus, "n", "quick").await;
    publish_numbers(&bus, "n", 100).await;
    seen.all_numbers(100).await;
    bus.close(Duration::ZERO).await;
}

async fn the_newest_pattern_is_the_groups(world: World) {
    let (old, new) = (world.bus(), world.bus());
    let (_, mut before) = listen(&old, "order.placed", "s").await;
    publish(&old, "order.placed", "1").await;
    before.next().await;
    finished(&old, "test/s").await;
    old.close(DEADLINE).await;
    publish(&new, "order.sent", "2").await;
    let (_, mut after) = listen(&new, "order.*", "s").await;
    publish(&new, "order.sent", "3").await;
    within(async { while payload(&after.next().await) != "3" {} }).await;
}

async fn a_deleted_group_is_gone(world: World) {
    let bus = world.bus();
    let (subscription, _) = listen(&bus, "n", "s").await;
    subscription.drain(DEADLINE).await;
    publish_numbers(&bus, "n", 3).await;
    assert!(bus.delete_group("test/s").await.unwrap());
    assert!(!bus.delete_group("test/s").await.unwrap());
    assert_eq!(bus.group_stats("test/s").await.unwrap_err().kind(), ErrorKind::NotFound);
    let (_, mut seen) = listen(&bus, "n", "s").await;
    publish(&bus, "n", "9").await;
    assert_eq!(payload(&seen.next().await), "9");
}

async fn stats_count_what_is_there(world: World) {
    let bus = world.bus();
    let stuck = polybus_core::handler::from_fn(|_| std::future::pending());
    let options = SubscribeOptions { concurrency: Some(2), ..SubscribeOptions::new("s") };
    bus.subscribe("n", stuck, options).await.unwrap();
    publish_numbers(&bus, "n", 5).await;
    eventually("two of five are in flight", || async {
        let stats = bus.group_stats("test/s").await?;
        Ok((stats.lag, stats.in_flight, stats.retrying) == (3, 2, 0) && stats.oldest.is_some())
    })
    .await;
    bus.close(Duration::ZERO).await;
}
