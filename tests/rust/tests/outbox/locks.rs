//! Rows that somebody else has locked, and locks that the database takes back.

use polybus_conformance::maria_server::MariaServer;
use polybus_conformance::{eventually, within};

use crate::databases::{Database, Session, on_each_database};
use crate::ground::{Ground, Memo, event, insert};

on_each_database!(a_locked_row_holds_back_its_key_and_nobody_waits_for_it);

async fn a_locked_row_holds_back_its_key_and_nobody_waits_for_it<D: Database>() {
    let (ground, bus) = (Ground::<D>::on(), Memo::new());
    let (client, holder) = (ground.server.connect().await, ground.server.connect().await);
    for (number, key) in [(0, Some("a")), (1, Some("a")), (2, Some("b")), (3, None), (4, Some("a"))] {
        insert(&client, &event(number, key)).await;
    }
    holder.run("BEGIN").await;
    holder.run("SELECT seq FROM polybus_outbox WHERE seq = 2 FOR UPDATE").await;
    let relay = ground.relay(&bus);
    // The claim ends while the lock is held, which is for ever.
    assert_eq!(within(relay.relay_batch()).await.unwrap().relayed, 3);
    assert_eq!(bus.numbers(), [0, 2, 3]);
    assert_eq!((relay.stats().await.unwrap().claimed, ground.count("pending")), (0, 2));
    holder.run("COMMIT").await;
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 2);
    assert_eq!(bus.numbers(), [0, 2, 3, 1, 4]);
}

/// Two transactions that wait for each other: InnoDB takes back the one that changed less, which is the relay's.
#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_a_deadlock_took_back_is_made_again() {
    let (ground, bus) = (Ground::<MariaServer>::on(), Memo::new());
    let client = Database::connect(&ground.server).await;
    client.run("CREATE TABLE ballast (n INT PRIMARY KEY)").await;
    client
        .run("INSERT INTO polybus_outbox (event_id, type, event, status) SELECT seq, 'a', '', 'dead' FROM seq_1_to_3")
        .await;
    client.run("BEGIN").await;
    client.run("INSERT INTO ballast SELECT seq FROM seq_1_to_1000").await;
    client.run("SELECT seq FROM polybus_outbox WHERE seq = 3 FOR UPDATE").await;
    let relay = ground.relay(&bus);
    let purging = tokio::spawn({
        let relay = relay.clone();
        async move { relay.purge_dead(None).await }
    });
    eventually("the relay waits for the lock", || async {
        Ok(client.texts(&status("Innodb_row_lock_current_waits")).await.unwrap() == ["1"])
    })
    .await;
    client.run("SELECT seq FROM polybus_outbox WHERE seq = 1 FOR UPDATE").await;
    client.run("COMMIT").await;
    assert_eq!(within(purging).await.unwrap().unwrap(), 3);
    assert_eq!(client.texts(&status("Innodb_deadlocks")).await.unwrap(), ["1"]);
}

fn status(name: &str) -> String {
    format!("SELECT VARIABLE_VALUE FROM information_schema.GLOBAL_STATUS WHERE VARIABLE_NAME = '{name}'")
}
