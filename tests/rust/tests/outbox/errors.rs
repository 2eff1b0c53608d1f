//! What a relay says when it cannot work.

use std::sync::Arc;

use polybus_core::ErrorKind;
use polybus_core::outbox::relay::{Relay, RelayOptions};

use crate::ground::{Ground, Memo, event, insert};

fn relay(url: &str) -> Relay {
    Relay::new(url, Memo::new(), RelayOptions::default()).unwrap()
}

#[tokio::test]
async fn a_missing_or_older_table_is_told_with_the_command_that_makes_it() {
    let ground = Ground::bare();
    let missing = relay(&ground.server.url());
    for error in [missing.run().await.unwrap_err(), missing.relay_batch().await.unwrap_err()] {
        assert_eq!(error.kind(), ErrorKind::InvalidConfig);
        assert!(error.message().contains("polybus outbox ddl --dialect postgres"), "{error}");
    }
    ground.make("polybus_outbox");
    missing.check().await.unwrap();
    ground.server.sql("ALTER TABLE polybus_outbox DROP COLUMN last_error");
    let error = missing.run().await.unwrap_err();
    assert!(error.message().contains("another version"), "{error}");
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_never_shown() {
    let ground = Ground::new();
    let error = relay(&ground.server.url_of("shop:wr0ng")).run().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AuthFailed);
    assert!(!format!("{error} {error:?}").contains("wr0ng") && error.message().contains("shop"), "{error:?}");
}

#[tokio::test]
async fn a_user_that_may_only_read_is_told_what_to_grant() {
    let ground = Ground::new();
    insert(&ground.server.connect().await, &event(1, None)).await;
    ground.server.sql("GRANT SELECT ON polybus_outbox TO shop");
    let url = ground.server.url_of("shop:secret");
    let error = relay(&url).relay_batch().await.unwrap_err();
    assert!(error.kind() == ErrorKind::AuthFailed && error.message().contains("GRANT"), "{error}");
    ground.server.sql("GRANT UPDATE, DELETE ON polybus_outbox TO shop");
    assert_eq!(relay(&url).relay_batch().await.unwrap().relayed, 1);
    let read_only = format!("{}?options=-c%20default_transaction_read_only%3Don", ground.server.url());
    let error = relay(&read_only).relay_batch().await.unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidConfig && error.message().contains("primary"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_in_a_schema_and_a_server_that_is_away() {
    let mut ground = Ground::bare();
    ground.server.sql("CREATE SCHEMA app");
    ground.make("app.Events");
    let options = RelayOptions { table: "app.Events".into(), ..RelayOptions::default() };
    let bus = Memo::new();
    let relay = Relay::new(&ground.server.url(), bus.clone(), options).unwrap();
    let add = "INSERT INTO app.\"Events\" (event_id, type, event) VALUES ('1', 'a', 'no event')";
    ground.server.sql(add);
    assert_eq!(relay.relay_batch().await.unwrap().malformed, 1);
    ground.server.stop();
    let error = relay.relay_batch().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionFailed, "{error}");
    assert!(relay.health().database.is_some());
    ground.server.restart();
    assert_eq!(relay.replay(None).await.unwrap(), 1);
    assert_eq!(Arc::strong_count(&bus), 2);
}
