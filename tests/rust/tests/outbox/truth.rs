//! A row if and only if its event arrives: with many writers, killed relays, late commits and old snapshots.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::{eventually, listen};
use polybus_core::outbox::relay::RelayOptions;
use polybus_core::{Bus, BusOptions};

use crate::databases::{Database, Session, on_each_database};
use crate::ground::{Ground, Memo, event, insert, insert_numbers, working};

/// Eight writers commit in any order, every tenth rolls back, and some roll back to a savepoint.
async fn writers_and_relays<D: Database>(relays: usize) {
    const WRITERS: usize = 8;
    const EACH: usize = 100;
    let (ground, bus) = (Arc::new(Ground::<D>::on()), Memo::new());
    ground.server.sql("CREATE TABLE orders (id VARCHAR(64) PRIMARY KEY)");
    let options = RelayOptions { batch: 20, ..RelayOptions::default() };
    let relays: Vec<_> = (0..relays).map(|_| ground.relay_with(&bus, options.clone())).collect();
    let client = ground.server.connect().await;
    working(&relays, async {
        let mut writers = Vec::new();
        for writer in 0..WRITERS {
            let ground = ground.clone();
            writers.push(tokio::spawn(async move {
                let client = ground.server.connect().await;
                for number in 0..EACH {
                    client.run("BEGIN").await;
                    let first = event(writer * EACH + number, None);
                    client.run(&format!("INSERT INTO orders VALUES ('{}')", first.meta.id)).await;
                    insert(&client, &first).await;
                    tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
                    client.run("SAVEPOINT two").await;
                    let second = event(0, None);
                    client.run(&format!("INSERT INTO orders VALUES ('{}')", second.meta.id)).await;
                    insert(&client, &second).await;
                    client.run(["RELEASE SAVEPOINT two", "ROLLBACK TO SAVEPOINT two"][fastrand::usize(..2)]).await;
                    client.run(if fastrand::u8(..10) == 0 { "ROLLBACK" } else { "COMMIT" }).await;
                }
            }));
        }
        for writer in writers {
            writer.await.unwrap();
        }
        let count = client.texts("SELECT count(*) FROM orders").await.unwrap()[0].parse().unwrap();
        ground.until_delivered(&client, count).await;
    })
    .await;
    let committed: HashSet<_> = client.texts("SELECT id FROM orders").await.unwrap().into_iter().collect();
    let ids = bus.ids();
    assert_eq!(ids.len(), committed.len(), "nobody died, so nothing comes twice");
    assert_eq!(ids.into_iter().collect::<HashSet<_>>(), committed);
}

on_each_database!(
    a_row_if_and_only_if_an_event_with_two_relays,
    a_row_if_and_only_if_an_event_with_eight_relays,
    a_relay_that_is_killed_at_any_step_loses_nothing,
    what_commits_late_is_found,
);

async fn a_row_if_and_only_if_an_event_with_two_relays<D: Database>() {
    writers_and_relays::<D>(2).await;
}

async fn a_row_if_and_only_if_an_event_with_eight_relays<D: Database>() {
    writers_and_relays::<D>(8).await;
}

async fn a_relay_that_is_killed_at_any_step_loses_nothing<D: Database>() {
    let server = RedisServer::start();
    let url = server.url();
    for (step, twice) in [("claimed", 0), ("published", 4), ("settled", 0)] {
        let ground = Ground::<D>::on();
        let bus = Bus::new(
            &url,
            BusOptions { bus: format!("killed-{step}-{}", fastrand::u32(..)), ..BusOptions::new("test") },
        )
        .unwrap();
        let (_subscription, mut seen) = listen(&bus, "**", "all").await;
        let client = ground.server.connect().await;
        let events = insert_numbers(&client, 10, 0).await;
        let mut relay = Command::new(env!("CARGO_BIN_EXE_relay"));
        relay.args([&ground.server.url(), &url, &bus.options().bus, step]).stdin(Stdio::null());
        let mut relay = relay.spawn().unwrap();
        assert!(!tokio::task::spawn_blocking(move || relay.wait()).await.unwrap().unwrap().success());
        let other = polybus_core::outbox::relay::Relay::new(
            &ground.server.url(),
            Arc::new(bus.clone()),
            RelayOptions { batch: 100, ..RelayOptions::default() },
        )
        .unwrap();
        working(&[other], ground.until_delivered(&client, 10)).await;
        let ids: Vec<_> = seen.take(10 + twice).await.iter().map(|job| job.event.meta.id.clone()).collect();
        let different: HashSet<_> = ids.iter().collect();
        assert_eq!(different, events.iter().map(|event| &event.meta.id).collect(), "killed when {step}");
        assert!(seen.is_empty(), "killed when {step}");
        bus.close(polybus_conformance::DEADLINE).await;
    }
}

async fn what_commits_late_is_found<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let (client, late) = (ground.server.connect().await, ground.server.connect().await);
    let relay = ground.relay(&bus);
    late.run("BEGIN").await;
    insert(&late, &event(0, Some("a"))).await;
    for number in 1..=6 {
        insert(&client, &event(number, Some("b"))).await;
        assert_eq!(relay.relay_batch().await.unwrap().relayed, 1);
    }
    late.run("COMMIT").await;
    insert(&client, &event(7, Some("a"))).await;
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 2);
    assert_eq!(bus.by_key()["a"], [0, 7]);
}

/// The floor moves over what was relayed, although a snapshot keeps vacuum and the index from forgetting it.
#[tokio::test]
async fn an_old_snapshot_does_not_make_it_walk_over_what_was_relayed() {
    let (ground, bus) = (Ground::new(), Memo::new());
    let (client, mut old) = (ground.server.connect().await, ground.server.connect().await);
    let snapshot =
        old.build_transaction().isolation_level(tokio_postgres::IsolationLevel::RepeatableRead).start().await.unwrap();
    snapshot.execute("SELECT count(*) FROM polybus_outbox", &[]).await.unwrap();
    let relay = ground.relay_with(&bus, RelayOptions { batch: 100, ..RelayOptions::default() });
    insert_numbers(&client, 2000, 0).await;
    while relay.relay_batch().await.unwrap().relayed > 0 {}
    drop(relay); // a session tells what it walked over when it ends
    eventually("the session ended", || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'polybus relay'";
        Ok(client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 0)
    })
    .await;
    let sql = "SELECT idx_tup_read FROM pg_stat_all_indexes WHERE indexrelname = 'polybus_outbox_unfinished'";
    let walked = client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0);
    // A claim looks at 200 rows and at what the last two left behind, some 600 entries in all. Without a floor it looks at
    // what all before it left: more than 3000 on average.
    assert!(walked < 20 * 1000, "{walked} entries were read");
    assert_eq!(bus.took().len(), 2000);
    drop(snapshot);
}
