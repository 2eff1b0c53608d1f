//! Consumers on the server: removing one drops what it holds, and one name for two lets the one look alive for the other.

use std::collections::HashSet;
use std::time::Duration;

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::Outcome;

use super::*;

const FORGET: &str = include_str!("../../../../../core/src/transport/redis/scripts/forget.lua");

/// Wait until the group exists, and leave it.
async fn make_group(bus: &polybus_core::Bus) {
    subscribe(bus, "*", one_by_one("mail"), |_| Outcome::Done).await.0.drain(Duration::ZERO).await;
}

#[tokio::test]
async fn a_consumer_that_holds_something_is_never_removed() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    make_group(&bus).await;
    publish_numbers(&bus, "order.created", 2).await;
    take_as_ghost(&server, MAIL, 2);
    server.cli(&["XGROUP", "CREATECONSUMER", EVENTS, MAIL, "idle"]);
    // As the janitor does it, for whoever was silent for any time at all.
    until("a moment has passed", || server.cli(&["EVAL", FORGET, "1", EVENTS, MAIL, "ghost", "0"]) == "1").await;
    assert_eq!(consumers(&server, MAIL), [("ghost".to_owned(), 2)]);
    // As everybody does it who leaves; this one does not claim so soon.
    let patient = polybus_core::BusOptions { lease: Duration::from_secs(60), ..options() };
    make_group(&polybus_core::Bus::new(&server.url(), patient).unwrap()).await;
    assert_eq!(pending(&server, MAIL), 2);
    assert!(consumers(&server, MAIL).contains(&("ghost".to_owned(), 2)));
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    seen.all_numbers(2).await;
}

#[tokio::test]
async fn who_cannot_give_back_stays_listed_until_another_has_claimed() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (cut_off, other) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let (_first, mut seen) = wait_at(&Gate::new(), &cut_off, one_by_one("mail"), || Outcome::Done).await;
    publish(&other, "order.created", "1").await;
    seen.next().await;
    proxy.black_hole();
    within(cut_off.close(Duration::ZERO)).await;
    assert_eq!(consumers(&server, MAIL).iter().map(|(_, held)| *held).collect::<Vec<_>>(), [1]);
    let (_second, mut seen) = subscribe(&other, "*", one_by_one("mail"), |_| Outcome::Done).await;
    assert_eq!(payload(&seen.next().await), "1");
    finished(&other, MAIL).await;
}

#[tokio::test]
async fn names_are_never_used_twice_and_go_with_their_owner() {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let mut names = HashSet::new();
    for round in 1..=2 {
        let gate = Gate::new();
        let (first, mut seen_one) = wait_at(&gate, &one, one_by_one("mail"), || Outcome::Done).await;
        let (second, mut seen_two) = wait_at(&gate, &two, one_by_one("mail"), || Outcome::Done).await;
        publish_numbers(&one, "order.created", 2).await;
        seen_one.next().await;
        seen_two.next().await;
        names.extend(consumers(&server, MAIL).into_iter().map(|(name, _)| name));
        assert_eq!(names.len(), round * 2, "{names:?}");
        gate.open(2);
        finished(&one, MAIL).await;
        first.drain(Duration::ZERO).await;
        assert_eq!(consumers(&server, MAIL).len(), 1);
        second.drain(Duration::ZERO).await;
        assert_eq!(consumers(&server, MAIL), []);
    }
}

/// It may be in the middle of its first look when it is told to go.
#[tokio::test]
async fn who_leaves_takes_nothing_any_more() {
    let server = RedisServer::start();
    let options = polybus_core::BusOptions { lease: Duration::from_secs(60), ..options() };
    let (one, two) = (polybus_core::Bus::new(&server.url(), options).unwrap(), bus(&server.url()));
    make_group(&two).await;
    for number in 0..50 {
        // What it takes all the same goes back.
        wait_at(&Gate::new(), &one, one_by_one("mail"), || Outcome::Done).await.0.drain(Duration::ZERO).await;
        publish(&two, "order.created", &number.to_string()).await;
    }
    let (_mail, mut seen) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    seen.all_numbers(50).await;
    finished(&two, MAIL).await;
    assert_eq!(consumers(&server, MAIL).len(), 1);
}
