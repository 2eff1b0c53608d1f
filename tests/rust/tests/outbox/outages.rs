//! Databases and buses that go and come back.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use polybus_conformance::listen;
use polybus_conformance::redis_server::{Data, Options, RedisServer};
use polybus_core::outbox::relay::{Relay, RelayOptions};
use polybus_core::{Bus, BusOptions};

use crate::databases::{Database, Session, on_each_database};
use crate::ground::{Ground, Memo, event, insert, insert_numbers, working};

on_each_database!(
    while_the_bus_is_away_no_attempt_counts,
    a_redis_that_goes_and_comes_back_gets_everything,
    terminated_sessions_and_restarts_of_the_server_lose_nothing,
);

async fn while_the_bus_is_away_no_attempt_counts<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    insert_numbers(&client, 10, 3).await;
    bus.away.store(true, Ordering::SeqCst);
    let relay = ground.relay_with(&bus, RelayOptions { batch: 4, ..RelayOptions::default() });
    for _ in 0..10 {
        let batch = relay.relay_batch().await.unwrap();
        assert_eq!((batch.attempted, batch.publish_failed, batch.returned, batch.relayed), (4, 4, 4, 0));
        assert!(batch.outage.unwrap().contains("away"));
    }
    assert_eq!(
        ground.server.sql("SELECT max(attempts), count(*) FROM polybus_outbox WHERE status = 'pending'"),
        "0|10"
    );
    working(&[relay], async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bus.away.store(false, Ordering::SeqCst);
        ground.until_delivered(&client, 10).await;
    })
    .await;
    assert!(bus.by_key().values().all(|numbers| numbers.is_sorted()));
}

async fn a_redis_that_goes_and_comes_back_gets_everything<D: Database>() {
    let ground = Ground::<D>::on();
    let mut redis = RedisServer::with(Options { appendfsync: Some("always"), ..Options::default() });
    let options = BusOptions { publish_timeout: Duration::from_millis(500), ..BusOptions::new("test") };
    let bus = Bus::new(&redis.url(), options).unwrap();
    let (_subscription, mut seen) = listen(&bus, "**", "all").await;
    let client = ground.server.connect().await;
    let relay = Relay::new(&ground.server.url(), Arc::new(bus.clone()), RelayOptions::default()).unwrap();
    working(std::slice::from_ref(&relay), async {
        insert_numbers(&client, 5, 0).await;
        ground.until_delivered(&client, 5).await;
        redis.kill9();
        for number in 5..20 {
            insert(&client, &event(number, None)).await;
        }
        while relay.health().bus.is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        redis.restart(Data::Kept);
        ground.until_delivered(&client, 20).await;
        seen.all_numbers(20).await;
    })
    .await;
    assert_eq!(ground.server.sql("SELECT max(attempts) FROM polybus_outbox"), "0");
    bus.close(polybus_conformance::DEADLINE).await;
}

// With threads: a server that stops waits for sessions that are only just beginning, which this test must not hold up.
async fn terminated_sessions_and_restarts_of_the_server_lose_nothing<D: Database>() {
    let (mut ground, bus) = (Ground::<D>::on(), Memo::new());
    let options = RelayOptions { batch: 10, lease: Duration::from_secs(1), ..RelayOptions::default() };
    let relays: Vec<_> = (0..2).map(|_| ground.relay_with(&bus, options.clone())).collect();
    let running: Vec<_> =
        (relays.iter().cloned()).map(|relay| tokio::spawn(async move { relay.run().await })).collect();
    let mut ids = HashSet::new();
    for round in 0..6 {
        let client = ground.server.connect().await;
        for number in 0..100 {
            let event = event(round * 100 + number, None);
            insert(&client, &event).await;
            ids.insert(event.meta.id.to_string());
            if number % 20 == 10 {
                client.run(D::END_SESSIONS).await;
            }
        }
        drop(client);
        match round {
            1 => ground.server.restart(),
            3 => {
                ground.server.kill9();
                ground.server.restart();
            }
            _ => {}
        }
    }
    let client = ground.server.connect().await;
    ground.until_delivered(&client, 600).await;
    relays.iter().for_each(Relay::stop);
    for running in running {
        running.await.unwrap().unwrap();
    }
    assert_eq!(bus.ids().into_iter().collect::<HashSet<_>>(), ids);
}
