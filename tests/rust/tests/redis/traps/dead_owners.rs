//! The pending entries of an owner that is gone: nobody gives them to others unless somebody claims them.

use std::time::Duration;

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::SubscribeOptions;
use polybus_core::handler::Outcome;

use super::*;

#[tokio::test]
async fn a_dead_consumers_entries_are_claimed() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await.0.drain(Duration::ZERO).await;
    publish_numbers(&bus, "order.created", 5).await;
    take_as_ghost(&server, MAIL, 5);
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    for number in 0..5 {
        let job = seen.next().await;
        // The ghost's attempt counts: it may have died of the event.
        assert_eq!((payload(&job), job.attempt, job.redelivered), (number.to_string(), 2, true));
    }
    finished(&bus, MAIL).await;
    assert_eq!(pending(&server, MAIL), 0);
}

#[tokio::test]
async fn what_a_dead_consumer_had_not_skipped_yet_reaches_no_handler() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    subscribe(&bus, "order.*", one_by_one("mail"), |_| Outcome::Done).await.0.drain(Duration::ZERO).await;
    for number in 0..4 {
        publish(&bus, "stock.changed", &number.to_string()).await;
    }
    publish(&bus, "order.created", "4").await;
    take_as_ghost(&server, MAIL, 5);
    let (_mail, mut seen) = subscribe(&bus, "order.*", one_by_one("mail"), |_| Outcome::Done).await;
    assert_eq!(payload(&seen.next().await), "4");
    finished(&bus, MAIL).await;
    assert!(seen.is_empty());
    assert_eq!(bus.group_stats(MAIL).await.unwrap().expired, 0);
}

#[tokio::test]
async fn a_retry_that_died_with_its_owner_is_taken_by_another() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (cut_off, other) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let gate = Gate::new();
    gate.open(1); // the first attempt fails, the second hangs
    let (_first, mut seen) = wait_at(&gate, &cut_off, one_by_one("mail"), failed).await;
    publish(&other, "order.created", "1").await;
    assert_eq!(seen.take(2).await[1].attempt, 2);
    proxy.black_hole();
    let (_second, mut seen) = subscribe(&other, "*", one_by_one("mail"), |_| Outcome::Done).await;
    assert_eq!(seen.next().await.attempt, 3);
    finished(&other, MAIL).await;
}

/// A read that was executed and whose answer was lost: the entries are pending in our own name, and no claim looks there.
#[tokio::test]
async fn entries_whose_delivery_was_lost_on_the_way_are_found() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (reader, writer) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let (_mail, mut seen) = subscribe(&reader, "*", SubscribeOptions::new("mail"), |_| Outcome::Done).await;
    let mut number = 0;
    // An answer must be lost that carried an entry: it is not known which answer comes first, so try again.
    for lost in 0..5 {
        until("all is done", || pending(&server, MAIL) == 0).await;
        while counted(&reader, "reconnects_total") <= lost {
            proxy.cut_after(0);
            publish(&writer, "order.created", &number.to_string()).await;
            let mine = number.to_string();
            number += 1;
            while payload(&seen.next().await) != mine {}
        }
    }
    finished(&writer, MAIL).await;
}

/// Looking for entries that got lost must leave those alone that a handler has.
#[tokio::test]
async fn a_running_handler_keeps_its_lease_over_a_cut() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (reader, writer) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let gate = Gate::new();
    let options = SubscribeOptions { concurrency: Some(2), ..SubscribeOptions::new("mail") };
    let (mail, mut seen) = wait_at(&gate, &reader, options, || Outcome::Done).await;
    publish(&writer, "order.created", "1").await;
    assert_eq!(payload(&seen.next().await), "1");
    proxy.cut();
    publish(&writer, "order.created", "2").await;
    assert_eq!(payload(&seen.next().await), "2");
    tokio::time::sleep(LEASE * 3).await; // not for something to happen: for nothing to happen
    assert_eq!(mail.counters().leases_lost.load(Relaxed), 0);
    gate.open(2);
    finished(&writer, MAIL).await;
    assert!(seen.is_empty());
    assert_eq!(mail.counters().completed.load(Relaxed), 2);
}
