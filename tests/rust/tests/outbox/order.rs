//! The order of a partition key, over relays that fail, are slow, or lose their lease.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use polybus_conformance::{eventually, within};
use polybus_core::outbox::relay::{Decision, Failed, FailurePolicy, Publisher, Relay, RelayBatch, RelayOptions};
use polybus_core::transport::{Outgoing, Task};
use polybus_core::{Error, Result};
use tokio::sync::Semaphore;

use crate::databases::{Database, Session, on_each_database};
use crate::ground::{Ground, Memo, event, insert, insert_numbers, number, working};

on_each_database!(
    the_order_of_each_key_holds_with_two_relays,
    the_order_of_each_key_holds_with_eight_relays,
    a_row_that_waits_holds_back_its_key_and_nothing_else,
    a_lease_that_ends_in_mid_publish_is_a_mismatch_and_overwrites_nothing,
    a_publish_longer_than_the_lease_keeps_it,
);

async fn the_order_of_each_key_holds_with_two_relays<D: Database>() {
    order_with_relays_whose_rows_fail::<D>(2).await;
}

async fn the_order_of_each_key_holds_with_eight_relays<D: Database>() {
    order_with_relays_whose_rows_fail::<D>(8).await;
}

async fn order_with_relays_whose_rows_fail<D: Database>(relays: usize) {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    let tries: Mutex<HashMap<usize, u32>> = Mutex::default();
    bus.refuse(move |event| {
        // Each seventh fails twice.
        let mut tries = tries.lock().unwrap();
        let tried = tries.entry(number(event)).or_insert(0);
        *tried += 1;
        (number(event).is_multiple_of(7) && *tried <= 2).then(|| Error::connection_failed("later"))
    });
    insert_numbers(&client, 400, 20).await;
    let options = RelayOptions { batch: 15, workers: 2, ..RelayOptions::default() };
    let relays: Vec<_> = (0..relays).map(|_| ground.relay_with(&bus, options.clone())).collect();
    working(&relays, async {
        for number in 400..600 {
            insert(&client, &event(number, Some(&format!("key-{}", number % 20)))).await;
        }
        ground.until_delivered(&client, 600).await;
    })
    .await;
    let keys = bus.by_key();
    assert_eq!((keys.len(), bus.took().len()), (20, 600));
    for (key, numbers) in keys {
        assert!(numbers.is_sorted(), "{key}: {numbers:?}");
    }
}

/// Waits an hour with whatever fails.
struct Patient;

impl FailurePolicy for Patient {
    fn decide(&self, failed: Failed) -> Task<Decision> {
        assert_eq!(failed.attempts, 1);
        Box::pin(std::future::ready(Decision::Retry(Duration::from_secs(3600))))
    }
}

async fn a_row_that_waits_holds_back_its_key_and_nothing_else<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    bus.refuse(|event| (number(event) == 1).then(|| Error::invalid_event("never")));
    // Many more of the key than a claim looks at stand in front of the others.
    for number in 0..50 {
        insert(&client, &event(number, Some("slow"))).await;
    }
    for number in 50..60 {
        insert(&client, &event(number, (number % 2 == 0).then_some("fast"))).await;
    }
    let options = RelayOptions { batch: 3, ..RelayOptions::default() };
    let relay = ground.relay_with(&bus, options).with_policy(Arc::new(Patient));
    working(std::slice::from_ref(&relay), ground.until_delivered(&client, 11)).await;
    let (mut seen, fast) = (bus.numbers(), |number: &usize| *number >= 50 && number.is_multiple_of(2));
    assert!(seen.iter().copied().filter(|number| fast(number)).eq([50, 52, 54, 56, 58]), "{seen:?}");
    seen.sort_unstable();
    assert_eq!(seen, [0, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59]);
    let stats = relay.stats().await.unwrap();
    assert_eq!((stats.pending, stats.retrying, stats.claimed, stats.dead), (49, 1, 0, 0));
}

/// A bus whose publishes wait for the test.
pub struct Gate {
    pub began: Semaphore,
    pub go: Arc<Semaphore>,
    memo: Arc<Memo>,
}

impl Publisher for Gate {
    fn publish(&self, batch: Vec<Outgoing>) -> Task<Result<()>> {
        self.began.add_permits(1);
        let (go, publish) = (self.go.clone(), self.memo.publish(batch));
        Box::pin(async move {
            go.acquire_owned().await.unwrap().forget();
            publish.await
        })
    }

    fn limit(&self) -> usize {
        1 << 20
    }
}

pub fn gated<D: Database>(ground: &Ground<D>, lease: Duration) -> (Relay, Arc<Gate>) {
    let gate = Gate { began: Semaphore::new(0), go: Arc::new(Semaphore::new(0)), memo: Memo::new() };
    let gate = Arc::new(gate);
    let options = RelayOptions { lease, ..RelayOptions::default() };
    (Relay::new(&ground.server.url(), gate.clone(), options).unwrap(), gate)
}

async fn a_lease_that_ends_in_mid_publish_is_a_mismatch_and_overwrites_nothing<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let client = ground.server.connect().await;
    insert_numbers(&client, 3, 0).await;
    let (slow, gate) = gated(&ground, Duration::from_secs(30));
    let publishing = tokio::spawn(async move { slow.relay_batch().await.unwrap() });
    within(gate.began.acquire()).await.unwrap().forget();
    // As when the process of that relay stood still for longer than its lease.
    client.run(&format!("UPDATE polybus_outbox SET lease_until = {} WHERE status = 'claimed'", D::ago(1))).await;
    let other = ground.relay(&bus).relay_batch().await.unwrap();
    assert_eq!((other.attempted, other.relayed), (3, 3));
    let marks = "SELECT seq, status, lease_token, delivered_at FROM polybus_outbox ORDER BY seq";
    let before = ground.server.sql(marks);
    gate.go.add_permits(1);
    let batch = within(publishing).await.unwrap();
    assert_eq!(batch, RelayBatch { attempted: 3, relayed: 0, ownership_mismatches: 3, ..RelayBatch::default() });
    assert_eq!(ground.server.sql(marks), before);
    assert_eq!(ground.count("delivered"), 3);
}

async fn a_publish_longer_than_the_lease_keeps_it<D: Database>() {
    let ground = Ground::<D>::on();
    let client = ground.server.connect().await;
    insert_numbers(&client, 3, 1).await;
    let (slow, gate) = gated(&ground, Duration::from_millis(300));
    let publishing = tokio::spawn(async move { slow.relay_batch().await.unwrap() });
    within(gate.began.acquire()).await.unwrap().forget();
    let first = ground.server.sql("SELECT max(lease_until) FROM polybus_outbox");
    let bus = Memo::new();
    let other = ground.relay(&bus);
    // Three extensions are three times a third of a lease.
    let then = D::after(&first, 300);
    let until = format!("SELECT CASE WHEN min(lease_until) > {then} THEN 1 ELSE 0 END FROM polybus_outbox");
    while ground.server.sql(&until) != "1" {
        insert(&client, &event(9, Some("key-0"))).await;
        assert_eq!(other.relay_batch().await.unwrap(), RelayBatch::default());
        client.run("DELETE FROM polybus_outbox WHERE seq > 3 AND status = 'pending'").await;
    }
    gate.go.add_permits(1);
    assert_eq!(within(publishing).await.unwrap().relayed, 3);
}

#[tokio::test]
async fn the_next_rows_are_claimed_during_a_publish_except_of_its_keys_and_go_back_in_order() {
    let ground = Ground::new();
    let client = ground.server.connect().await;
    for number in 0..6 {
        insert(&client, &event(number, (number == 1 || number == 3).then_some("key"))).await;
    }
    let gate = Gate { began: Semaphore::new(0), go: Arc::new(Semaphore::new(0)), memo: Memo::new() };
    let gate = Arc::new(gate);
    let options = RelayOptions { batch: 2, ..RelayOptions::default() };
    let relay = Relay::new(&ground.server.url(), gate.clone(), options).unwrap();
    let claimed = |count: u64, delivered: usize| {
        let (ground, relay) = (&ground, &relay);
        eventually("so many rows are claimed", move || async move {
            Ok(relay.stats().await?.claimed == count && ground.count("delivered") == delivered)
        })
    };
    working(std::slice::from_ref(&relay), async {
        gate.began.acquire().await.unwrap().forget();
        // 0 and 1, which are published; 2 and 4, because 3 waits for the other one of its key.
        claimed(4, 0).await;
        gate.memo.away.store(true, std::sync::atomic::Ordering::SeqCst);
        // The bus was asked before it went away: that publish is the last which works.
        gate.go.add_permits(1);
        gate.began.acquire().await.unwrap().forget();
        claimed(4, 2).await;
        gate.go.add_permits(1);
        claimed(0, 2).await;
        gate.memo.away.store(false, std::sync::atomic::Ordering::SeqCst);
        gate.go.add_permits(100);
        ground.until_delivered(&client, 6).await;
    })
    .await;
    assert_eq!(gate.memo.numbers(), [0, 1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn one_relay_at_a_time_claims() {
    let (ground, bus) = (Ground::new(), Memo::new());
    let client = ground.server.connect().await;
    insert(&client, &event(0, None)).await;
    let other = ground.server.connect().await;
    let lock = "SELECT pg_advisory_xact_lock((CAST(1886350457 AS BIGINT) << 32) + CAST(CAST('polybus_outbox' AS regclass) AS oid)::bigint)";
    other.batch_execute(&format!("BEGIN; {lock}")).await.unwrap();
    let relay = ground.relay(&bus);
    assert_eq!(relay.relay_batch().await.unwrap(), RelayBatch::default());
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 1);
}
