//! Groups that keep order: events of one key one at a time, whoever handles them and whatever happens to them.
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::delivery::{DeadReason, Failure};
use polybus_core::handler::{Job, Outcome};
use polybus_core::history::{HistoryFilter, Status};
use polybus_core::options::{HistoryQuery, ReplayOptions};
use polybus_core::transport::{Outgoing, Start};
use polybus_core::{Bus, BusOptions, ErrorKind, Event, Pattern, Replay, SubscribeOptions};
use tokio::sync::Semaphore;

crate::behaviours![
    many_members_keep_the_order_of_each_key: ordered,
    members_come_and_go_in_order: ordered,
    a_failing_key_holds_up_no_other: ordered,
    a_key_goes_on_after_a_dead_letter: ordered + dead_letters,
    a_replayed_event_takes_its_place: ordered + dead_letters,
    a_replay_of_the_log_takes_its_place: ordered + dead_letters + history,
    events_without_a_key_run_at_once: ordered,
    a_dead_holder_lets_nothing_overtake: ordered + cross_process,
    what_is_given_back_keeps_its_place: ordered,
    prefetch_holds_one_of_a_key: ordered,
    a_delayed_event_takes_its_place_when_due: ordered + delayed_publish,
    what_expires_in_its_lane_is_skipped: ordered + delayed_publish,
    what_expires_in_its_lane_can_become_a_dead_letter: ordered + delayed_publish + dead_letters,
    what_the_pattern_does_not_want_holds_up_nothing: ordered,
    a_paused_member_leaves_its_keys_to_others: ordered,
    another_order_is_refused: ordered,
    a_broadcast_has_no_order: broadcast,
    no_order_where_there_is_none_to_keep,
];

fn options() -> SubscribeOptions {
    SubscribeOptions { ordered: true, start: Start::Beginning, ..SubscribeOptions::new("s") }
}

fn keyed(event_type: &str, key: &str, number: usize) -> Event {
    let meta = format!("{{\"partitionKey\":\"{key}\"}}");
    new_event(event_type, number.to_string().into(), Some(meta.as_bytes()), 1 << 20).unwrap()
}

async fn publish_keyed(bus: &Bus, key: &str, numbers: impl IntoIterator<Item = usize>) {
    let events = numbers.into_iter().map(|number| outgoing(keyed("n", key, number))).collect();
    bus.publish(events).await.unwrap();
}

/// `count` events of each key, in turns.
async fn publish_all(bus: &Bus, keys: usize, count: usize) {
    for number in 0..count {
        bus.publish((0..keys).map(|key| outgoing(keyed("n", &format!("k{key}"), number))).collect()).await.unwrap();
    }
}

fn facts(job: &Job) -> (String, usize) {
    (job.event.meta.partition_key.as_deref().unwrap_or_default().to_owned(), payload(job).parse().unwrap())
}

/// What handlers of all members do, seen together.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Keys>>);

#[derive(Default)]
struct Keys {
    /// The number that is next, and whether one runs.
    lanes: HashMap<String, (usize, bool)>,
    wrong: Vec<String>,
    done: usize,
}

/// A handler at work; also ended by being dropped.
struct Running(Log, String);

impl Log {
    fn begin(&self, job: &Job) -> Running {
        let (key, number) = facts(job);
        let mut keys = self.0.lock().unwrap();
        let (next, busy) = keys.lanes.entry(key.clone()).or_default();
        let (wanted, was_busy) = (*next, std::mem::replace(busy, true));
        if was_busy || number != wanted {
            keys.wrong.push(format!("{key}: {number} instead of {wanted}, at once: {was_busy}"));
        }
        Running(self.clone(), key)
    }

    fn done(&self) -> usize {
        self.0.lock().unwrap().done
    }

    fn assert_in_order(&self) {
        let keys = self.0.lock().unwrap();
        assert!(keys.wrong.is_empty(), "{:#?}", keys.wrong);
    }
}

impl Running {
    fn done(&self) {
        let mut keys = self.0.0.lock().unwrap();
        keys.done += 1;
        keys.lanes.get_mut(&self.1).unwrap().0 += 1;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().lanes.get_mut(&self.1).unwrap().1 = false;
    }
}

/// Joins the group with a handler that fails now and then.
async fn join(bus: &Bus, log: &Log, failing: f64) -> Seen {
    let log = log.clone();
    let options = SubscribeOptions { retry: Some(quick(1000)), concurrency: Some(8), prefetch: 4, ..options() };
    let (_, seen) = attend(bus, "n", options, move |job| {
        let running = log.begin(job);
        async move {
            for _ in 0..fastrand::usize(..20) {
                tokio::task::yield_now().await;
            }
            if fastrand::f64() < failing {
                return failed();
            }
            running.done();
            Outcome::Done
        }
    })
    .await;
    seen
}

async fn all_done(log: &Log, count: usize) {
    eventually("all are handled", || async { Ok(log.done() >= count) }).await;
    log.assert_in_order();
}

/// W5, W9.
async fn many_members_keep_the_order_of_each_key(world: World) {
    let (log, buses) = (Log::default(), [world.bus(), world.bus(), world.bus()]);
    publish_all(&buses[0], 20, 10).await;
    let mut seen = Vec::new();
    for bus in &buses {
        seen.push(join(bus, &log, 0.2).await);
    }
    for number in 10..30 {
        buses[number % 3]
            .publish((0..20).map(|key| outgoing(keyed("n", &format!("k{key}"), number))).collect())
            .await
            .unwrap();
    }
    all_done(&log, 20 * 30).await;
    finished(&buses[0], "test/s").await;
    assert_eq!(log.done(), 20 * 30);
    assert!(seen.iter().all(|seen| !seen.is_empty()), "one member did everything");
}

/// Closing in the middle gives back what waits, in its place.
async fn members_come_and_go_in_order(world: World) {
    let (log, keeper) = (Log::default(), world.bus());
    publish_all(&keeper, 10, 40).await;
    let _seen = join(&keeper, &log, 0.1).await;
    while log.done() < 400 {
        let before = log.done();
        let guest = world.bus();
        let _seen = join(&guest, &log, 0.1).await;
        eventually("somebody goes on", || async { Ok(log.done() >= (before + 25).min(400)) }).await;
        guest.close(DEADLINE).await;
    }
    all_done(&log, 400).await;
    finished(&keeper, "test/s").await;
    assert_eq!(log.done(), 400);
}

async fn a_failing_key_holds_up_no_other(world: World) {
    let (bus, other) = (world.bus(), world.bus());
    publish_keyed(&bus, "bad", 0..20).await;
    publish_keyed(&bus, "good", 0..20).await;
    let say = |job: &Job| match facts(job).0.as_str() {
        "bad" => Outcome::RetryAfter(Duration::from_secs(3600), Failure::new("Trouble", "for an hour", "")),
        _ => Outcome::Done,
    };
    let few = || SubscribeOptions { concurrency: Some(2), ..options() };
    let (_, mut seen) = subscribe(&bus, "n", few(), say).await;
    let (_, mut there) = subscribe(&other, "n", few(), say).await;
    eventually("only the failing key is left", || async {
        let stats = bus.group_stats("test/s").await?;
        Ok((stats.lag, stats.in_flight, stats.retrying) == (19, 0, 1))
    })
    .await;
    let (mut good, mut bad) = (0, 0);
    for seen in [&mut seen, &mut there] {
        while !seen.is_empty() {
            let job = seen.next().await;
            if facts(&job).0 == "good" { good += 1 } else { bad += 1 }
        }
    }
    assert_eq!((good, bad), (20, 1));
}

async fn a_key_goes_on_after_a_dead_letter(world: World) {
    let bus = world.bus();
    publish_keyed(&bus, "k", 0..4).await;
    let (_, mut seen) = subscribe(&bus, "n", options(), |job| match facts(job).1 {
        0 => Outcome::Rejected(Failure::new("Reject", "no", "")),
        1 => failed(),
        _ => Outcome::Done,
    })
    .await;
    let numbers: Vec<_> = seen.take(7).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [0, 1, 1, 1, 1, 2, 3]);
    finished(&bus, "test/s").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 2);
    publish_keyed(&bus, "k", 4..5).await;
    assert_eq!(facts(&seen.next().await).1, 4);
}

/// A handler that the test lets go.
async fn gated(
    bus: &Bus,
    pattern: &str,
    options: SubscribeOptions,
) -> (polybus_core::Subscription, Seen, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let pass = gate.clone();
    let (subscription, seen) = attend(bus, pattern, options, move |job| {
        let (pass, reject) = (pass.clone(), payload(job) == "0" && job.attempt == 1 && !job.redelivered);
        async move {
            pass.acquire().await.unwrap().forget();
            if reject { Outcome::Rejected(Failure::new("Reject", "once", "")) } else { Outcome::Done }
        }
    })
    .await;
    (subscription, seen, gate)
}

/// Behind what is active, before what was published later.
async fn a_replayed_event_takes_its_place(world: World) {
    let bus = world.bus();
    let (_, mut seen, gate) = gated(&bus, "n", options()).await;
    publish_keyed(&bus, "k", 0..4).await;
    assert_eq!(facts(&seen.next().await).1, 0);
    gate.add_permits(1);
    assert_eq!(facts(&seen.next().await).1, 1);
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    gate.add_permits(3);
    let numbers: Vec<_> = seen.take(3).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [0, 2, 3]);
    gate.add_permits(1);
    finished(&bus, "test/s").await;
    // Into an empty lane.
    publish_keyed(&bus, "l", 0..1).await;
    seen.next().await;
    gate.add_permits(1);
    eventually("it is dead", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    assert_eq!(facts(&seen.next().await), ("l".to_owned(), 0));
    publish_keyed(&bus, "l", 1..2).await;
    gate.add_permits(2);
    assert_eq!(facts(&seen.next().await), ("l".to_owned(), 1));
}

/// As a replayed dead letter: behind what is active, before what was published later; and not beside the letter.
async fn a_replay_of_the_log_takes_its_place(world: World) {
    let bus = world.bus();
    let again = async || {
        let replay = Replay::new(bus.clone(), ReplayOptions::new("test/s")).unwrap();
        within(replay.run(|_| ())).await.unwrap().count
    };
    let (_, mut seen, gate) = gated(&bus, "n", options()).await;
    publish_keyed(&bus, "k", 0..4).await;
    assert_eq!(facts(&seen.next().await).1, 0);
    gate.add_permits(1);
    assert_eq!(facts(&seen.next().await).1, 1);
    eventually("it is dead", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    assert_eq!(again().await, 1, "the others wait already, or are handled");
    assert_eq!(again().await, 0, "all wait, or are handled");
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 0, "it waits already");
    let query = HistoryQuery { filter: HistoryFilter::default(), after: None, limit: 10, records: true };
    let entries = bus.history(query).await.unwrap();
    let statuses = entries.iter().map(|entry| entry.records.as_ref().unwrap()[0].status);
    let statuses: Vec<_> = statuses.collect();
    assert_eq!(statuses, [Status::Pending, Status::Processing, Status::Pending, Status::Pending]);
    gate.add_permits(4);
    let jobs = seen.take(3).await;
    assert_eq!(jobs.iter().map(|job| (facts(job).1, job.attempt)).collect::<Vec<_>>(), [(0, 1), (2, 1), (3, 1)]);
    assert!(jobs[0].redelivered);
    finished(&bus, "test/s").await;
    // Into empty lanes, several keys.
    publish_keyed(&bus, "l", 1..4).await;
    gate.add_permits(3);
    seen.take(3).await;
    finished(&bus, "test/s").await;
    assert_eq!(again().await, 7);
    gate.add_permits(7);
    let jobs = seen.take(7).await;
    let (k, l): (Vec<_>, Vec<_>) = jobs.iter().map(facts).partition(|(key, _)| key == "k");
    let numbers = |found: Vec<(String, usize)>| found.into_iter().map(|(_, number)| number).collect::<Vec<_>>();
    assert_eq!((numbers(k), numbers(l)), (vec![0, 1, 2, 3], vec![1, 2, 3]));
    finished(&bus, "test/s").await;
    publish_keyed(&bus, "k", 4..5).await;
    gate.add_permits(1);
    assert_eq!(facts(&seen.next().await), ("k".to_owned(), 4));
}

async fn events_without_a_key_run_at_once(world: World) {
    let bus = world.bus();
    let (_, mut seen, gate) = gated(&bus, "n", options()).await;
    publish_numbers(&bus, "n", 4).await;
    publish_keyed(&bus, "", 4..8).await; // an empty key is none
    seen.take(8).await; // all are there, and none was let go
    gate.add_permits(8);
    finished(&bus, "test/s").await;
}

/// X1 for keys: leased and never settled.
async fn a_dead_holder_lets_nothing_overtake(world: World) {
    let bus = world.bus_with(BusOptions { lease: Duration::from_secs(1), ..BusOptions::new("test") });
    publish_keyed(&bus, "k", 0..3).await;
    publish_keyed(&bus, "l", 0..1).await;
    let transport = world.transport().await;
    let holder = transport.subscribe(world.spec("n", "s", true)).await.unwrap();
    let held = within(holder.take(1)).await.unwrap();
    assert_eq!(held.len(), 1);
    let (_, mut seen) = subscribe(&bus, "n", options(), |_| Outcome::Done).await;
    assert_eq!(facts(&seen.next().await).0, "l");
    let jobs = seen.take(3).await;
    assert_eq!(jobs.iter().map(|job| (facts(job).1, job.attempt)).collect::<Vec<_>>(), [(0, 2), (1, 1), (2, 1)]);
    finished(&bus, "test/s").await;
    // It comes too late, and lets nobody go a second time.
    let late =
        polybus_core::transport::Settlement { lease: held[0].lease, verdict: polybus_core::delivery::Verdict::Ack };
    assert_eq!(holder.settle(vec![late]).await.unwrap().len(), 1);
    transport.close().await;
}

async fn what_is_given_back_keeps_its_place(world: World) {
    let (first, second) = (world.bus(), world.bus());
    second.start().await.unwrap();
    publish_keyed(&first, "k", 1..4).await;
    let (_, mut seen, _gate) = gated(&first, "n", options()).await;
    assert_eq!(facts(&seen.next().await).1, 1);
    let (_, mut there) = subscribe(&second, "n", options(), |_| Outcome::Done).await;
    first.close(Duration::ZERO).await;
    let jobs = there.take(3).await;
    assert_eq!(jobs.iter().map(|job| (facts(job).1, job.attempt)).collect::<Vec<_>>(), [(1, 1), (2, 1), (3, 1)]);
    assert!(seen.is_empty());
}

async fn prefetch_holds_one_of_a_key(world: World) {
    let bus = world.bus();
    publish_keyed(&bus, "k", 1..6).await;
    publish_keyed(&bus, "l", 1..6).await;
    let options = SubscribeOptions { concurrency: Some(1), prefetch: 20, ..options() };
    let (_, mut seen, gate) = gated(&bus, "n", options).await;
    seen.next().await;
    eventually("it holds one of each key", || async {
        let stats = bus.group_stats("test/s").await?;
        assert!(stats.in_flight <= 2, "{stats:?}");
        Ok((stats.lag, stats.in_flight, stats.retrying) == (8, 2, 0))
    })
    .await;
    gate.add_permits(10);
    finished(&bus, "test/s").await;
}

async fn a_delayed_event_takes_its_place_when_due(world: World) {
    let bus = world.bus();
    let (_, mut seen) = subscribe(&bus, "n", options(), |_| Outcome::Done).await;
    let late = Outgoing { delay: Some(Duration::from_millis(100)), ..outgoing(keyed("n", "k", 2)) };
    bus.publish(vec![late, outgoing(keyed("n", "k", 0)), outgoing(keyed("n", "k", 1))]).await.unwrap();
    let numbers: Vec<_> = seen.take(3).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [0, 1, 2]);
}

async fn what_expires_in_its_lane_is_skipped(world: World) {
    let bus = world.bus();
    let (_, mut seen, gate) = gated(&bus, "n", options()).await;
    publish_keyed(&bus, "k", 1..2).await;
    seen.next().await;
    let soon = |number| Outgoing { expires_in: Some(Duration::from_millis(20)), ..outgoing(keyed("n", "k", number)) };
    bus.publish(vec![soon(2), soon(3), outgoing(keyed("n", "k", 4)), soon(5)]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await; // time itself is what is waited for
    gate.add_permits(9);
    assert_eq!(facts(&seen.next().await).1, 4);
    finished(&bus, "test/s").await;
    assert_eq!(bus.group_stats("test/s").await.unwrap().expired, 3);
    publish_keyed(&bus, "k", 6..7).await;
    assert_eq!(facts(&seen.next().await).1, 6);
}

async fn what_expires_in_its_lane_can_become_a_dead_letter(world: World) {
    let bus = world.bus();
    let (_, mut seen, gate) = gated(&bus, "n", SubscribeOptions { dead_letter_expired: true, ..options() }).await;
    publish_keyed(&bus, "k", 1..2).await;
    seen.next().await;
    let soon = |number| Outgoing { expires_in: Some(Duration::from_millis(20)), ..outgoing(keyed("n", "k", number)) };
    bus.publish(vec![soon(2), soon(3), outgoing(keyed("n", "k", 4)), soon(5)]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await; // time itself is what is waited for
    gate.add_permits(2);
    assert_eq!(facts(&seen.next().await).1, 4);
    eventually("they are dead", || async { Ok(bus.dead_count(Default::default()).await? == 3) }).await;
    for letter in bus.dead_letters(Default::default(), None, 9).await.unwrap() {
        assert_eq!((letter.reason, letter.attempts), (DeadReason::Expired, 0));
    }
    finished(&bus, "test/s").await;
    assert_eq!(bus.group_stats("test/s").await.unwrap().expired, 0);
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 3);
    gate.add_permits(3);
    let numbers: Vec<_> = seen.take(3).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [2, 3, 5]);
}

async fn what_the_pattern_does_not_want_holds_up_nothing(world: World) {
    let bus = world.bus();
    let (_, mut seen, gate) = gated(&bus, "n", options()).await;
    publish_keyed(&bus, "k", 1..2).await;
    seen.next().await;
    let batch = [("other", 2), ("n", 3), ("other", 4), ("n", 5)];
    bus.publish(batch.map(|(kind, number)| outgoing(keyed(kind, "k", number))).into()).await.unwrap();
    gate.add_permits(9);
    let numbers: Vec<_> = seen.take(2).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [3, 5]);
    finished(&bus, "test/s").await;
    // A newer subscriber's pattern wants them.
    let next = world.bus();
    let (_, _seen, more) = gated(&next, "{n,other}", options()).await;
    more.add_permits(99);
    gate.add_permits(99);
    bus.publish(batch.map(|(kind, number)| outgoing(keyed(kind, "k", number))).into()).await.unwrap();
    finished(&bus, "test/s").await;
    assert!(Pattern::new("{n,other}").is_ok());
}

async fn a_paused_member_leaves_its_keys_to_others(world: World) {
    let (first, second) = (world.bus(), world.bus());
    publish_keyed(&first, "k", 1..3).await;
    let (subscription, mut seen, gate) = gated(&first, "n", options()).await;
    assert_eq!(facts(&seen.next().await).1, 1);
    let (_, mut there) = subscribe(&second, "n", options(), |_| Outcome::Done).await;
    subscription.pause();
    gate.add_permits(1);
    assert_eq!(facts(&there.next().await).1, 2);
}

async fn another_order_is_refused(world: World) {
    let (bus, other) = (world.bus(), world.bus());
    let (_, mut seen, _gate) = gated(&bus, "n", options()).await;
    publish_keyed(&bus, "k", 1..5).await;
    seen.next().await;
    let subscribe_as = async |ordered| {
        let options = SubscribeOptions { ordered, ..options() };
        let handler = polybus_core::handler::from_fn(|_| std::future::ready(Outcome::Done));
        other.subscribe("n", handler, options).await
    };
    let refused = subscribe_as(false).await.err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::InvalidConfig);
    bus.close(Duration::ZERO).await;
    assert_eq!(subscribe_as(false).await.err().unwrap().kind(), ErrorKind::InvalidConfig);
    // Deleted, with what waited in its lanes, it may be made in either way.
    assert!(other.delete_group("test/s").await.unwrap());
    let made = subscribe_as(false).await.unwrap();
    assert_eq!(subscribe_as(true).await.err().unwrap().kind(), ErrorKind::DuplicateSubscription);
    made.drain(DEADLINE).await;
    assert_eq!(subscribe_as(true).await.err().unwrap().kind(), ErrorKind::InvalidConfig);
    assert!(other.delete_group("test/s").await.unwrap());
    let (_, mut again) =
        subscribe(&other, "n", SubscribeOptions { start: Start::New, ..options() }, |_| Outcome::Done).await;
    publish_keyed(&other, "k", 7..9).await;
    let numbers: Vec<_> = again.take(2).await.iter().map(|job| facts(job).1).collect();
    assert_eq!(numbers, [7, 8]);
}

async fn a_broadcast_has_no_order(world: World) {
    let bus = world.bus();
    let options = SubscribeOptions { ordered: true, broadcast: true, ..SubscribeOptions::new("s") };
    let handler = polybus_core::handler::from_fn(|_| std::future::ready(Outcome::Done));
    assert_eq!(bus.subscribe("n", handler, options).await.err().unwrap().kind(), ErrorKind::InvalidConfig);
}

/// A transport without groups says so.
async fn no_order_where_there_is_none_to_keep(world: World) {
    let bus = world.bus();
    let handler = polybus_core::handler::from_fn(|_| std::future::ready(Outcome::Done));
    let subscribed = bus.subscribe("n", handler, options()).await;
    match bus.capabilities().await.unwrap().ordered {
        true => drop(subscribed.unwrap()),
        false => assert_eq!(subscribed.err().unwrap().kind(), ErrorKind::Unsupported),
    }
}
