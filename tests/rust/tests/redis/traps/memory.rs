//! The log lies in the memory of the server: what is finished must go, and nothing else.

use std::time::Duration;

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::Outcome;
use polybus_core::{Bus, BusOptions};

use super::*;

fn entries(server: &RedisServer) -> u64 {
    server.cli(&["XLEN", EVENTS]).parse().unwrap()
}

/// Makes a group and leaves it without a member.
async fn make_group(bus: &Bus, name: &str) {
    subscribe(bus, "*", one_by_one(name), |_| Outcome::Done).await.0.drain(Duration::ZERO).await;
}

fn forgetful(url: &str, options: BusOptions) -> Bus {
    Bus::new(url, BusOptions { retention: Some(Duration::ZERO), ..options }).unwrap()
}

#[tokio::test]
async fn finished_events_leave_the_log() {
    let server = RedisServer::start();
    let bus = forgetful(&server.url(), options());
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let (_none, none) = subscribe(&bus, "stock.*", one_by_one("none"), |_| Outcome::Done).await;
    publish_numbers(&bus, "order.created", 250).await;
    mail.all_numbers(250).await;
    until("the log is empty", || entries(&server) == 0).await;
    assert!(none.is_empty());
    assert_eq!(bus.group_stats("test/none").await.unwrap().lag, 0);
    // And it goes on from there.
    publish(&bus, "order.created", "250").await;
    assert_eq!(payload(&mail.next().await), "250");
}

#[tokio::test]
async fn finished_events_stay_for_the_retention() {
    let server = RedisServer::start();
    let bus = Bus::new(&server.url(), BusOptions { retention: Some(Duration::from_secs(3)), ..options() }).unwrap();
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&bus, "order.created", "0").await;
    mail.next().await;
    let published = std::time::Instant::now();
    until("the log is empty", || entries(&server) == 0).await;
    assert!(published.elapsed() > Duration::from_millis(2_900), "{:?}", published.elapsed());
}

#[tokio::test]
async fn what_the_slowest_group_needs_is_never_removed() {
    let server = RedisServer::start();
    let bus = forgetful(&server.url(), options());
    make_group(&bus, "away").await;
    let gate = Gate::new();
    let (_slow, mut slow) = wait_at(&gate, &bus, one_by_one("slow"), || Outcome::Done).await;
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish_numbers(&bus, "order.created", 20).await;
    mail.all_numbers(20).await;
    finished(&bus, MAIL).await;
    sweeps(&server, 2).await;
    assert_eq!(entries(&server), 20);
    assert_eq!(bus.group_stats("test/away").await.unwrap().lag, 20);
    // The slow one is in its fifth; the other group does not hold it up any more.
    gate.open(4);
    slow.take(5).await;
    bus.delete_group("test/away").await.unwrap();
    until("four are removed", || entries(&server) == 16).await;
    sweeps(&server, 2).await;
    assert_eq!(entries(&server), 16);
    let stats = bus.group_stats("test/slow").await.unwrap();
    assert_eq!((stats.lag, stats.in_flight, stats.expired), (15, 1, 0), "honest after a trim");
    gate.open(20);
    let rest: Vec<_> = slow.take(15).await.iter().map(payload).collect();
    assert_eq!(rest, (5..20).map(|number| number.to_string()).collect::<Vec<_>>());
    until("the log is empty", || entries(&server) == 0).await;
}

#[tokio::test]
async fn a_group_without_a_member_gets_everything_later() {
    let server = RedisServer::start();
    let bus = forgetful(&server.url(), options());
    make_group(&bus, "away").await;
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish_numbers(&bus, "order.created", 20).await;
    mail.all_numbers(20).await;
    sweeps(&server, 2).await;
    let (_back, mut away) = subscribe(&bus, "*", one_by_one("away"), |_| Outcome::Done).await;
    away.all_numbers(20).await;
    until("the log is empty", || entries(&server) == 0).await;
}

/// Waits until somebody has swept that often.
async fn sweeps(server: &RedisServer, count: usize) {
    for _ in 0..count {
        let swept = || server.cli(&["HGET", "polybus:{default}:meta", "swept"]);
        let before = swept();
        until("a sweep", || swept() != before).await;
    }
}

#[tokio::test]
async fn a_limit_on_the_number_drops_and_counts() {
    let server = RedisServer::start();
    let bus = Bus::new(&server.url(), BusOptions { max_events: Some(10), ..options() }).unwrap();
    let stored = BusOptions { retention: Some(Duration::from_secs(3600)), ..options() };
    let plain = Bus::new(&server.url(), stored).unwrap(); // publishes faster than the keeper looks
    make_group(&plain, "away").await;
    publish_numbers(&plain, "order.created", 30).await;
    let (_mail, mut mail) = wait_at(&Gate::new(), &bus, one_by_one("mail"), || Outcome::Done).await;
    mail.next().await;
    until("the log is short", || entries(&server) == 10).await;
    let away = || async { bus.group_stats("test/away").await.unwrap() };
    assert_eq!((away().await.lag, away().await.expired), (10, 20));
    let stats = bus.group_stats(MAIL).await.unwrap();
    assert_eq!(stats.lag + stats.in_flight + stats.expired, 30);
    let (_back, mut seen) = subscribe(&plain, "*", one_by_one("away"), |_| Outcome::Done).await;
    let rest: Vec<_> = seen.take(10).await.iter().map(payload).collect();
    assert_eq!(rest, (20..30).map(|number| number.to_string()).collect::<Vec<_>>());
    finished(&plain, "test/away").await;
    assert_eq!(away().await.expired, 20);
}

/// Removed from the log while a dead owner had it: there is nothing left to deliver, and that is counted.
#[tokio::test]
async fn what_was_removed_under_a_dead_owner_is_counted() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    make_group(&bus, "mail").await;
    publish_numbers(&bus, "order.created", 5).await;
    take_as_ghost(&server, MAIL, 5);
    server.cli(&["XTRIM", EVENTS, "MAXLEN", "2"]);
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let found: Vec<_> = mail.take(2).await.iter().map(payload).collect();
    assert_eq!(found, ["3", "4"]);
    finished(&bus, MAIL).await;
    assert_eq!((bus.group_stats(MAIL).await.unwrap().expired, pending(&server, MAIL)), (3, 0));
    publish(&bus, "order.created", "5").await;
    assert_eq!(payload(&mail.next().await), "5");
}

/// The same under a handler of ours that runs: it may finish what it has, and is not held up for ever.
#[tokio::test]
async fn what_was_removed_under_a_handler_is_finished_or_counted() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let gate = Gate::new();
    let (mail, mut seen) = wait_at(&gate, &bus, one_by_one("mail"), || Outcome::Done).await;
    publish(&bus, "order.created", "1").await;
    seen.next().await;
    server.cli(&["XTRIM", EVENTS, "MAXLEN", "0"]);
    tokio::time::sleep(LEASE * 2).await; // heartbeats pass
    gate.open(2);
    publish(&bus, "order.created", "2").await;
    assert_eq!(payload(&seen.next().await), "2");
    finished(&bus, MAIL).await;
    let expired = bus.group_stats(MAIL).await.unwrap().expired;
    assert_eq!(mail.counters().completed.load(Relaxed) + expired, 2);
}
