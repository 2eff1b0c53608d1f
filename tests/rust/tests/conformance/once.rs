//! What happens once although it comes twice: handling by key, and publishing by idempotency key.
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::delivery::Failure;
use polybus_core::event::Text;
use polybus_core::handler::{Job, Outcome, from_fn, keyed};
use polybus_core::options::Key;
use polybus_core::transport::{Begun, GroupSpec, Outgoing, Receipt, Start};
use polybus_core::{Bus, BusOptions, ErrorKind, Event, SubscribeOptions, Subscription};
use tokio::sync::{Semaphore, mpsc};

crate::behaviours![
    an_event_that_comes_twice_is_handled_once: idempotent,
    a_key_of_the_handler_counts_across_events: idempotent,
    two_members_race_on_one_key: idempotent,
    a_failed_attempt_frees_the_key: idempotent,
    a_dead_letter_frees_the_key: idempotent + dead_letters,
    what_is_dropped_frees_the_key: idempotent,
    a_dead_members_mark_ends_with_its_lease: idempotent + cross_process,
    handled_keys_are_forgotten: idempotent,
    groups_remember_for_themselves: idempotent,
    a_deleted_group_remembers_nothing: idempotent,
    a_broadcast_cannot_be_idempotent,
    a_key_is_published_once: publish_dedupe,
    a_delayed_event_is_published_once: publish_dedupe + delayed_publish,
    one_of_eight_publishers_wins: publish_dedupe,
    the_window_passes: publish_dedupe,
    without_a_window_everything_is_stored: publish_dedupe,
    buses_remember_for_themselves: publish_dedupe,
];

fn with_key(payload: &str, key: &str) -> Event {
    let meta = format!(r#"{{"idempotencyKey":"{key}"}}"#);
    new_event("n", payload.as_bytes().to_vec().into(), Some(meta.as_bytes()), 1 << 20).unwrap()
}

async fn publish_event(bus: &Bus, event: Event) -> Receipt {
    bus.publish(vec![outgoing(event)]).await.unwrap().remove(0)
}

/// Keys reach the consumers however often they are published.
fn forgetful(world: &World) -> Bus {
    world.bus_with(BusOptions { idempotency_window: Some(Duration::ZERO), ..BusOptions::new("test") })
}

fn once(name: &str) -> SubscribeOptions {
    SubscribeOptions { idempotent: Some(Key::Event), ..SubscribeOptions::new(name) }
}

fn count(subscription: &Subscription) -> (u64, u64) {
    let counters = subscription.counters();
    (counters.completed.load(Ordering::Relaxed), counters.duplicates.load(Ordering::Relaxed))
}

async fn an_event_that_comes_twice_is_handled_once(world: World) {
    let bus = forgetful(&world);
    let (subscription, mut seen) = subscribe(&bus, "n", once("s"), |_| Outcome::Done).await;
    let (with, without) = (with_key("1", "k"), event("n", "2"));
    for event in [&with, &without, &with, &without, &with_key("3", "k")] {
        assert!(!publish_event(&bus, event.clone()).await.duplicate);
    }
    finished(&bus, "test/s").await;
    let mut handled: Vec<_> = seen.take(2).await.iter().map(payload).collect();
    handled.sort_unstable();
    assert_eq!(handled.len(), 2);
    // Of several that are taken at once any may be the first, but only one of each key.
    assert!(handled.contains(&"2".to_owned()), "{handled:?}");
    eventually("all are counted", || async { Ok(count(&subscription) == (2, 3)) }).await;
    assert!(seen.is_empty());
    // Also when the group goes on in another session.
    within(subscription.drain(DEADLINE)).await;
    let (subscription, seen) = subscribe(&bus, "n", once("s"), |_| Outcome::Done).await;
    publish_event(&bus, with.clone()).await;
    eventually("it is absorbed", || async { Ok(count(&subscription) == (0, 1)) }).await;
    assert!(seen.is_empty());
    // A subscription that does not ask is not concerned.
    let (_, mut all) = listen(&bus, "n", "all").await;
    publish_event(&bus, with.clone()).await;
    publish_event(&bus, with).await;
    all.take(2).await;
}

/// Subscribes a handler whose key is the payload up to the first space; it ends when it gets a permit.
async fn by_payload(
    bus: &Bus,
    options: SubscribeOptions,
    permits: &Arc<Semaphore>,
) -> (Subscription, mpsc::UnboundedReceiver<Job>) {
    let (sender, seen) = mpsc::unbounded_channel();
    let permits = permits.clone();
    let handler = from_fn(move |job: Job| {
        let (sender, permits) = (sender.clone(), permits.clone());
        async move {
            let quick = payload(&job).contains("quick");
            drop(sender.send(job));
            if !quick {
                permits.acquire().await.unwrap().forget();
            }
            Outcome::Done
        }
    });
    let key =
        |event: &Event| Some(Text::from(String::from_utf8_lossy(&event.payload).split(' ').next().unwrap().to_owned()));
    let options = SubscribeOptions { idempotent: Some(Key::Handler), ..options };
    (bus.subscribe("n", keyed(handler, key), options).await.unwrap(), seen)
}

async fn a_key_of_the_handler_counts_across_events(world: World) {
    let bus = world.bus();
    let permits = Arc::new(Semaphore::new(100));
    let (subscription, mut seen) = by_payload(&bus, SubscribeOptions::new("s"), &permits).await;
    for payload in ["\"a\"", "\"b\"", "\"a\"", "\"b\"", "\"a\""] {
        publish(&bus, "n", payload).await;
    }
    finished(&bus, "test/s").await;
    eventually("all are counted", || async { Ok(count(&subscription) == (2, 3)) }).await;
    let mut handled = [payload(&within(seen.recv()).await.unwrap()), payload(&within(seen.recv()).await.unwrap())];
    handled.sort_unstable();
    assert_eq!(handled, ["\"a\"", "\"b\""]);
    assert!(seen.is_empty());
}

/// One runs; the other is put back, holds no worker meanwhile, burns no attempt, and is absorbed.
async fn two_members_race_on_one_key(world: World) {
    let (one, two) = (world.bus(), world.bus());
    let permits = Arc::new(Semaphore::new(0));
    let alone = || SubscribeOptions { concurrency: Some(1), ..SubscribeOptions::new("s") };
    let (first, mut seen_first) = by_payload(&one, alone(), &permits).await;
    let (second, mut seen_second) = by_payload(&two, alone(), &permits).await;
    publish(&one, "n", "\"a 1\"").await;
    publish(&one, "n", "\"a 2\"").await;
    let job = within(async {
        tokio::select! { job = seen_first.recv() => job, job = seen_second.recv() => job }
    })
    .await;
    assert_eq!(job.unwrap().attempt, 1);
    eventually("the other waits", || async { Ok(one.group_stats("test/s").await?.retrying == 1) }).await;
    // The worker that was refused is free for others.
    publish(&one, "n", "\"b quick\"").await;
    let other = within(async {
        tokio::select! { job = seen_first.recv() => job, job = seen_second.recv() => job }
    })
    .await;
    assert_eq!(payload(&other.unwrap()), "\"b quick\"");
    permits.add_permits(1);
    finished(&one, "test/s").await;
    eventually("it is absorbed", || async {
        let (first, second) = (count(&first), count(&second));
        Ok((first.0 + second.0, first.1 + second.1) == (2, 1))
    })
    .await;
    assert!(seen_first.is_empty() && seen_second.is_empty());
    assert_eq!(one.dead_count(Default::default()).await.unwrap(), 0);
}

async fn a_failed_attempt_frees_the_key(world: World) {
    let bus = forgetful(&world);
    let (subscription, mut seen) = subscribe(&bus, "n", once("s"), |job| match job.attempt {
        1 | 2 => failed(),
        _ => Outcome::Done,
    })
    .await;
    publish_event(&bus, with_key("1", "k")).await;
    let attempts: Vec<_> = seen.take(3).await.iter().map(|job| job.attempt).collect();
    assert_eq!(attempts, [1, 2, 3]);
    finished(&bus, "test/s").await;
    publish_event(&bus, with_key("1", "k")).await;
    eventually("the next is absorbed", || async { Ok(count(&subscription) == (1, 1)) }).await;
    assert!(seen.is_empty());
}

async fn a_dead_letter_frees_the_key(world: World) {
    let bus = forgetful(&world);
    let (subscription, mut seen) = subscribe(&bus, "n", once("s"), |job| match payload(job).as_str() {
        "1" if !job.redelivered => Outcome::Rejected(Failure::new("Trouble", "as the test wants", "at test")),
        _ => Outcome::Done,
    })
    .await;
    publish_event(&bus, with_key("1", "k")).await;
    eventually("it is dead", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    publish_event(&bus, with_key("2", "k")).await;
    let handled: Vec<_> = seen.take(2).await.iter().map(payload).collect();
    assert_eq!(handled, ["1", "2"]);
    finished(&bus, "test/s").await;
    // By now the effect has happened: the replay has nothing to do.
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    eventually("the replay is absorbed", || async { Ok(count(&subscription) == (1, 1)) }).await;
    assert!(seen.is_empty());
}

async fn what_is_dropped_frees_the_key(world: World) {
    let bus = forgetful(&world);
    let options = SubscribeOptions { drop_dead: true, ..once("s") };
    let (subscription, mut seen) = subscribe(&bus, "n", options, |job| match payload(job).as_str() {
        "1" => Outcome::Rejected(Failure::new("Trouble", "as the test wants", "at test")),
        _ => Outcome::Done,
    })
    .await;
    publish_event(&bus, with_key("1", "k")).await;
    seen.next().await;
    finished(&bus, "test/s").await;
    publish_event(&bus, with_key("2", "k")).await;
    assert_eq!(payload(&seen.next().await), "2");
    eventually("it is handled", || async { Ok(count(&subscription) == (1, 0)) }).await;
}

/// A member that takes an event, begins, and never says anything again, heartbeats included.
async fn a_dead_members_mark_ends_with_its_lease(world: World) {
    let bus = world.bus_with(BusOptions { lease: Duration::from_secs(1), ..BusOptions::new("test") });
    let dead = world.transport().await;
    let spec = GroupSpec { start: Start::New, ..world.spec("n", "s", false) };
    let source = dead.subscribe(spec).await.unwrap();
    publish(&bus, "n", "\"a 1\"").await;
    let taken = within(source.take(1)).await.unwrap();
    let begun = source.begin(vec![(taken[0].lease, "\"a".into())], DEADLINE).await.unwrap();
    assert_eq!(begun, [Begun::Run]);
    std::mem::forget((source, dead)); // neither would ever leave its group

    publish(&bus, "n", "\"a 2\"").await;
    let permits = Arc::new(Semaphore::new(100));
    let (subscription, mut seen) = by_payload(&bus, SubscribeOptions::new("s"), &permits).await;
    within(seen.recv()).await.unwrap();
    finished(&bus, "test/s").await;
    eventually("the other is absorbed", || async { Ok(count(&subscription) == (1, 1)) }).await;
    assert!(seen.is_empty());
}

async fn handled_keys_are_forgotten(world: World) {
    let bus = forgetful(&world);
    let options = SubscribeOptions { idempotent_retention: Some(Duration::from_millis(30)), ..once("s") };
    let (subscription, _seen) = subscribe(&bus, "n", options, |_| Outcome::Done).await;
    eventually("it is handled again", || async {
        publish_event(&bus, with_key("1", "k")).await;
        Ok(count(&subscription).0 >= 2)
    })
    .await;
}

async fn groups_remember_for_themselves(world: World) {
    let bus = forgetful(&world);
    let (_, mut one) = subscribe(&bus, "n", once("one"), |_| Outcome::Done).await;
    let (_, mut two) = subscribe(&bus, "n", once("two"), |_| Outcome::Done).await;
    publish_event(&bus, with_key("1", "k")).await;
    one.next().await;
    two.next().await;
}

async fn a_deleted_group_remembers_nothing(world: World) {
    let bus = forgetful(&world);
    let (subscription, mut seen) = subscribe(&bus, "n", once("s"), |_| Outcome::Done).await;
    publish_event(&bus, with_key("1", "k")).await;
    seen.next().await;
    finished(&bus, "test/s").await;
    within(subscription.drain(DEADLINE)).await;
    assert!(bus.delete_group("test/s").await.unwrap());
    let (_, mut seen) = subscribe(&bus, "n", once("s"), |_| Outcome::Done).await;
    publish_event(&bus, with_key("2", "k")).await;
    assert_eq!(payload(&seen.next().await), "2");
}

async fn a_broadcast_cannot_be_idempotent(_world: World) {
    for json in [r#"{"name":"s","broadcast":true,"idempotent":true}"#, r#"{"name":"s","idempotent_retention_ms":5}"#] {
        let error = SubscribeOptions::from_json(json, Default::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidConfig, "{error}");
    }
}

async fn a_key_is_published_once(world: World) {
    let (bus, other) = (world.bus(), world.bus());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    let event = with_key("1", "k");
    let first = publish_event(&bus, event.clone()).await;
    assert!(!first.duplicate && first.id == event.meta.id && first.position.is_some());
    // The same event again, as after a `PublishUnknown`; and another one that means the same.
    for again in [event, with_key("2", "k")] {
        assert_eq!(publish_event(&other, again).await, Receipt { duplicate: true, ..first.clone() });
    }
    // A batch stores the rest of it, and knows its own.
    let batch = [with_key("3", "k"), event_of("4"), with_key("5", "new"), with_key("6", "new")];
    let ids: Vec<_> = batch.iter().map(|event| event.meta.id.clone()).collect();
    let receipts = bus.publish(batch.map(outgoing).into()).await.unwrap();
    let expected = [(&first.id, true), (&ids[1], false), (&ids[2], false), (&ids[2], true)];
    assert_eq!(receipts.iter().map(|receipt| (&receipt.id, receipt.duplicate)).collect::<Vec<_>>(), expected);
    let mut handled: Vec<_> = seen.take(3).await.iter().map(payload).collect();
    handled.sort_unstable();
    assert_eq!(handled, ["1", "4", "5"]);
    finished(&bus, "test/all").await;
    assert!(seen.is_empty());
    assert_eq!((bus.publish_counts(), bus.publish_duplicates()), ((3, 0), 2));
}

fn event_of(payload: &str) -> Event {
    event("n", payload)
}

async fn a_delayed_event_is_published_once(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "n", "all").await;
    let later = |payload| Outgoing { delay: Some(Duration::from_millis(300)), ..outgoing(with_key(payload, "k")) };
    let first = bus.publish(vec![later("1")]).await.unwrap().remove(0);
    assert!(!first.duplicate && first.position.is_none());
    let second = bus.publish(vec![later("2")]).await.unwrap().remove(0);
    assert_eq!(second, Receipt { duplicate: true, ..first.clone() });
    assert_eq!(publish_event(&bus, with_key("3", "k")).await, second);
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, "test/all").await;
    assert!(seen.is_empty());
}

async fn one_of_eight_publishers_wins(world: World) {
    let buses: Vec<_> = (0..8).map(|_| world.bus()).collect();
    let (_, mut seen) = listen(&buses[0], "n", "all").await;
    for bus in &buses {
        bus.start().await.unwrap();
    }
    for round in 0..10 {
        let publishing = buses.iter().enumerate().map(|(number, bus)| {
            let (bus, event) = (bus.clone(), with_key(&format!("{number}"), &format!("round {round}")));
            tokio::spawn(async move { publish_event(&bus, event).await })
        });
        let mut receipts = Vec::new();
        for published in publishing.collect::<Vec<_>>() {
            receipts.push(within(published).await.unwrap());
        }
        assert_eq!(receipts.iter().filter(|receipt| !receipt.duplicate).count(), 1, "{receipts:?}");
        assert!(receipts.iter().all(|receipt| receipt.id == receipts[0].id), "{receipts:?}");
        assert_eq!(seen.next().await.event.meta.id, receipts[0].id);
    }
    finished(&buses[0], "test/all").await;
    assert!(seen.is_empty());
}

async fn the_window_passes(world: World) {
    let window = Some(Duration::from_millis(30));
    let bus = world.bus_with(BusOptions { idempotency_window: window, ..BusOptions::new("test") });
    publish_event(&bus, with_key("1", "k")).await;
    eventually("it is stored again", || async { Ok(!publish_event(&bus, with_key("1", "k")).await.duplicate) }).await;
}

async fn without_a_window_everything_is_stored(world: World) {
    let bus = forgetful(&world);
    let (_, mut seen) = listen(&bus, "n", "all").await;
    for _ in 0..2 {
        assert!(!publish_event(&bus, with_key("1", "k")).await.duplicate);
    }
    seen.take(2).await;
}

async fn buses_remember_for_themselves(world: World) {
    for name in ["one", "two"] {
        let bus = world.bus_with(BusOptions { bus: name.into(), ..BusOptions::new("test") });
        assert!(!publish_event(&bus, with_key("1", "k")).await.duplicate);
    }
}
