//! Connections whose other end is gone without a word.

use std::time::{Duration, Instant};

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::Outcome;

use super::*;

/// Longer than every wait of ours for an answer: [`polybus_core`] has given the old connections up.
const GONE: Duration = Duration::from_secs(8);

async fn events_come_again(away: Duration) {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (reader, writer) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let (_mail, mut seen) = subscribe(&reader, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&writer, "order.created", "100").await;
    assert_eq!(payload(&seen.next().await), "100");
    proxy.black_hole();
    publish_numbers(&writer, "order.created", 5).await;
    tokio::time::sleep(away).await; // the outage
    assert!(seen.is_empty());
    proxy.heal();
    let healed = Instant::now();
    seen.all_numbers(5).await;
    assert!(healed.elapsed() < Duration::from_secs(10), "{:?}", healed.elapsed());
    publish(&reader, "order.created", "200").await;
    while payload(&seen.next().await) != "200" {}
    finished(&writer, MAIL).await;
}

#[tokio::test]
async fn a_short_silence() {
    events_come_again(Duration::from_millis(500)).await;
}

#[tokio::test]
async fn a_silence_that_outlasts_every_patience() {
    events_come_again(GONE).await;
}

/// The old connections never come back, only new ones work: as behind a firewall that forgot them.
#[tokio::test]
async fn connections_that_never_come_back() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (reader, writer) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    let (_mail, mut seen) = subscribe(&reader, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let before = proxy.accepted();
    proxy.black_hole();
    publish(&writer, "order.created", "1").await;
    until("new connections are tried", || proxy.accepted() > before).await;
    proxy.cut();
    proxy.heal();
    assert_eq!(payload(&seen.next().await), "1");
    finished(&writer, MAIL).await;
}

/// The server itself stands still: nothing is lost, and nothing waits for ever.
#[tokio::test]
async fn a_server_that_stands_still() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&bus, "order.created", "0").await;
    seen.next().await;
    server.pause();
    let publishing = tokio::spawn({
        let bus = bus.clone();
        async move { publish(&bus, "order.created", "1").await }
    });
    tokio::time::sleep(Duration::from_secs(6)).await; // the outage, longer than the patience with one command
    server.resume();
    within(publishing).await.unwrap();
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, MAIL).await;
}
