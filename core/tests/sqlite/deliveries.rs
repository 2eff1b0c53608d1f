//! The life of a delivery, on one file in one process.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use polybus_core::ErrorKind;
use polybus_core::dead_letter::DeadLetterFilter;
use polybus_core::delivery::{DeadReason, Failure, Verdict};
use polybus_core::transport::{Outgoing, Receipt, Settings, Start, Transport};

use crate::support::*;

fn retry(after: Duration) -> Verdict {
    Verdict::Retry { after, failure: Failure::new("ValueError", "no stock", "line 1") }
}

fn bury() -> Verdict {
    Verdict::DeadLetter { reason: DeadReason::Rejected, failure: Failure::new("ValueError", "no stock", "line 1") }
}

fn positions(receipts: &[Receipt]) -> Vec<u64> {
    receipts.iter().map(|receipt| receipt.position.as_ref().unwrap().parse().unwrap()).collect()
}

#[tokio::test]
async fn events_arrive_in_order_once_for_each_group() {
    let place = place();
    let bus = open(&place.path).await;
    let (one, two) = (bus.subscribe(spec("one")).await.unwrap(), bus.subscribe(spec("two")).await.unwrap());
    let receipts = publish(&bus, 0..250).await;
    assert!(positions(&receipts).is_sorted_by(|a, b| a < b));
    for source in [&one, &two] {
        let taken = take_all(source, 250).await;
        assert_eq!(numbers(&taken), (0..250).collect::<Vec<_>>());
        assert!(taken.iter().all(|delivery| delivery.attempt == 1 && !delivery.redelivered));
        assert_eq!(settle(source, &taken, Verdict::Ack).await, 0);
    }
    let stats = bus.group_stats("one".into()).await.unwrap();
    assert_eq!((stats.lag, stats.in_flight, stats.retrying, stats.oldest), (0, 0, 0, None));
    bus.close().await;
}

#[tokio::test]
async fn a_waiting_take_is_woken_by_a_publish() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    let waiting = {
        tokio::spawn({
            let source = source.clone();
            async move { take(&source, 10).await }
        })
    };
    tokio::task::yield_now().await;
    publish(&bus, 7..8).await;
    assert_eq!(numbers(&waiting.await.unwrap()), [7]);
    bus.close().await;
}

#[tokio::test]
async fn a_settled_lease_cannot_be_settled_again() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..3).await;
    let taken = take_all(&source, 3).await;
    assert_eq!(settle(&source, &taken[..2], Verdict::Ack).await, 0);
    assert_eq!(settle(&source, &taken, Verdict::Ack).await, 2, "the third was still ours");
    bus.close().await;
}

#[tokio::test]
async fn a_retry_comes_back_when_due_and_counts() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..1).await;
    let first = take(&source, 1).await;
    let before = SystemTime::now();
    assert_eq!(settle(&source, &first, retry(Duration::from_millis(300))).await, 0);
    assert_eq!(bus.group_stats("one".into()).await.unwrap().retrying, 1);
    let second = take(&source, 1).await;
    assert!(before.elapsed().unwrap() >= Duration::from_millis(290));
    assert_eq!((second[0].attempt, second[0].redelivered), (2, true));
    assert!(second[0].first_failed_at.unwrap() >= before - Duration::from_millis(2));
    assert_ne!(first[0].lease.token, second[0].lease.token);
    assert_eq!(settle(&source, &first, Verdict::Ack).await, 1, "a stale token is fenced off");
    assert_eq!(settle(&source, &second, Verdict::Ack).await, 0);
    bus.close().await;
}

#[tokio::test]
async fn a_release_comes_back_at_once_and_does_not_count() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..1).await;
    for _ in 0..3 {
        let taken = take(&source, 1).await;
        assert_eq!(taken[0].attempt, 1);
        settle(&source, &taken, Verdict::Release).await;
    }
    assert!(take(&source, 1).await[0].redelivered);
    bus.close().await;
}

#[tokio::test]
async fn closing_a_source_hands_back_what_it_holds() {
    let place = place();
    let bus = open(&place.path).await;
    let (one, other) = (bus.subscribe(spec("one")).await.unwrap(), bus.subscribe(spec("one")).await.unwrap());
    publish(&bus, 0..5).await;
    let held = take_all(&one, 5).await;
    let waiting = tokio::spawn({
        let one = one.clone();
        async move { one.take(1).await }
    });
    tokio::task::yield_now().await;
    one.close().await;
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::BusClosed);
    let taken = take_all(&other, 5).await;
    assert!(taken.iter().all(|delivery| delivery.attempt == 1 && delivery.redelivered));
    assert_eq!(settle(&one, &held, Verdict::Ack).await, 5);
    assert_eq!(one.take(1).await.unwrap_err().kind(), ErrorKind::BusClosed);
    one.close().await;
    bus.close().await;
    bus.close().await;
    assert_eq!(bus.publish(vec![outgoing(1)], PATIENCE).await.unwrap_err().kind(), ErrorKind::BusClosed);
}

#[tokio::test]
async fn a_dropped_take_loses_nothing() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    for round in 0..50 {
        publish(&bus, round..round + 1).await;
        // Polled once, so that the claim is queued, then dropped, unless the writer was quicker than this thread.
        let mut pending = source.take(1);
        let taken = match poll_once(&mut pending) {
            Some(taken) => taken.unwrap(),
            None => {
                drop(pending);
                take(&source, 1).await
            }
        };
        assert_eq!(numbers(&taken), [round]);
        assert_eq!(settle(&source, &taken, Verdict::Ack).await, 0);
    }
    bus.close().await;
}

fn poll_once<T>(task: &mut polybus_core::transport::Task<T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match task.as_mut().poll(&mut context) {
        std::task::Poll::Ready(done) => Some(done),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test]
async fn what_a_stopped_member_held_is_delivered_again_within_two_leases() {
    let place = place();
    let bus = open(&place.path).await;
    let lease = Duration::from_millis(400);
    let short = || polybus_core::transport::GroupSpec { lease, ..spec("one") };
    let (dies, lives) = (bus.subscribe(short()).await.unwrap(), bus.subscribe(short()).await.unwrap());
    publish(&bus, 0..4).await;
    let held = take_all(&dies, 4).await;
    let died = std::time::Instant::now();
    let taken = take_all(&lives, 4).await;
    assert!(died.elapsed() < 2 * lease, "{:?}", died.elapsed());
    assert!(taken.iter().all(|delivery| delivery.attempt == 2 && delivery.redelivered));
    assert_eq!(settle(&dies, &held, Verdict::Ack).await, 4, "its tokens are void");
    assert_eq!(dies.heartbeat(held.iter().map(|d| d.lease).collect()).await.unwrap().len(), 4);
    assert_eq!(settle(&lives, &taken, Verdict::Ack).await, 0);
    bus.close().await;
}

#[tokio::test]
async fn heartbeats_keep_what_is_held() {
    let place = place();
    let bus = open(&place.path).await;
    let lease = Duration::from_millis(300);
    let short = || polybus_core::transport::GroupSpec { lease, ..spec("one") };
    let (holds, waits) = (bus.subscribe(short()).await.unwrap(), bus.subscribe(short()).await.unwrap());
    publish(&bus, 0..1).await;
    let held = take(&holds, 1).await;
    let leases: Vec<_> = held.iter().map(|delivery| delivery.lease).collect();
    let other = tokio::spawn({
        let waits = waits.clone();
        async move { waits.take(1).await }
    });
    for _ in 0..10 {
        tokio::time::sleep(lease / 4).await;
        assert!(holds.heartbeat(leases.clone()).await.unwrap().is_empty());
    }
    assert!(!other.is_finished());
    assert_eq!(settle(&holds, &held, Verdict::Ack).await, 0);
    bus.close().await;
}

#[tokio::test]
async fn new_groups_begin_where_they_ask() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..3).await;
    tokio::time::sleep(Duration::from_millis(5)).await; // so that the two batches have different times
    let middle = SystemTime::now();
    publish(&bus, 3..6).await;
    let at = |group: &str, start| polybus_core::transport::GroupSpec { start, ..spec(group) };
    let new = bus.subscribe(at("new", Start::New)).await.unwrap();
    let all = bus.subscribe(at("all", Start::Beginning)).await.unwrap();
    let some = bus.subscribe(at("some", Start::At(middle))).await.unwrap();
    publish(&bus, 6..7).await;
    assert_eq!(numbers(&take_all(&new, 1).await), [6]);
    assert_eq!(numbers(&take_all(&all, 7).await), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(numbers(&take_all(&some, 4).await), [3, 4, 5, 6]);
    // An existing group keeps its place, whatever is asked.
    new.close().await;
    let again = bus.subscribe(at("new", Start::Beginning)).await.unwrap();
    assert_eq!(numbers(&take_all(&again, 1).await), [6]);
    assert!(is_idle(&again).await);
    bus.close().await;
}

#[tokio::test]
async fn a_group_that_matches_nothing_does_not_hold_back_the_cursor() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    let other = |n: usize| Outgoing { event: event_of("user.created", &n.to_string()), delay: None, expires_in: None };
    for batch in 0..5 {
        bus.publish((0..500).map(|n| other(batch * 500 + n)).collect(), PATIENCE).await.unwrap();
    }
    assert!(is_idle(&source).await);
    publish(&bus, 1..2).await;
    assert_eq!(numbers(&take(&source, 5).await), [1]);
    assert_eq!(bus.group_stats("one".into()).await.unwrap().lag, 0);
    bus.close().await;
}

#[tokio::test]
async fn the_newest_pattern_is_the_groups() {
    let place = place();
    let bus = open(&place.path).await;
    let old = bus.subscribe(spec("one")).await.unwrap();
    let user = polybus_core::pattern::Pattern::new("user.created").unwrap();
    let new = bus.subscribe(polybus_core::transport::GroupSpec { pattern: user, ..spec("one") }).await.unwrap();
    new.close().await;
    publish(&bus, 0..1).await;
    bus.publish(vec![Outgoing { event: event_of("user.created", "5"), delay: None, expires_in: None }], PATIENCE)
        .await
        .unwrap();
    assert_eq!(numbers(&take(&old, 5).await), [5]);
    bus.close().await;
}

#[tokio::test]
async fn buses_in_one_file_do_not_see_each_other() {
    let place = place();
    let one = open(&place.path).await;
    let two = open_with(&place.path, Settings { bus: "two".into(), ..settings() }).await;
    let (of_one, of_two) = (one.subscribe(spec("g")).await.unwrap(), two.subscribe(spec("g")).await.unwrap());
    publish(&one, 1..2).await;
    publish(&two, 2..3).await;
    assert_eq!(numbers(&take(&of_one, 9).await), [1]);
    assert_eq!(numbers(&take(&of_two, 9).await), [2]);
    one.close().await;
    publish(&two, 3..4).await;
    assert_eq!(numbers(&take(&of_two, 9).await), [3]);
    two.close().await;
}

#[tokio::test]
async fn broadcast_reaches_every_source_and_settles_nothing() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..1).await;
    let broadcast = || polybus_core::transport::GroupSpec { broadcast: true, ..spec("ignored") };
    let (one, two) = (bus.subscribe(broadcast()).await.unwrap(), bus.subscribe(broadcast()).await.unwrap());
    publish(&bus, 1..4).await;
    for source in [&one, &two] {
        let taken = take_all(source, 3).await;
        assert_eq!(numbers(&taken), [1, 2, 3]);
        assert_eq!(settle(source, &taken, bury()).await, 0);
    }
    assert_eq!(bus.dead_count(DeadLetterFilter::default()).await.unwrap(), 0);
    assert_eq!(bus.group_stats("ignored".into()).await.unwrap_err().kind(), ErrorKind::NotFound);
    one.close().await;
    assert_eq!(one.take(1).await.unwrap_err().kind(), ErrorKind::BusClosed);
    bus.close().await;
}

#[tokio::test]
async fn dead_letters_are_listed_replayed_and_purged() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..5).await;
    let taken = take_all(&source, 5).await;
    assert_eq!(settle(&source, &taken, bury()).await, 0);
    let all = bus.dead_letters(DeadLetterFilter::default(), None, 100).await.unwrap();
    assert_eq!(all.len(), 5);
    let letter = &all[0];
    assert_eq!((&*letter.group, &*letter.subscription, letter.attempts), ("one", "on-order", 1));
    assert_eq!((letter.reason, letter.error.message.as_str()), (DeadReason::Rejected, "no stock"));
    assert_eq!(&letter.event.as_ref().unwrap().payload[..], b"0");
    let page = bus.dead_letters(DeadLetterFilter::default(), Some(all[1].id.clone()), 2).await.unwrap();
    assert_eq!(page.iter().map(|letter| letter.id.clone()).collect::<Vec<_>>(), [all[2].id.clone(), all[3].id.clone()]);

    let by_id = |id: &polybus_core::event::Text| DeadLetterFilter { id: Some(id.clone()), ..Default::default() };
    assert_eq!(bus.dead_replay(by_id(&letter.id)).await.unwrap(), 1);
    assert_eq!(bus.dead_replay(by_id(&letter.id)).await.unwrap(), 0, "only once");
    assert_eq!(bus.dead_replay(by_id(&"no such id".into())).await.unwrap(), 0);
    let again = take(&source, 5).await;
    assert_eq!((numbers(&again), again[0].attempt), (vec![0], 1));
    assert_eq!(settle(&source, &again, bury()).await, 0);
    let newest = bus.dead_letters(DeadLetterFilter::default(), Some(all[4].id.clone()), 9).await.unwrap();
    assert_eq!(newest[0].replayed_from.as_ref(), Some(&letter.id));

    let pattern = polybus_core::pattern::Pattern::new(TYPE).unwrap();
    let typed = DeadLetterFilter { pattern: Some(pattern), ..Default::default() };
    assert_eq!(bus.dead_count(typed).await.unwrap(), 5);
    let other = DeadLetterFilter { group: Some("other".into()), ..Default::default() };
    assert_eq!(bus.dead_purge(other).await.unwrap(), 0);
    assert_eq!(bus.dead_replay(DeadLetterFilter::default()).await.unwrap(), 5);
    settle(&source, &take_all(&source, 5).await, bury()).await;
    assert_eq!(bus.dead_purge(DeadLetterFilter::default()).await.unwrap(), 5);
    assert_eq!(bus.dead_count(DeadLetterFilter::default()).await.unwrap(), 0);
    bus.close().await;
}

#[tokio::test]
async fn a_deleted_group_is_gone_for_its_members_too() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..2).await;
    let taken = take_all(&source, 2).await;
    assert!(bus.delete_group("one".into()).await.unwrap());
    assert!(!bus.delete_group("one".into()).await.unwrap());
    assert_eq!(settle(&source, &taken, Verdict::Ack).await, 2);
    let ended = tokio::time::timeout(PATIENCE, source.take(1)).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::NotFound);
    bus.close().await;
}

#[tokio::test]
async fn many_publishers_at_once_all_succeed() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    let tasks: Vec<_> = (0..64)
        .map(|task| {
            let bus: Arc<dyn Transport> = bus.clone();
            tokio::spawn(async move {
                for n in 0..10 {
                    publish(&bus, task * 10 + n..task * 10 + n + 1).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let mut seen = numbers(&take_all(&source, 640).await);
    seen.sort_unstable();
    assert_eq!(seen, (0..640).collect::<Vec<_>>());
    bus.close().await;
}
