//! What `publish` promises.
use std::time::{Duration, Instant};

use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::handler::Outcome;
use polybus_core::transport::{GroupSpec, Outgoing};
use polybus_core::{BusOptions, ErrorKind, SubscribeOptions};

crate::behaviours![
    arrives_byte_for_byte,
    many_publishers_and_members,
    same_ids_under_many_types,
    each_subscription_gets_its_own_types,
    an_invalid_event_keeps_back_its_batch,
    a_batch_keeps_its_order,
    limits_are_exact,
    a_delayed_event_is_not_early: delayed_publish,
    an_expired_event_is_counted_not_handled: delayed_publish + ack,
    closed_bus_refuses,
    a_closed_store_says_the_same: cross_process,
    what_was_confirmed_before_close_arrives,
    payloads_with_nul_and_huge_numbers_survive,
];

/// What a closed bus says, whoever is asked.
const CLOSED: &str = "the bus is closed; call start() to open it again";

/// W1, N7, X43: payload bytes, ids, headers and unknown members are the same on the other side.
async fn arrives_byte_for_byte(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "order.*", "s").await;
    let meta = r#"{"headers":{"who":"Jürgen ☃","empty":""},"partitionKey":"k","userId":"u","aggregate":{"type":"order","id":"1"}}"#;
    let body = "{ \"a\" : 1.10, \"b\":[1e400,123456789012345678901234567890] }";
    let sent = new_event("order.placed", body.as_bytes().to_vec().into(), Some(meta.as_bytes()), 1 << 20).unwrap();
    bus.publish(vec![outgoing(sent.clone())]).await.unwrap();
    let job = seen.next().await;
    assert_eq!(payload(&job), body);
    assert_eq!((&job.event.meta.id, &job.event.meta.timestamp), (&sent.meta.id, &sent.meta.timestamp));
    assert_eq!(job.event.meta.headers, sent.meta.headers);
    assert_eq!(job.event.meta.aggregate, sent.meta.aggregate);
    assert_eq!(job.event.meta.correlation_id.as_ref(), Some(&sent.meta.id));
    assert_eq!(job.event.meta.source.as_deref(), Some("test"));
    assert_eq!((job.attempt, job.redelivered), (1, false));
}

/// W2: nothing is missing with many publishers and many members of one group.
async fn many_publishers_and_members(world: World) {
    let buses: Vec<_> = (0..5).map(|_| world.bus()).collect();
    let mut members = Vec::new();
    for bus in &buses {
        members.push(listen(bus, "n", "s").await);
    }
    let publishers = (0..10).map(|part| {
        let bus = buses[part % buses.len()].clone();
        async move {
            for number in 0..50 {
                publish(&bus, "n", &(part * 50 + number).to_string()).await;
            }
        }
    });
    futures_util::future::join_all(publishers).await;
    let mut numbers = std::collections::HashSet::new();
    within(async {
        while numbers.len() < 500 {
            for (_, seen) in &mut members {
                while !seen.is_empty() {
                    numbers.insert(payload(&seen.next().await));
                }
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// W3: equal ids under many types do not disturb each other.
async fn same_ids_under_many_types(world: World) {
    let bus = world.bus();
    let mut all = Vec::new();
    for number in 0..10 {
        all.push(listen(&bus, &format!("t{number}.x"), &format!("s{number}")).await);
    }
    for id in 0..50 {
        let meta = format!(r#"{{"id":"id-{id}"}}"#);
        let batch = (0..10).map(|number| {
            outgoing(new_event(&format!("t{number}.x"), format!("{id}").into(), Some(meta.as_bytes()), 1000).unwrap())
        });
        bus.publish(batch.collect()).await.unwrap();
    }
    for (number, (_, seen)) in all.iter_mut().enumerate() {
        let jobs = seen.take(50).await;
        assert!(jobs.iter().all(|job| job.event.event_type.as_str() == format!("t{number}.x")));
        seen_all(&jobs, 50);
    }
}

fn seen_all(jobs: &[polybus_core::handler::Job], count: usize) {
    let mut ids: Vec<_> = jobs.iter().map(|job| job.event.meta.id.to_string()).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), count);
}

/// W11: no cross-talk between patterns.
async fn each_subscription_gets_its_own_types(world: World) {
    let bus = world.bus();
    let (_, mut orders) = listen(&bus, "order.*", "orders").await;
    let (_, mut deletes) = listen(&bus, "*.*.delete", "deletes").await;
    let (_, mut all) = listen(&bus, "*", "all").await;
    for event_type in ["order.placed", "user.account.delete", "order.item.delete"] {
        publish(&bus, event_type, "1").await;
    }
    let types = |jobs: Vec<polybus_core::handler::Job>| -> Vec<String> {
        let mut types: Vec<_> = jobs.iter().map(|job| job.event.event_type.to_string()).collect();
        types.sort();
        types
    };
    assert_eq!(types(all.take(3).await), ["order.item.delete", "order.placed", "user.account.delete"]);
    assert_eq!(types(deletes.take(2).await), ["order.item.delete", "user.account.delete"]);
    assert_eq!(types(orders.take(1).await), ["order.placed"]);
    if bus.capabilities().await.unwrap().ack {
        finished(&bus, "test/orders").await;
    }
    assert!(orders.is_empty() && deletes.is_empty() && all.is_empty());
}

/// `publish_many`: all or nothing, and the error says which.
async fn an_invalid_event_keeps_back_its_batch(world: World) {
    let bus = world.bus_with(BusOptions { max_payload_bytes: 10, ..BusOptions::new("test") });
    let (_, mut seen) = listen(&bus, "*", "s").await;
    let batch =
        vec![outgoing(event("a", "1")), outgoing(event("a", "\"more than ten bytes\"")), outgoing(event("a", "3"))];
    let error = bus.publish(batch).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PayloadTooLarge);
    assert_eq!(error.failures().iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1]);
    publish(&bus, "a", "4").await;
    assert_eq!(payload(&seen.next().await), "4");
}

/// Events of one publisher come in the order of publish, to a group of one handler at a time.
async fn a_batch_keeps_its_order(world: World) {
    let bus = world.bus();
    let options = SubscribeOptions { concurrency: Some(1), ..options_for(&bus, "s").await };
    let (_, mut seen) = subscribe(&bus, "n", options, |_| Outcome::Done).await;
    bus.publish((0..200).map(|number| outgoing(event("n", &number.to_string()))).collect()).await.unwrap();
    let numbers: Vec<_> = seen.take(200).await.iter().map(payload).collect();
    assert_eq!(numbers, (0..200).map(|number| number.to_string()).collect::<Vec<_>>());
}

/// X26: just below the limit works, just above is refused, empty is a value.
async fn limits_are_exact(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "*", "s").await;
    let fits = format!("\"{}\"", "x".repeat((1 << 20) - 2));
    bus.publish(vec![outgoing(event("a", &fits)), outgoing(event("a", "\"\""))]).await.unwrap();
    let mut lengths: Vec<_> = seen.take(2).await.iter().map(|job| job.event.payload.len()).collect();
    lengths.sort_unstable();
    assert_eq!(lengths, [2, 1 << 20]);
    let large = format!("\"{}\"", "x".repeat((1 << 20) - 1));
    let error = new_event("a", large.into(), None, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PayloadTooLarge);
}

/// X28: due times are kept, and what has no delay is not held up.
async fn a_delayed_event_is_not_early(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "*", "s").await;
    let delay = Duration::from_millis(300);
    let began = Instant::now();
    let later = Outgoing { event: event("later", "1"), delay: Some(delay), expires_in: None };
    let receipts = bus.publish(vec![later]).await.unwrap();
    assert_eq!(receipts[0].position, None);
    publish(&bus, "sooner", "2").await;
    assert_eq!(seen.next().await.event.event_type.as_str(), "sooner");
    assert_eq!(seen.next().await.event.event_type.as_str(), "later");
    assert!(began.elapsed() + Duration::from_millis(2) >= delay, "early: {:?}", began.elapsed());
}

async fn an_expired_event_is_counted_not_handled(world: World) {
    let bus = world.bus();
    let (first, _) = listen(&bus, "*", "s").await;
    first.drain(DEADLINE).await;
    let short = Outgoing { event: event("a", "1"), delay: None, expires_in: Some(Duration::from_millis(1)) };
    bus.publish(vec![short]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(10)).await; // time itself is what is waited for
    publish(&bus, "a", "2").await;
    let (_, mut seen) = listen(&bus, "*", "s").await;
    assert_eq!(payload(&seen.next().await), "2");
    finished(&bus, "test/s").await;
    assert_eq!(bus.group_stats("test/s").await.unwrap().expired, 1);
}

async fn closed_bus_refuses(world: World) {
    let bus = world.bus();
    publish(&bus, "a", "1").await;
    bus.close(DEADLINE).await;
    bus.close(DEADLINE).await; // idempotent
    let refused = bus.publish(vec![outgoing(event("a", "1"))]).await.unwrap_err();
    assert_eq!((refused.kind(), refused.message()), (ErrorKind::BusClosed, CLOSED));
    let asked = bus.capabilities().await.unwrap_err();
    assert_eq!((asked.kind(), asked.message()), (ErrorKind::BusClosed, CLOSED));
    bus.start().await.unwrap(); // N13
    publish(&bus, "a", "2").await;
}

/// What is under way when a bus closes learns it from the store, in the same words.
async fn a_closed_store_says_the_same(world: World) {
    let store = world.transport().await;
    store.close().await;
    let published = store.publish(vec![outgoing(event("a", "1"))], DEADLINE).await.unwrap_err();
    let spec = GroupSpec { broadcast: true, ..world.spec("a", "s", false) };
    let subscribed = store.subscribe(spec).await.err().unwrap();
    for refused in [published, subscribed] {
        assert_eq!((refused.kind(), refused.message()), (ErrorKind::BusClosed, CLOSED));
    }
}

/// W10: every publish that returned is received, also when the publisher closes at once.
async fn what_was_confirmed_before_close_arrives(world: World) {
    let reader = world.bus();
    let (_, mut seen) = listen(&reader, "n", "s").await;
    let publishers = (0..5).map(|part| {
        let bus = world.bus();
        async move {
            for number in 0..20 {
                publish(&bus, "n", &(part * 20 + number).to_string()).await;
            }
            bus.close(DEADLINE).await;
        }
    });
    futures_util::future::join_all(publishers).await;
    seen.all_numbers(100).await;
}

/// X45 and number text.
async fn payloads_with_nul_and_huge_numbers_survive(world: World) {
    let bus = world.bus();
    let (_, mut seen) = listen(&bus, "*", "s").await;
    for body in [r#""\u0000""#, "3.14159265358979323846264338327950288", "-0", "1E+2", r#"{"a":1,"a":2}"#, " null "] {
        publish(&bus, "a", body).await;
        assert_eq!(payload(&seen.next().await), body.trim());
    }
}
