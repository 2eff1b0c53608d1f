//! What waits here could run elsewhere.

use std::time::Duration;

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::Outcome;

use super::*;

async fn in_flight(bus: &polybus_core::Bus) -> (u64, u64) {
    let stats = bus.group_stats(MAIL).await.unwrap();
    (stats.in_flight, stats.lag)
}

#[tokio::test]
async fn a_busy_subscription_holds_what_it_handles_and_no_more() {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let gate = Gate::new();
    let (_first, mut busy) = wait_at(&gate, &one, one_by_one("mail"), || Outcome::Done).await;
    for number in 0..20 {
        publish(&two, "order.created", &number.to_string()).await;
        if number == 0 {
            busy.next().await;
        }
        assert_eq!(in_flight(&two).await, (1, number));
    }
    let (_second, mut idle) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let rest: Vec<_> = idle.take(19).await.iter().map(payload).collect();
    assert_eq!(rest, (1..20).map(|number| number.to_string()).collect::<Vec<_>>());
    assert!(busy.is_empty() && idle.is_empty());
    gate.open(1);
    finished(&two, MAIL).await;
}

/// Got its delivery by another way than the one that it waits on: a retry, while a read stands at the server.
#[tokio::test]
async fn a_retry_does_not_leave_a_read_behind() {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let gate = Gate::new();
    gate.open(1); // the first attempt fails
    let again = || Outcome::RetryAfter(Duration::from_millis(300), polybus_core::delivery::Failure::new("", "", ""));
    let (_first, mut busy) = wait_at(&gate, &one, one_by_one("mail"), again).await;
    publish(&two, "order.created", "0").await;
    assert_eq!(busy.take(2).await[1].attempt, 2);
    publish(&two, "order.created", "1").await;
    let (_second, mut idle) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    assert_eq!(payload(&idle.next().await), "1");
}

/// A group that wants few of the events reads many at once: more of them may be wanted than it has room for.
#[tokio::test]
async fn a_narrow_pattern_is_no_excuse() {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let gate = Gate::new();
    let run = {
        let gate = gate.clone();
        move |_: &_| {
            let gate = gate.clone();
            async move {
                gate.pass().await;
                Outcome::Done
            }
        }
    };
    let (_first, mut busy) = attend(&one, "order.*", one_by_one("mail"), run).await;
    let noise = (0..200).map(|number| outgoing(event("stock.changed", &number.to_string()))).collect();
    two.publish(noise).await.unwrap();
    finished(&two, MAIL).await;
    let orders = (0..20).map(|number| outgoing(event("order.created", &number.to_string()))).collect();
    two.publish(orders).await.unwrap();
    busy.next().await;
    let (_second, mut idle) = subscribe(&two, "order.*", one_by_one("mail"), |_| Outcome::Done).await;
    let rest = idle.take(19).await;
    assert!(rest.iter().all(|job| job.attempt == 1));
    assert!(busy.is_empty());
    gate.open(1);
    finished(&two, MAIL).await;
}

#[tokio::test]
async fn leaving_hands_back_at_once_and_counts_no_attempt() {
    let server = RedisServer::start();
    let options = polybus_core::BusOptions { lease: Duration::from_secs(600), ..options() };
    let (one, two) = (polybus_core::Bus::new(&server.url(), options).unwrap(), bus(&server.url()));
    let ahead = polybus_core::SubscribeOptions { prefetch: 50, ..one_by_one("mail") };
    let (first, mut busy) = wait_at(&Gate::new(), &one, ahead, || Outcome::Done).await;
    publish_numbers(&two, "order.created", 20).await;
    busy.next().await;
    until("the rest waits there", || pending(&server, MAIL) == 20).await;
    first.drain(Duration::ZERO).await;
    assert_eq!((pending(&server, MAIL), two.group_stats(MAIL).await.unwrap().retrying), (0, 20));
    let (_second, mut idle) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    for (number, job) in idle.take(20).await.iter().enumerate() {
        assert_eq!((payload(job), job.attempt, job.redelivered), (number.to_string(), 1, true));
    }
    finished(&two, MAIL).await;
}
