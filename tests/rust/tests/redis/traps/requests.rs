//! Requests while the server loses its data, or the connection.
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::{Job, Outcome, from_fn};
use polybus_core::options::RequestOptions;
use polybus_core::transport::connect;
use polybus_core::{Bus, ErrorKind, Event, Result, SubscribeOptions};
use tokio::sync::Notify;

use super::*;

const LONG: RequestOptions = RequestOptions { timeout: DEADLINE };

async fn ask(bus: &Bus, payload: &str) -> Result<Event> {
    within(bus.request(event("quote", payload), LONG)).await
}

/// A responder that tells when it began with the payload 1, and then waits to be told to go on.
async fn patient(bus: &Bus) -> (Arc<Notify>, Arc<Notify>) {
    let (began, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (begun, wait) = (began.clone(), go.clone());
    let handler = from_fn(move |job: Job| {
        let (begun, wait) = (begun.clone(), wait.clone());
        async move {
            if payload(&job) == "1" {
                begun.notify_one();
                wait.notified().await;
            }
            Outcome::Replied(job.event.payload.clone())
        }
    });
    bus.respond("quote", handler, SubscribeOptions::responder("quote")).await.unwrap();
    (began, go)
}

/// Asks, lets `trouble` happen while the responder works, and asks again.
async fn survives(asking: Bus, answering: Bus, trouble: impl FnOnce()) {
    let (began, go) = patient(&answering).await;
    let asked = tokio::spawn({
        let asking = asking.clone();
        async move { asking.request(event("quote", "1"), RequestOptions { timeout: Duration::from_secs(10) }).await }
    });
    within(began.notified()).await;
    trouble();
    go.notify_one();
    match within(asked).await.unwrap() {
        Ok(reply) => assert_eq!(&reply.payload[..], b"1"),
        // The responder may have begun before the requester knew that its request is stored.
        Err(error) => assert!(matches!(error.kind(), ErrorKind::RequestTimeout | ErrorKind::PublishUnknown), "{error}"),
    }
    assert_eq!(&ask(&asking, "2").await.unwrap().payload[..], b"2");
}

#[tokio::test]
async fn the_server_is_flushed_while_a_request_waits() {
    let server = RedisServer::start();
    let (asking, answering) = (bus(&server.url()), bus(&server.url()));
    survives(asking, answering, || drop(server.cli(&["FLUSHALL"]))).await;
}

#[tokio::test]
async fn the_requester_is_cut_off_while_it_waits() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (asking, answering) = (bus(&format!("redis://{}", proxy.address())), bus(&server.url()));
    survives(asking, answering, || proxy.cut()).await;
}

#[tokio::test]
async fn the_responder_is_cut_off_while_it_works() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let (asking, answering) = (bus(&server.url()), bus(&format!("redis://{}", proxy.address())));
    survives(asking, answering, || proxy.cut()).await;
}

#[tokio::test]
async fn however_many_requests_need_one_connection_more() {
    let server = RedisServer::start();
    let (asking, answering) = (bus(&server.url()), bus(&server.url()));
    let (_, _) = patient(&answering).await;
    publish(&asking, "other", "0").await;
    let connected = || info(&server, "connected_clients");
    let before = connected();
    for reply in join_all((0..500).map(|number| {
        let asking = asking.clone();
        async move { ask(&asking, &(number + 10).to_string()).await }
    }))
    .await
    {
        reply.unwrap();
    }
    assert!(connected() <= before + 1, "{} after {before}", connected());
}

/// What a requester that died left: nobody fetches it, and it goes by itself.
#[tokio::test]
async fn letters_that_nobody_fetches_vanish() {
    let server = RedisServer::start();
    let settings = polybus_core::BusOptions::new("test").settings(polybus_core::clock::Clock::default());
    let transport = connect(&server.url(), settings).await.unwrap();
    let (kept, lost) = ("0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210");
    let post = |mailbox: &str, ttl: Duration| transport.post(mailbox.into(), Bytes::from_static(b"x"), ttl);
    let left = |mailbox: &str| server.cli(&["PTTL", &format!("polybus:{{default}}:mail:{mailbox}")]);
    post(kept, 2 * DEADLINE).await.unwrap();
    post(kept, Duration::from_millis(1)).await.unwrap(); // does not shorten the other's time
    post(lost, Duration::from_millis(1)).await.unwrap();
    until("the mailbox is gone", || left(lost) == "-2").await;
    assert!(left(kept).parse::<i64>().unwrap() > 0, "{}", left(kept));
    transport.close().await;
}
