//! Coming and going: unsubscribe, drain, close, several at once.
use std::sync::Arc;
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::handler::{Outcome, from_fn};
use polybus_core::{ErrorKind, SubscribeOptions};
use tokio::sync::Notify;

crate::behaviours![
    many_open_and_close_at_once: ack,
    unsubscribed_means_no_more_deliveries,
    a_drain_lets_running_handlers_end: ack,
    a_cancelled_stop_burns_no_attempt: ack,
    buffered_deliveries_go_back_at_once: ack,
    a_second_subscription_of_one_name_is_refused,
    close_from_inside_a_handler,
    publish_from_inside_a_handler,
    start_again_after_close,
];

/// W7.
async fn many_open_and_close_at_once(world: World) {
    let keeper = world.bus();
    let (first, _) = listen(&keeper, "n", "s").await;
    first.drain(DEADLINE).await;
    let all = (0..10).map(|_| {
        let bus = world.bus();
        async move {
            let (subscription, _) = listen(&bus, "other", "s2").await;
            subscription.drain(DEADLINE).await;
            bus.close(DEADLINE).await;
        }
    });
    futures_util::future::join_all(all).await;
    publish_numbers(&keeper, "n", 50).await;
    let (_, mut seen) = listen(&keeper, "n", "s").await;
    seen.all_numbers(50).await;
}

/// X32.
async fn unsubscribed_means_no_more_deliveries(world: World) {
    let bus = world.bus();
    let (subscription, mut seen) = listen(&bus, "n", "s").await;
    let (_, mut other) = listen(&bus, "n", "other").await;
    publish(&bus, "n", "1").await;
    seen.next().await;
    within(subscription.drain(DEADLINE)).await;
    publish(&bus, "n", "2").await;
    other.take(2).await;
    assert!(seen.is_empty());
    assert!(bus.subscriptions().iter().all(|other| &**other.name() != "s"));
}

struct Gate {
    entered: Arc<Notify>,
    leave: Arc<Notify>,
}

async fn gated(bus: &polybus_core::Bus, options: SubscribeOptions) -> (polybus_core::Subscription, Gate) {
    let gate = Gate { entered: Arc::default(), leave: Arc::default() };
    let (entered, leave) = (gate.entered.clone(), gate.leave.clone());
    let handler = from_fn(move |_| {
        let (entered, leave) = (entered.clone(), leave.clone());
        async move {
            entered.notify_one();
            leave.notified().await;
            Outcome::Done
        }
    });
    (bus.subscribe("n", handler, options).await.unwrap(), gate)
}

/// N10.
async fn a_drain_lets_running_handlers_end(world: World) {
    let bus = world.bus();
    let (subscription, gate) = gated(&bus, SubscribeOptions::new("s")).await;
    publish(&bus, "n", "1").await;
    within(gate.entered.notified()).await;
    let (draining, finishing) = (subscription.drain(DEADLINE), async {
        gate.leave.notify_one();
    });
    within(futures_util::future::join(draining, finishing)).await;
    let stats = bus.group_stats("test/s").await.unwrap();
    assert_eq!((stats.lag, stats.in_flight, stats.retrying), (0, 0, 0));
}

/// N11, I6: what a stop cancels comes again as the same attempt.
async fn a_cancelled_stop_burns_no_attempt(world: World) {
    let bus = world.bus();
    let (subscription, gate) = gated(&bus, SubscribeOptions::new("s")).await;
    publish(&bus, "n", "1").await;
    within(gate.entered.notified()).await;
    within(subscription.drain(Duration::ZERO)).await;
    let (_, mut seen) = listen(&bus, "n", "s").await;
    let job = seen.next().await;
    assert_eq!((job.attempt, job.redelivered), (1, true));
}

/// X5.
async fn buffered_deliveries_go_back_at_once(world: World) {
    let (bus, other) = (world.bus(), world.bus());
    let options = SubscribeOptions { concurrency: Some(1), prefetch: 20, ..SubscribeOptions::new("s") };
    let (subscription, gate) = gated(&bus, options).await;
    publish_numbers(&bus, "n", 11).await;
    within(gate.entered.notified()).await;
    eventually("all are held", || async { Ok(bus.group_stats("test/s").await?.in_flight == 11) }).await;
    let (_, mut seen) = listen(&other, "n", "s").await;
    let draining = tokio::spawn(async move { subscription.drain(DEADLINE).await });
    let jobs = seen.take(10).await; // while the first still runs in the draining process
    assert!(jobs.iter().all(|job| job.attempt == 1));
    gate.leave.notify_one();
    within(draining).await.unwrap();
    finished(&bus, "test/s").await;
    assert!(seen.is_empty());
}

async fn a_second_subscription_of_one_name_is_refused(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "n", "s").await;
    let noop = from_fn(|_| async { Outcome::Done });
    let error = bus.subscribe("other", noop, options_for(&bus, "s").await).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::DuplicateSubscription);
    publish(&bus, "n", "1").await;
    seen.next().await;
}

async fn close_from_inside_a_handler(world: World) {
    let bus = world.bus();
    let (inside, closed) = (bus.clone(), Arc::new(Notify::new()));
    let told = closed.clone();
    let handler = from_fn(move |_| {
        let (bus, told) = (inside.clone(), told.clone());
        async move {
            // Ends this very handler when the deadline passes.
            tokio::spawn(async move {
                bus.close(Duration::from_millis(50)).await;
                told.notify_one();
            });
            std::future::pending().await
        }
    });
    bus.subscribe("n", handler, options_for(&bus, "s").await).await.unwrap();
    publish(&bus, "n", "1").await;
    within(closed.notified()).await;
    assert!(bus.is_closed());
}

async fn publish_from_inside_a_handler(world: World) {
    let bus = world.bus();
    let inside = bus.clone();
    let handler = from_fn(move |job| {
        let bus = inside.clone();
        async move {
            publish(&bus, "answer", &payload(&job)).await;
            Outcome::Done
        }
    });
    let options = SubscribeOptions { concurrency: Some(1), ..options_for(&bus, "ask").await };
    bus.subscribe("ask", handler, options).await.unwrap();
    let (_, mut seen) = listen(&bus, "answer", "s").await;
    publish_numbers(&bus, "ask", 20).await;
    seen.all_numbers(20).await;
}

/// N13.
async fn start_again_after_close(world: World) {
    let keeper = world.bus();
    keeper.start().await.unwrap();
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "n", "s").await;
    publish(&bus, "n", "1").await;
    seen.next().await;
    bus.close(DEADLINE).await;
    bus.start().await.unwrap();
    let (_, mut again) = listen(&bus, "n", "s").await;
    publish(&bus, "n", "2").await;
    within(async { while payload(&again.next().await) != "2" {} }).await;
}
