//! Pub/Sub keeps nothing, and says so; it comes back after an outage, and says what may be missing.
use std::time::Duration;

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::handler::{Outcome, from_fn};
use polybus_core::transport::{Durability, Outgoing};
use polybus_core::{BusOptions, ErrorKind, SubscribeOptions};

use crate::support::*;

#[tokio::test]
async fn what_it_cannot_do_is_refused() {
    let server = RedisServer::start();
    let bus = bus(&server.pubsub_url());
    let handler = from_fn(|_| std::future::ready(Outcome::Done));
    let error = bus.subscribe("n", handler, SubscribeOptions::new("all")).await.err().unwrap();
    assert_error(&error, ErrorKind::Unsupported, &["broadcast", "redis://"]);
    let later = Outgoing { delay: Some(Duration::from_millis(1)), ..outgoing(event("n", "1")) };
    let expiring = Outgoing { expires_in: Some(Duration::from_secs(1)), ..outgoing(event("n", "1")) };
    for outgoing in [later, expiring] {
        let error = bus.publish(vec![outgoing]).await.unwrap_err();
        assert_error(&error, ErrorKind::Unsupported, &["redis://"]);
    }
    assert_error(&bus.dead_count(Default::default()).await.unwrap_err(), ErrorKind::Unsupported, &["redis://"]);
    let required = BusOptions { durability: Durability::Required, ..BusOptions::new("test") };
    let error = not_opened(&bus_with(&server.pubsub_url(), required)).await;
    assert_error(&error, ErrorKind::Unsupported, &["keeps nothing"]);
}

#[tokio::test]
async fn at_most_once_is_told() {
    let server = RedisServer::start();
    let guarantees = bus(&server.pubsub_url()).guarantees().await.unwrap();
    assert_eq!((guarantees.transport, guarantees.delivery), ("redis+pubsub", "at-most-once"));
    assert_eq!(guarantees.durability, "none");
    assert!(guarantees.warnings[0].contains("at most once"));
}

#[tokio::test]
async fn overlapping_patterns_do_not_duplicate() {
    let server = RedisServer::start();
    let bus = bus(&server.pubsub_url());
    let mut all = Vec::new();
    for pattern in ["order.placed", "order.*", "order.**", "*.placed", "**", "ord?r.placed"] {
        all.push((pattern, listen(&bus, pattern, pattern).await.1));
    }
    let (_, mut others) = listen(&bus, "order.shipped", "others").await;
    publish_numbers(&bus, "order.placed", 3).await;
    publish(&bus, "order.shipped", "3").await;
    assert_eq!(payload(&others.next().await), "3");
    for (pattern, seen) in &mut all {
        let expected = if pattern.ends_with('*') { &["0", "1", "2", "3"][..] } else { &["0", "1", "2"] };
        let mut numbers: Vec<_> = seen.take(expected.len()).await.iter().map(payload).collect();
        numbers.sort_unstable(); // several handlers run at once
        assert_eq!(numbers, expected, "{pattern}");
        assert!(seen.is_empty(), "{pattern}");
    }
}

#[tokio::test]
async fn a_lost_connection_is_made_again_and_counted() {
    let mut server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let listening = bus(&format!("redis+pubsub://{}", proxy.address()));
    let publishing = hasty(&server.pubsub_url());
    let (_, mut seen) = listen(&listening, "n", "all").await;
    let (_, mut others) = listen(&listening, "*", "others").await;
    publish(&publishing, "n", "0").await;
    seen.all_numbers(1).await;
    others.all_numbers(1).await;
    assert_eq!(count(&listening, "gaps_total"), 0);
    for gaps in 1..=3 {
        match gaps {
            1 => proxy.cut(),
            2 => server.restart(Data::Kept),
            _ => server.kill9(),
        }
        eventually("the gap is counted", || async { Ok(count(&listening, "gaps_total") == gaps) }).await;
        if gaps == 3 {
            assert_error(&refused_at_last(&publishing).await, ErrorKind::ConnectionFailed, &[&server.address()]);
            server.restart(Data::Lost);
        }
        // Published until one arrives, so others may come late: each outage has its own payload.
        let number = gaps.to_string();
        let publish_again = async {
            loop {
                drop(try_publish(&publishing, "n", &number).await);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let arrive = async {
            while payload(&seen.next().await) != number {}
            while payload(&others.next().await) != number {}
        };
        tokio::select! { () = arrive => {}, () = publish_again => {} }
        assert_eq!(count(&listening, "gaps_total"), gaps);
    }
}

#[tokio::test]
async fn tls_and_passwords_hold_for_listening_too() {
    let server = RedisServer::with(Options { tls: Tls::Mutual, password: Some("pass"), ..Options::default() });
    let url = server.url().replacen("rediss://", "redis+pubsub://", 1) + "&tls=true";
    let bus = bus(&url);
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish(&bus, "n", "0").await;
    seen.all_numbers(1).await;
    let error = not_opened(&self::bus(&url.replacen(":pass@", ":word@", 1))).await;
    assert_error(&error, ErrorKind::AuthFailed, &["password"]);
}
