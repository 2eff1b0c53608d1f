//! Idempotency where the server, or the network before it, misbehaves, and over the partitions of a bus.
use std::sync::atomic::Ordering;
use std::time::Duration;

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::handler::{Outcome, from_fn, keyed};
use polybus_core::options::Key;
use polybus_core::transport::Start;
use polybus_core::{Bus, BusOptions, ErrorKind, Event, Result, SubscribeOptions};

use crate::support::*;

fn with_key(payload: &str, key: &str) -> Event {
    let meta = format!(r#"{{"idempotencyKey":"{key}"}}"#);
    new_event("n", payload.as_bytes().to_vec().into(), Some(meta.as_bytes()), 1 << 20).unwrap()
}

async fn try_event(bus: &Bus, event: Event) -> Result<polybus_core::transport::Receipt> {
    Ok(bus.publish(vec![outgoing(event)]).await?.remove(0))
}

/// What the key is for: a publish whose answer was lost is made again, and happens once.
#[tokio::test]
async fn a_publish_that_is_unknown_can_be_made_again() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let bus = hasty(&format!("redis://{}", proxy.address()));
    publish(&bus, "n", "0").await;
    proxy.cut_after(0);
    let event = with_key("1", "k");
    assert_eq!(try_event(&bus, event.clone()).await.unwrap_err().kind(), ErrorKind::PublishUnknown);
    let receipt = try_event(&bus, event.clone()).await.unwrap();
    assert!(receipt.duplicate && receipt.id == event.meta.id && receipt.position.is_some(), "{receipt:?}");
    // A batch, too: all of it was stored.
    let batch: Vec<_> = (2..5).map(|number| outgoing(with_key(&number.to_string(), &format!("k{number}")))).collect();
    proxy.cut_after(0);
    assert_eq!(bus.publish(batch.clone()).await.unwrap_err().kind(), ErrorKind::PublishUnknown);
    assert!(bus.publish(batch).await.unwrap().iter().all(|receipt| receipt.duplicate));
    let all = SubscribeOptions { start: Start::Beginning, ..one_at_a_time("all") };
    let (_, mut seen) = subscribe(&bus, "n", all, |_| Outcome::Done).await;
    assert_eq!(seen.take(5).await.iter().map(payload).collect::<Vec<_>>(), ["0", "1", "2", "3", "4"]);
    finished(&bus, "test/all").await;
    assert!(seen.is_empty());
}

#[tokio::test]
async fn a_publish_that_failed_leaves_no_key() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    publish(&bus, "n", "0").await;
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    let batch = || vec![outgoing(with_key("1", "one")), outgoing(with_key("2", "two"))];
    assert_eq!(bus.publish(batch()).await.unwrap_err().kind(), ErrorKind::ConnectionFailed);
    assert_eq!(try_event(&bus, with_key("3", "one")).await.unwrap_err().kind(), ErrorKind::ConnectionFailed);
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
    assert!(bus.publish(batch()).await.unwrap().iter().all(|receipt| !receipt.duplicate));
}

/// Acknowledging goes on, and what was handled is remembered. One at a time: two of one key at once would have to wait, and
/// that is as a retry, for which a full server has no room.
#[tokio::test]
async fn a_full_server_remembers_what_is_handled() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let options = SubscribeOptions { idempotent: Some(Key::Handler), ..one_at_a_time("all") };
    let handler = keyed(from_fn(|_| std::future::ready(Outcome::Done)), |_| Some("same".into()));
    let subscription = bus.subscribe("n", handler, options).await.unwrap();
    subscription.pause();
    publish_numbers(&bus, "n", 20).await;
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
    subscription.resume();
    finished(&bus, "test/all").await;
    let counted = || async {
        let counters = subscription.counters();
        Ok((counters.completed.load(Ordering::Relaxed), counters.duplicates.load(Ordering::Relaxed)) == (1, 19))
    };
    eventually("one was handled", counted).await;
}

async fn keys_cross_partitions(bus: &Bus) {
    // Published once whatever the partition would have been.
    for number in 0..6 {
        let key = format!("key {number}");
        let first = try_event(bus, with_key("1", &key)).await.unwrap();
        for _ in 0..4 {
            let again = try_event(bus, with_key("2", &key)).await.unwrap();
            assert_eq!((again.duplicate, &again.id, &again.position), (true, &first.id, &first.position));
        }
    }
    // Handled once although the events are in different partitions; each name is marked in its own.
    let options = SubscribeOptions { idempotent: Some(Key::Handler), ..SubscribeOptions::new("s") };
    let done = from_fn(|_| std::future::ready(Outcome::Done));
    let name = |event: &Event| Some(String::from_utf8_lossy(&event.payload).into_owned().into());
    let subscription = bus.subscribe("name", keyed(done, name), options).await.unwrap();
    for _ in 0..10 {
        publish_numbers(bus, "name", 6).await;
    }
    finished(bus, "test/s").await;
    let counted = || async {
        let counters = subscription.counters();
        Ok((counters.completed.load(Ordering::Relaxed), counters.duplicates.load(Ordering::Relaxed)) == (6, 54))
    };
    eventually("each was handled once", counted).await;
}

fn in_parts(url: &str) -> Bus {
    bus_with(url, BusOptions { partitions: Some(3), ..BusOptions::new("test") })
}

#[tokio::test]
async fn keys_cross_partitions_on_one_server() {
    let server = RedisServer::start();
    keys_cross_partitions(&in_parts(&server.url())).await;
}

#[tokio::test]
async fn keys_cross_partitions_on_a_cluster() {
    let cluster = Cluster::start();
    keys_cross_partitions(&in_parts(&cluster.url())).await;
}

/// Answers to marks and verdicts are lost here and there: nothing is lost, and what was handled and confirmed is not
/// handled again. A handler whose verdict was lost on its way may not have been; it is only counted.
#[tokio::test]
async fn lost_answers_leave_no_key_behind() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let consuming = bus(&format!("redis://{}", proxy.address()));
    let options = SubscribeOptions { idempotent: Some(Key::Event), ..SubscribeOptions::new("all") };
    let (_, mut seen) = subscribe(&consuming, "n", options, |_| Outcome::Done).await;
    let publishing = bus(&server.url());
    for (round, bytes) in [0, 1, 10, 100, 300, 1_000, 3_000, 10_000].into_iter().enumerate() {
        proxy.cut_after(bytes);
        for number in 20 * round..20 * (round + 1) {
            publish(&publishing, "n", &number.to_string()).await;
        }
    }
    seen.all_numbers(160).await;
    finished(&consuming, "test/all").await;
    // Each mark is a remembered one by now.
    eventually("nothing is being handled", || async {
        Ok(server.cli(&["HLEN", "polybus:{default}:handling:test/all"]) == "0")
    })
    .await;
    assert_eq!(server.cli(&["ZCARD", "polybus:{default}:marks:test/all"]), "160");
}

#[tokio::test]
async fn pubsub_remembers_nothing() {
    let server = RedisServer::start();
    let bus = bus(&server.pubsub_url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    for _ in 0..2 {
        assert!(!try_event(&bus, with_key("1", "k")).await.unwrap().duplicate);
    }
    seen.take(2).await;
    let window = Some(Duration::from_secs(1));
    let asking = bus_with(&server.pubsub_url(), BusOptions { idempotency_window: window, ..BusOptions::new("test") });
    assert_error(&not_opened(&asking).await, ErrorKind::Unsupported, &["window", "redis://"]);
    let options = SubscribeOptions { idempotent: Some(Key::Event), ..SubscribeOptions::new("s") };
    let error = bus.subscribe("n", from_fn(|_| std::future::ready(Outcome::Done)), options).await.err().unwrap();
    assert_error(&error, ErrorKind::Unsupported, &["idempotent", "redis://"]);
}
