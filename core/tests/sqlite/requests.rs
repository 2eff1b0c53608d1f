//! Mailboxes and responders in the file: what expires, and a file that has them not.

use std::time::Duration;

use polybus_core::transport::GroupSpec;
use rusqlite::Connection;

use super::support::*;

fn count(path: &std::path::Path, table: &str) -> i64 {
    let connection = Connection::open(path).unwrap();
    connection.query_row(&format!("SELECT count(*) FROM polybus_{table}"), [], |row| row.get(0)).unwrap()
}

/// What a requester that died left is removed by the next reply, whoever gets it.
#[tokio::test]
async fn letters_that_nobody_fetches_vanish() {
    let place = place();
    let bus = open(&place.path).await;
    let post = |mailbox: &str, ttl| bus.post(mailbox.into(), bytes::Bytes::from_static(b"x"), ttl);
    post("0a", Duration::from_millis(1)).await.unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while count(&place.path, "mail WHERE mailbox = '0a'") > 0 {
        assert!(std::time::Instant::now() < deadline);
        post("0b", PATIENCE).await.unwrap();
    }
    assert!(bus.mailbox("0a".into()).unwrap().next().await.unwrap().is_empty());
    let mailbox = bus.mailbox("0b".into()).unwrap();
    assert!(!mailbox.next().await.unwrap().is_empty());
    while count(&place.path, "mail") > 0 {
        assert!(!mailbox.next().await.unwrap().is_empty());
    }
    assert_eq!(count(&place.path, "mail"), 0);
    bus.close().await;
}

/// A version without requests has made the file, and may go on using it.
#[tokio::test]
async fn a_file_without_mailboxes_gets_them() {
    let place = place();
    open(&place.path).await.close().await;
    let old = Connection::open(&place.path).unwrap();
    old.execute_batch("DROP TABLE polybus_mail; DROP TABLE polybus_responders;").unwrap();
    drop(old);
    let bus = open(&place.path).await;
    assert_eq!(bus.responders(TYPE.into()).await.unwrap(), Some(false));
    let source = bus.subscribe(GroupSpec { responder: true, ..spec("g") }).await.unwrap();
    assert_eq!(bus.responders(TYPE.into()).await.unwrap(), Some(true));
    assert_eq!(bus.responders("other".into()).await.unwrap(), Some(false));
    source.close().await;
    assert_eq!(bus.responders(TYPE.into()).await.unwrap(), Some(false));
    assert_eq!(count(&place.path, "responders"), 0);
    bus.close().await;
}
