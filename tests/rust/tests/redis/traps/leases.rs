//! Who may end a delivery: only its owner, and only as long as it is that.

use std::time::Duration;

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::dead_letter::DeadLetterFilter;
use polybus_core::delivery::Failure;
use polybus_core::handler::Outcome;

use super::*;

fn refused() -> Outcome {
    Outcome::Rejected(Failure::new("Trouble", "as the test wants", ""))
}

/// In its first attempt, which the server's pending list knows, or in its second, which lies in the group's own store.
async fn a_long_handler_keeps_its_lease(attempt: u32) {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let gate = Gate::new();
    let (first, mut seen) = wait_at(&gate, &one, one_by_one("mail"), failed).await;
    publish(&one, "order.created", "1").await;
    gate.open(attempt as usize - 1);
    assert_eq!(seen.take(attempt as usize).await.last().unwrap().attempt, attempt);
    let (_second, other) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    tokio::time::sleep(LEASE * 4).await; // what is tested
    assert!(other.is_empty() && seen.is_empty());
    assert_eq!(two.group_stats(MAIL).await.unwrap().in_flight, 1);
    gate.open(9);
    finished(&two, MAIL).await; // the verdict still counts: another attempt
    assert_eq!(first.counters().leases_lost.load(Relaxed), 0);
}

#[tokio::test]
async fn a_handler_longer_than_its_lease_keeps_it() {
    a_long_handler_keeps_its_lease(1).await;
}

#[tokio::test]
async fn a_retry_longer_than_its_lease_keeps_it() {
    a_long_handler_keeps_its_lease(2).await;
}

/// The process was away for longer than its lease, and another has the delivery.
async fn a_late_verdict_changes_nothing(verdict: fn() -> Outcome) {
    let server = RedisServer::start();
    // A long lease: no heartbeat tells the owner before it has its verdict.
    let options = polybus_core::BusOptions { lease: Duration::from_secs(60), ..options() };
    let bus = polybus_core::Bus::new(&server.url(), options).unwrap();
    let gate = Gate::new();
    let (mail, mut seen) = wait_at(&gate, &bus, one_by_one("mail"), verdict).await;
    let receipt = publish(&bus, "order.created", "1").await;
    seen.next().await;
    let id = receipt.position.unwrap().to_string();
    server.cli(&["XCLAIM", EVENTS, MAIL, "thief", "0", &id]);
    gate.open(1);
    until("the verdict is refused", || mail.counters().leases_lost.load(Relaxed) == 1).await;
    assert_eq!(consumers(&server, MAIL).into_iter().find(|(_, held)| *held > 0), Some(("thief".into(), 1)));
    let stats = bus.group_stats(MAIL).await.unwrap();
    assert_eq!((stats.in_flight, stats.retrying, stats.dead), (1, 0, 0));
    assert!(seen.is_empty());
}

#[tokio::test]
async fn a_late_retry_changes_nothing() {
    a_late_verdict_changes_nothing(failed).await;
}

#[tokio::test]
async fn a_late_dead_letter_changes_nothing() {
    a_late_verdict_changes_nothing(refused).await;
}

#[tokio::test]
async fn a_late_release_changes_nothing() {
    a_late_verdict_changes_nothing(|| Outcome::Abandoned).await;
}

/// The delivery was away and is back at the same consumer: the count tells the two apart.
#[tokio::test]
async fn a_verdict_on_an_earlier_attempt_changes_nothing() {
    let server = RedisServer::start();
    let options = polybus_core::BusOptions { lease: Duration::from_secs(60), ..options() };
    let bus = polybus_core::Bus::new(&server.url(), options).unwrap();
    let gate = Gate::new();
    let (mail, mut seen) = wait_at(&gate, &bus, one_by_one("mail"), failed).await;
    let id = publish(&bus, "order.created", "1").await.position.unwrap().to_string();
    seen.next().await;
    let own = consumers(&server, MAIL)[0].0.clone();
    server.cli(&["XCLAIM", EVENTS, MAIL, "thief", "0", &id]);
    server.cli(&["XCLAIM", EVENTS, MAIL, &own, "0", &id]);
    gate.open(1);
    until("the verdict is refused", || mail.counters().leases_lost.load(Relaxed) == 1).await;
    assert_eq!((pending(&server, MAIL), bus.group_stats(MAIL).await.unwrap().retrying), (1, 0));
}

/// Cut off for longer than its lease, with a retry of the group's own store, whose fence is a token.
#[tokio::test]
async fn who_was_cut_off_loses_the_lease_and_its_verdict() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (cut_off, other) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let (early, late) = (Gate::new(), Gate::new());
    early.open(1);
    let (first, mut seen) = wait_at(&early, &cut_off, one_by_one("mail"), failed).await;
    publish(&other, "order.created", "1").await;
    assert_eq!(seen.take(2).await[1].attempt, 2);
    proxy.black_hole();
    let (_second, mut taken) = wait_at(&late, &other, one_by_one("mail"), || Outcome::Done).await;
    assert_eq!(taken.next().await.attempt, 3);
    early.open(1); // whatever comes of it
    proxy.heal();
    until("the first has lost it", || first.counters().leases_lost.load(Relaxed) == 1).await;
    let stats = other.group_stats(MAIL).await.unwrap();
    assert_eq!((stats.in_flight, stats.retrying), (1, 0));
    late.open(1);
    finished(&other, MAIL).await;
    assert_eq!(other.dead_count(DeadLetterFilter::default()).await.unwrap(), 0);
    assert!(seen.is_empty() && taken.is_empty());
}
