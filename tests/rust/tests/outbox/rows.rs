//! One relay and its rows: what is marked, what is dead, what is purged, what wakes it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use polybus_conformance::redis_server::{EndShared, RedisServer};
use polybus_conformance::{World, event as any_event, eventually, listen};
use polybus_core::bus::new_event;
use polybus_core::codec;
use polybus_core::outbox::relay::{Relay, RelayBatch, RelayOptions, wake};
use polybus_core::outbox::{Style, Table};
use polybus_core::{Bus, BusOptions, Error, ErrorKind};

use crate::databases::{Database, Session, on_each_database};
use crate::ground::{Ground, Memo, event, insert, insert_numbers, insert_text, working};

on_each_database!(
    rows_are_published_in_order_and_marked,
    what_can_never_be_published_dies_and_blocks_nobody,
    what_is_refused_is_tried_again_and_dies_when_the_attempts_are_used_up,
    only_old_delivered_rows_are_purged,
    its_health_and_metrics_tell_what_happens,
);

async fn rows_are_published_in_order_and_marked<D: Database>() {
    let _end = EndShared; // the only one here that asks for it
    for transport in ["memory", "sqlite", "redis"] {
        let (ground, world) = (Ground::<D>::on(), World::new(transport));
        let bus = world.bus();
        let (_subscription, mut seen) = listen(&bus, "**", "all").await;
        let events = insert_numbers(&ground.server.connect().await, 5, 0).await;
        let relay = Relay::new(&ground.server.url(), Arc::new(bus.clone()), RelayOptions::default()).unwrap();
        let batch = relay.relay_batch().await.unwrap();
        assert_eq!(batch, RelayBatch { attempted: 5, relayed: 5, ..RelayBatch::default() });
        // Handlers run beside each other; the order of the publish is in the positions of the log.
        let took: HashSet<_> = seen.take(5).await.iter().map(|job| job.event.meta.id.clone()).collect();
        assert_eq!(took, events.iter().map(|event| event.meta.id.clone()).collect(), "{transport}");
        assert_eq!(relay.relay_batch().await.unwrap(), RelayBatch::default());
        assert_eq!((ground.count("delivered"), relay.stats().await.unwrap().pending), (5, 0));
        bus.close(polybus_conformance::DEADLINE).await;
    }
}

async fn what_can_never_be_published_dies_and_blocks_nobody<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    let large = any_event("order.placed", &format!("\"{}\"", "x".repeat((1 << 20) - 2)));
    let wire = String::from_utf8(codec::encode(&large).unwrap()).unwrap();
    insert_text(&client, "too-large", Some("k"), &wire.replacen("xx", "xxx", 1)).await;
    insert_text(&client, "no-json", Some("k"), "{\"type\":").await;
    insert_text(&client, "no-type", Some("k"), &wire.replacen("order.placed", "order placed", 1)).await;
    insert(&client, &event(1, Some("k"))).await;
    let relay = ground.relay(&bus);
    let batch = relay.relay_batch().await.unwrap();
    let expected = RelayBatch { attempted: 4, relayed: 1, malformed: 3, dead_lettered: 3, ..RelayBatch::default() };
    assert_eq!((batch, bus.numbers()), (expected, vec![1]));

    let dead = relay.dead_letters(0, 2).await.unwrap();
    let rest = relay.dead_letters(dead[1].seq, 100).await.unwrap();
    let why: Vec<_> = dead.iter().chain(&rest).map(|row| (&*row.event_id, &*row.last_error)).collect();
    assert!(
        matches!(why[..], [("too-large", a), ("no-json", b), ("no-type", c)]
        if a.starts_with("payload_too_large: ") && b.starts_with("invalid_event: ") && c.starts_with("invalid_event: ")),
        "{why:?}"
    );
    assert!((dead[0].attempts, dead[0].partition_key.as_deref()) == (1, Some("k")) && dead[0].dead_at_ms > 0);

    // Mended and replayed, it is published; what is replayed as it is dies again.
    let good = String::from_utf8(codec::encode(&event(2, None)).unwrap()).unwrap();
    client.run(&format!("UPDATE polybus_outbox SET event = '{good}' WHERE event_id = 'no-json'")).await;
    assert_eq!(relay.replay(Some("nobody")).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(relay.replay(Some("no-type")).await.unwrap(), 1);
    assert_eq!(relay.relay_batch().await.unwrap().malformed, 1);
    assert_eq!(relay.replay(None).await.unwrap(), 3);
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 1);
    assert_eq!(bus.numbers(), [1, 2]);
    assert_eq!((relay.purge_dead(Some("no-type")).await.unwrap(), relay.purge_dead(None).await.unwrap()), (1, 1));
}

async fn what_is_refused_is_tried_again_and_dies_when_the_attempts_are_used_up<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    insert_numbers(&ground.server.connect().await, 3, 0).await;
    bus.refuse(|event| (crate::ground::number(event) == 1).then(|| Error::connection_failed("not this one")));
    let relay = ground.relay(&bus);
    let first = relay.relay_batch().await.unwrap();
    assert_eq!((first.relayed, first.publish_failed, first.dead_lettered), (2, 1, 0));
    for attempt in 2..=4 {
        let batch = relay.relay_batch().await.unwrap();
        assert_eq!((batch.attempted, batch.dead_lettered), (1, u64::from(attempt == 4)), "attempt {attempt}");
    }
    let dead = relay.dead_letters(0, 10).await.unwrap();
    assert_eq!((dead.len(), dead[0].attempts, &*dead[0].last_error), (1, 4, "connection_failed: not this one"));
    assert_eq!(bus.numbers(), [0, 2]);
}

async fn only_old_delivered_rows_are_purged<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    let (old, now) = (D::ago(2 * 86_400), D::ago(0));
    let sql = format!(
        "INSERT INTO polybus_outbox (event_id, type, event, status, created_at, delivered_at)
        SELECT n, 'a', '{{}}', CASE WHEN n % 10 = 0 THEN 'dead' ELSE 'delivered' END, {old}, {old} FROM {} ORDER BY n",
        D::NUMBERS
    );
    client.run(&sql).await;
    client.run(&format!("UPDATE polybus_outbox SET delivered_at = {now} WHERE seq <= 100")).await;
    insert_numbers(&client, 3, 0).await;
    let relay = ground.relay(&bus);
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 3);
    assert_eq!(relay.purge(Duration::from_secs(86_400)).await.unwrap(), 4500 - 90);
    assert_eq!((ground.count("delivered"), ground.count("dead")), (93, 500));
}

/// An event has no delay of its own: whoever wants one writes it into the row, by the database's clock.
#[tokio::test]
async fn a_row_waits_until_it_is_visible_and_holds_its_key() {
    let (ground, bus) = (Ground::new(), Memo::new());
    let client = ground.server.connect().await;
    let events = insert_numbers(&client, 4, 2).await; // of the keys 0, 1, 0, 1
    let later = "UPDATE polybus_outbox SET visible_at = now() + interval '1 hour' WHERE event_id = $1";
    client.execute(later, &[&&*events[0].meta.id]).await.unwrap();
    let relay = ground.relay(&bus);
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 2);
    assert_eq!((bus.numbers(), relay.stats().await.unwrap().pending), (vec![1, 3], 2));
    client.execute("UPDATE polybus_outbox SET visible_at = now()", &[]).await.unwrap();
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 2);
    assert_eq!(bus.numbers(), [1, 3, 0, 2]);
}

/// A Redis that takes smaller arguments than the bus takes events answers with an error and hangs up. Nobody who comes
/// later waits for that.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_for_the_transport_dies_and_blocks_nobody() {
    let (ground, redis) = (Ground::new(), RedisServer::start());
    redis.cli(&["CONFIG", "SET", "proto-max-bulk-len", "1048576"]);
    let bus = Bus::new(&redis.url(), BusOptions { max_payload_bytes: 8 << 20, ..BusOptions::new("test") }).unwrap();
    let (_subscription, mut seen) = listen(&bus, "**", "all").await;
    let client = ground.server.connect().await;
    insert(&client, &event(1, Some("a"))).await;
    let large = format!("\"{}\"", "x".repeat(2 << 20));
    let large = new_event("order.placed", large.into_bytes().into(), None, 8 << 20).unwrap();
    insert(&client, &large).await;
    insert(&client, &event(2, Some("b"))).await;
    insert(&client, &event(3, None)).await;
    let relay = Relay::new(&ground.server.url(), Arc::new(bus.clone()), RelayOptions::default()).unwrap();
    working(std::slice::from_ref(&relay), async {
        ground.until_delivered(&client, 3).await;
        eventually("the large one is dead", || async { Ok(ground.count("dead") == 1) }).await;
    })
    .await;
    let numbers: HashSet<_> = seen.take(3).await.iter().map(|job| job.event.payload.clone()).collect();
    assert_eq!(numbers, ["1", "2", "3"].map(|number| number.as_bytes().to_vec().into()).into());
    let [dead] = &relay.dead_letters(0, 10).await.unwrap()[..] else { panic!() };
    assert_eq!(dead.event_id, *large.meta.id);
    assert!(dead.last_error.starts_with("payload_too_large: "), "{}", dead.last_error);
    assert!(dead.last_error.contains("proto-max-bulk-len"), "{}", dead.last_error);
    bus.close(polybus_conformance::DEADLINE).await;
}

#[tokio::test]
async fn a_notification_wakes_it_and_so_does_a_call() {
    let (ground, bus) = (Ground::new(), Memo::new());
    let client = ground.server.connect().await;
    let relay =
        ground.relay_with(&bus, RelayOptions { poll_interval: Duration::from_secs(3600), ..Default::default() });
    let listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND state = 'idle'";
    let statement = wake(&Table::parse("polybus_outbox").unwrap(), Style::Dollar);
    working(std::slice::from_ref(&relay), async {
        loop {
            if client.query_one(listening, &[]).await.unwrap().get::<_, i64>(0) == 1 {
                break;
            }
        }
        // Long pauses grow from short ones: by now it may still look by itself, and later it does not.
        for (number, by_call) in [(1, false), (2, true), (3, false)] {
            tokio::time::sleep(Duration::from_millis(300)).await;
            insert(&client, &event(number, None)).await;
            if by_call {
                relay.wake();
            } else {
                client.execute(&statement.sql, &[&"polybus_outbox"]).await.unwrap();
            }
            ground.until_delivered(&client, number as i64).await;
        }
    })
    .await;
    assert_eq!(bus.numbers(), [1, 2, 3]);
}

async fn its_health_and_metrics_tell_what_happens<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    let relay = ground.relay(&bus);
    assert!(!relay.health().healthy);
    working(std::slice::from_ref(&relay), async {
        insert_numbers(&client, 3, 0).await;
        ground.until_delivered(&client, 3).await;
        assert!(relay.health().healthy, "{:?}", relay.health());
        bus.away.store(true, std::sync::atomic::Ordering::SeqCst);
        insert(&client, &event(3, None)).await;
        while relay.health().healthy {
            tokio::task::yield_now().await;
        }
        assert!(relay.health().bus.unwrap().contains("away"));
        let text = relay.metrics().await;
        for line in [
            "polybus_relay_relayed_total{table=\"polybus_outbox\"} 3",
            "polybus_relay_pending{table=\"polybus_outbox\"} 1",
            "polybus_relay_workers{table=\"polybus_outbox\"} 1",
            "polybus_relay_healthy{table=\"polybus_outbox\"} 0",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in {text}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_bus_that_drops_what_fails_is_refused() {
    let bus = World::new("memory").bus_with(BusOptions { fail_open: true, ..BusOptions::new("test") });
    let refused = Relay::new("postgres://h/d", Arc::new(bus), RelayOptions::default()).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidConfig);
}
