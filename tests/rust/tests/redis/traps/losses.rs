//! The server loses the groups while they are in use.

use std::time::Duration;

use polybus_conformance::redis_server::{Data, RedisServer};
use polybus_conformance::*;
use polybus_core::handler::Outcome;

use super::*;

/// Commands a second that a few idle subscriptions may need; a loop without a pause makes thousands.
const IDLE: u64 = 200;

async fn recovers_from(lose: impl FnOnce(&mut RedisServer), stream_is_lost: bool) {
    let mut server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let (_mail, mut mail) = subscribe(&one, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let (_audit, mut audit) = subscribe(&one, "*", one_by_one("audit"), |_| Outcome::Done).await;
    let (_other, mut other) = subscribe(&two, "*", one_by_one("other"), |_| Outcome::Done).await;
    publish(&two, "order.created", "0").await;
    for seen in [&mut mail, &mut audit, &mut other] {
        assert_eq!(payload(&seen.next().await), "0");
    }
    for group in [MAIL, "test/audit", "test/other"] {
        finished(&one, group).await;
    }
    lose(&mut server);
    for number in ["1", "2"] {
        publish(&two, "order.created", number).await;
        for seen in [&mut mail, &mut audit, &mut other] {
            assert_eq!(payload(&seen.next().await), number);
        }
    }
    let resets = counted(&one, "stream_resets_total");
    assert_eq!(resets, if stream_is_lost { 2 } else { 1 });
    assert!(polybus_core::metrics::render(&one).contains("\npolybus_stream_resets_total{"));
    for group in [MAIL, "test/audit", "test/other"] {
        finished(&one, group).await;
    }
    quiet(&server).await;
    assert_eq!(counted(&one, "stream_resets_total"), resets);
    assert!(mail.is_empty() && audit.is_empty() && other.is_empty());
}

/// Nobody asks the server again and again.
async fn quiet(server: &RedisServer) {
    let before = info(server, "total_commands_processed");
    tokio::time::sleep(Duration::from_secs(1)).await; // what is measured
    let asked = info(server, "total_commands_processed") - before;
    assert!(asked < IDLE, "{asked} commands in a second");
}

#[tokio::test]
async fn everything_is_flushed() {
    recovers_from(|server| drop(server.cli(&["FLUSHALL"])), true).await;
}

#[tokio::test]
async fn the_stream_is_deleted() {
    recovers_from(|server| drop(server.cli(&["DEL", EVENTS])), true).await;
}

#[tokio::test]
async fn a_group_is_destroyed() {
    recovers_from(|server| drop(server.cli(&["XGROUP", "DESTROY", EVENTS, MAIL])), false).await;
}

#[tokio::test]
async fn the_server_restarts_empty() {
    recovers_from(|server| server.restart(Data::Lost), true).await;
}

/// A loss that nobody's event tells about is noticed all the same, and costs no hot loop until then.
#[tokio::test]
async fn a_loss_is_noticed_without_an_event() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let (_audit, mut audit) = subscribe(&bus, "*", one_by_one("audit"), |_| Outcome::Done).await;
    server.cli(&["FLUSHALL"]);
    until("both groups are there again", || counted(&bus, "stream_resets_total") == 2).await;
    quiet(&server).await;
    publish(&bus, "order.created", "1").await;
    assert_eq!((payload(&mail.next().await), payload(&audit.next().await)), ("1".into(), "1".into()));
}

/// Its neighbour on the same bus has made everything new by the time it looks.
#[tokio::test]
async fn a_busy_subscription_recovers_after_another() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let gate = Gate::new();
    let (_audit, mut audit) = wait_at(&gate, &bus, one_by_one("audit"), || Outcome::Done).await;
    let (_mail, mut mail) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&bus, "order.created", "0").await;
    assert_eq!((payload(&audit.next().await), payload(&mail.next().await)), ("0".into(), "0".into()));
    server.cli(&["FLUSHALL"]);
    publish(&bus, "order.created", "1").await;
    assert_eq!(payload(&mail.next().await), "1");
    gate.open(9);
    assert_eq!(payload(&audit.next().await), "1");
    assert_eq!(counted(&bus, "stream_resets_total"), 2);
}

#[tokio::test]
async fn a_group_that_was_deleted_on_purpose_stays_deleted() {
    let server = RedisServer::start();
    let (one, two) = (bus(&server.url()), bus(&server.url()));
    let (_mail, mail) = subscribe(&one, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let (_audit, mut audit) = subscribe(&one, "*", one_by_one("audit"), |_| Outcome::Done).await;
    assert!(two.delete_group(MAIL).await.unwrap());
    for number in 0..20 {
        publish(&two, "order.created", &number.to_string()).await;
        assert_eq!(payload(&audit.next().await), number.to_string());
    }
    quiet(&server).await; // long enough to be noticed: a keeper looks every second
    let groups = server.cli(&["XINFO", "GROUPS", EVENTS]);
    assert!(groups.contains("test/audit") && !groups.contains(MAIL), "{groups}");
    assert!(mail.is_empty());
    assert_eq!(counted(&one, "stream_resets_total"), 0);
    assert!(two.group_stats(MAIL).await.is_err());
    // Who wants it again says so.
    let (_again, again) = subscribe(&two, "*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&two, "order.created", "20").await;
    // Whichever of the two asks first: the old subscription is a member of the new group.
    until("the new group gets it", || !again.is_empty() || !mail.is_empty()).await;
}
