//! What a relay says when it cannot work.

use std::sync::Arc;

use polybus_conformance::maria_server::MariaServer;
use polybus_conformance::postgres_server::PostgresServer;
use polybus_conformance::{eventually, within};
use polybus_core::ErrorKind;
use polybus_core::outbox::Table;
use polybus_core::outbox::relay::{Relay, RelayOptions};

use crate::databases::{Database, on_each_database};
use crate::ground::{Ground, Memo, event, insert, working};

fn relay(url: &str) -> Relay {
    Relay::new(url, Memo::new(), RelayOptions::default()).unwrap()
}

on_each_database!(
    a_missing_or_older_table_is_told_with_the_command_that_makes_it,
    a_wrong_password_is_refused_and_never_shown,
    a_user_that_may_only_read_is_told_what_to_grant,
    a_table_in_a_schema_and_a_server_that_is_away,
);

async fn a_missing_or_older_table_is_told_with_the_command_that_makes_it<D: Database>() {
    let ground = Ground::<D>::bare();
    let command = format!("polybus outbox ddl --dialect {}", D::DIALECT.name());
    let missing = relay(&ground.server.url());
    for error in [missing.run().await.unwrap_err(), missing.relay_batch().await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.message().contains(&command), "{error}");
    }
    ground.make("polybus_outbox");
    missing.check().await.unwrap();
    ground.server.sql("ALTER TABLE polybus_outbox DROP COLUMN last_error");
    let error = missing.run().await.unwrap_err();
    assert!(error.message().contains("another version"), "{error}");
}

async fn a_wrong_password_is_refused_and_never_shown<D: Database>() {
    let ground = Ground::<D>::on();
    let error = relay(&ground.server.url_of("shop:wr0ng")).run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AuthFailed);
    assert!(!format!("{error} {error:?}").contains("wr0ng") && error.message().contains("shop"), "{error:?}");
}

#[tokio::test]
async fn a_user_that_lacks_a_right_is_told_which_and_what_to_grant() {
    let ground = Ground::<PostgresServer>::bare();
    ground.server.sql("CREATE SCHEMA app");
    ground.make("app.outbox");
    let add = "INSERT INTO app.outbox (event_id, type, event) VALUES ('1', 'a', 'no event')";
    ground.server.sql(add);
    let options = RelayOptions { table: "app.outbox".into(), ..RelayOptions::default() };
    let new = || Relay::new(&ground.server.url_of("shop:secret"), Memo::new(), options.clone()).unwrap();
    let whole = "GRANT USAGE ON SCHEMA \"app\" TO \"shop\"; GRANT SELECT, INSERT, UPDATE, DELETE ON \"app\".\"outbox\" TO \"shop\"";
    for (given, lacking) in [
        ("SELECT 1", "schema app"),
        ("GRANT USAGE ON SCHEMA app TO shop", "table outbox"),
        ("GRANT SELECT ON app.outbox TO shop", "lacks INSERT, UPDATE, DELETE on the table app.outbox"),
    ] {
        ground.server.sql(given);
        // It ends before it has claimed anything, and instead of waiting for somebody to grant it.
        let relay = new();
        for error in [within(relay.run()).await.unwrap_err(), relay.check().await.unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::AuthFailed, "{error}");
            assert!(error.message().contains(lacking) && error.message().contains(whole), "{error}");
            assert!(error.message().contains("shop") && !format!("{error:?}").contains("secret"), "{error:?}");
        }
        let error = relay.relay_batch().await.unwrap_err();
        assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
    }
    ground.server.sql("GRANT INSERT, UPDATE ON app.outbox TO shop");
    let error = new().check().await.unwrap_err();
    assert!(error.message().contains("lacks DELETE on the table app.outbox"), "{error}");
    // What the error says to run is right.
    ground.server.sql(whole);
    let relay = new();
    relay.check().await.unwrap();
    assert_eq!(relay.relay_batch().await.unwrap().dead_lettered, 1);
    assert_eq!(relay.replay(None).await.unwrap(), 1);
    assert_eq!(relay.relay_batch().await.unwrap().dead_lettered, 1);
    assert_eq!(relay.purge_dead(None).await.unwrap(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_is_waited_for() {
    let (ground, bus) = (Ground::new(), Memo::new());
    ground.server.sql("GRANT SELECT, INSERT, UPDATE, DELETE ON polybus_outbox TO shop");
    let relay = Relay::new(&ground.server.url_of("shop:secret"), bus.clone(), RelayOptions::default()).unwrap();
    let client = ground.server.connect().await;
    working(std::slice::from_ref(&relay), async {
        insert(&client, &event(1, None)).await;
        ground.until_delivered(&client, 1).await;
        ground.server.sql("REVOKE UPDATE ON polybus_outbox FROM shop");
        insert(&client, &event(2, None)).await;
        eventually("it says so", || async {
            Ok(relay.health().why().iter().any(|why| why.contains("GRANT SELECT, INSERT, UPDATE, DELETE")))
        })
        .await;
        ground.server.sql("GRANT UPDATE ON polybus_outbox TO shop");
        ground.until_delivered(&client, 2).await;
    })
    .await;
}

fn says_read_only(error: &polybus_core::Error) {
    assert!(error.kind() == ErrorKind::ConnectionFailed && error.is_retryable(), "{error}");
    assert!(error.message().contains("read-only") && error.message().contains("primary"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_only_reads_is_waited_for() {
    let (ground, bus) = (Ground::new(), Memo::new());
    let client = ground.server.connect().await;
    insert(&client, &event(1, None)).await;
    let read_only = format!("{}?options=-c%20default_transaction_read_only%3Don", ground.server.url());
    says_read_only(&relay(&read_only).relay_batch().await.unwrap_err());
    // A setting of the user holds for sessions that begin later.
    ground
        .server
        .sql("GRANT SELECT, INSERT, UPDATE, DELETE ON polybus_outbox TO shop; ALTER ROLE shop SET default_transaction_read_only = on");
    let relay = Relay::new(&ground.server.url_of("shop:secret"), bus.clone(), RelayOptions::default()).unwrap();
    says_read_only(&relay.relay_batch().await.unwrap_err());
    working(std::slice::from_ref(&relay), async {
        eventually("it says so", || async { Ok(relay.health().why().iter().any(|why| why.contains("read-only"))) })
            .await;
        ground.server.sql("ALTER ROLE shop RESET default_transaction_read_only");
        ground.until_delivered(&client, 1).await;
    })
    .await;
    assert_eq!(bus.numbers(), [1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_is_waited_for_until_it_takes_over() {
    let (mut ground, bus) = (Ground::new(), Memo::new());
    let client = ground.server.connect().await;
    insert(&client, &event(1, None)).await;
    let standby = ground.server.standby();
    let relay = Relay::new(&standby.url(), bus.clone(), RelayOptions::default()).unwrap();
    says_read_only(&relay.relay_batch().await.unwrap_err());
    working(std::slice::from_ref(&relay), async {
        eventually("it says so", || async { Ok(relay.health().why().iter().any(|why| why.contains("read-only"))) })
            .await;
        ground.server.stop();
        standby.sql("SELECT pg_promote()");
        let client = standby.connect().await;
        insert(&client, &event(2, None)).await;
        ground.until_delivered(&client, 2).await;
    })
    .await;
    assert_eq!(bus.numbers(), [1, 2]);
}

async fn a_user_that_may_only_read_is_told_what_to_grant<D: Database>() {
    let ground = Ground::<D>::on();
    insert(&ground.server.connect().await, &event(1, None)).await;
    ground.server.sql("GRANT SELECT ON polybus_outbox TO shop");
    let url = ground.server.url_of("shop:secret");
    let error = relay(&url).relay_batch().await.unwrap_err();
    assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
    ground.server.sql("GRANT INSERT, UPDATE, DELETE ON polybus_outbox TO shop");
    assert_eq!(relay(&url).relay_batch().await.unwrap().relayed, 1);
    insert(&ground.server.connect().await, &event(2, None)).await;
    says_read_only(&relay(&ground.server.read_only_url()).relay_batch().await.unwrap_err());
}

#[tokio::test]
async fn in_mariadb_a_user_that_may_only_read_ends_a_run_at_once() {
    let ground = Ground::<MariaServer>::on();
    ground.server.sql("GRANT SELECT ON polybus_outbox TO shop");
    let error = relay(&ground.server.url_of("shop:secret")).run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
}

async fn a_table_in_a_schema_and_a_server_that_is_away<D: Database>() {
    let mut ground = Ground::<D>::bare();
    ground.server.sql("CREATE SCHEMA app");
    ground.make("app.Events");
    let options = RelayOptions { table: "app.Events".into(), ..RelayOptions::default() };
    let bus = Memo::new();
    let relay = Relay::new(&ground.server.url(), bus.clone(), options).unwrap();
    let table = Table::parse("app.Events").unwrap().quoted(D::DIALECT);
    ground.server.sql(&format!("INSERT INTO {table} (event_id, type, event) VALUES ('1', 'a', 'no event')"));
    assert_eq!(relay.relay_batch().await.unwrap().malformed, 1);
    ground.server.stop();
    let error = relay.relay_batch().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert!(relay.health().database.is_some());
    ground.server.restart();
    assert_eq!(relay.replay(None).await.unwrap(), 1);
    assert_eq!(Arc::strong_count(&bus), 2);
}
