//! What a relay says when it cannot work.

use std::sync::Arc;

use polybus_conformance::maria_server::MariaServer;
use polybus_core::ErrorKind;
use polybus_core::outbox::Table;
use polybus_core::outbox::relay::{Relay, RelayOptions};

use crate::databases::{Database, on_each_database};
use crate::ground::{Ground, Memo, event, insert};

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

async fn a_user_that_may_only_read_is_told_what_to_grant<D: Database>() {
    let ground = Ground::<D>::on();
    insert(&ground.server.connect().await, &event(1, None)).await;
    ground.server.sql("GRANT SELECT ON polybus_outbox TO shop");
    let url = ground.server.url_of("shop:secret");
    let error = relay(&url).relay_batch().await.unwrap_err();
    assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
    ground.server.sql("GRANT UPDATE, DELETE ON polybus_outbox TO shop");
    assert_eq!(relay(&url).relay_batch().await.unwrap().relayed, 1);
    insert(&ground.server.connect().await, &event(2, None)).await;
    let error = relay(&ground.server.read_only_url()).relay_batch().await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.message().contains("primary"), "{error}");
}

#[tokio::test]
async fn in_mariadb_a_user_that_may_only_read_ends_a_run_at_once() {
    let ground = Ground::<MariaServer>::on();
    ground.server.sql("GRANT SELECT ON polybus_outbox TO shop");
    let error = relay(&ground.server.url_of("shop:secret")).run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
    ground.server.sql("GRANT UPDATE, DELETE ON polybus_outbox TO shop");
    let error = relay(&ground.server.read_only_url()).run().await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.message().contains("primary"), "{error}");
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
