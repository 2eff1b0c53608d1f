//! Delays, expiry, retention, the user's limits.

use std::time::Duration;

use polybus_core::dead_letter::DeadLetterFilter;
use polybus_core::delivery::{DeadReason, Failure, Verdict};
use polybus_core::transport::{GroupSpec, Outgoing, Settings, Start};

use crate::support::*;

fn timed(n: usize, delay: Option<Duration>, expires_in: Option<Duration>) -> Outgoing {
    Outgoing { delay, expires_in, ..outgoing(n) }
}

/// Events in the file, counted from outside after it was closed.
fn kept(path: &std::path::Path) -> i64 {
    let file = rusqlite::Connection::open(path).unwrap();
    let ok: String = file.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(ok, "ok");
    file.query_row("SELECT count(*) FROM polybus_events", [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_delayed_event_survives_a_restart_and_comes_when_due() {
    let place = place();
    let bus = open(&place.path).await;
    bus.subscribe(spec("g")).await.unwrap().close().await;
    let started = std::time::Instant::now();
    let delay = Duration::from_millis(600);
    let receipts = bus.publish(vec![timed(1, Some(delay), None), outgoing(0)], PATIENCE).await.unwrap();
    assert!(receipts[0].position.is_none() && receipts[1].position.is_some());
    bus.close().await;
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("g")).await.unwrap();
    assert_eq!(numbers(&take(&source, 9).await), [0]);
    assert_eq!(numbers(&take(&source, 9).await), [1]);
    assert!(started.elapsed() >= delay);
    bus.close().await;
}

#[tokio::test]
async fn an_expired_event_is_skipped_and_counted() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("g")).await.unwrap();
    let short = Some(Duration::from_millis(20));
    bus.publish(vec![timed(0, None, short), timed(1, None, None)], PATIENCE).await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await; // the promise is about time itself
    assert_eq!(numbers(&take(&source, 9).await), [1]);
    assert_eq!(bus.group_stats("g".into()).await.unwrap().expired, 1);
    bus.close().await;
}

#[tokio::test]
async fn retention_keeps_what_a_group_has_not_finished() {
    let place = place();
    let bus = open_with(&place.path, Settings { retention: Some(Duration::ZERO), ..settings() }).await;
    let (one, two) = (bus.subscribe(spec("one")).await.unwrap(), bus.subscribe(spec("two")).await.unwrap());
    publish(&bus, 0..2500).await;
    let of_one = take_all(&one, 2500).await;
    settle(&one, &of_one, Verdict::Ack).await;
    let of_two = take_all(&two, 2500).await;
    // All but number 1,000 of the second group.
    let (unfinished, finished): (Vec<_>, Vec<_>) = of_two.into_iter().partition(|delivery| number(delivery) == 1000);
    settle(&two, &finished, Verdict::Ack).await;
    let all = || async {
        let probe = GroupSpec { start: Start::Beginning, ..spec("probe") };
        let source = bus.subscribe(probe).await.unwrap();
        let lag = bus.group_stats("probe".into()).await.unwrap().lag;
        source.close().await;
        bus.delete_group("probe".into()).await.unwrap();
        lag
    };
    until("the first thousand are gone", || async { all().await == 1500 }).await;
    settle(&two, &unfinished, Verdict::Ack).await;
    until("the rest is gone", || async { all().await == 0 }).await;
    bus.close().await;
    assert_eq!(kept(&place.path), 0);
}

#[tokio::test]
async fn without_groups_nothing_is_dropped() {
    let place = place();
    let bus = open_with(&place.path, Settings { retention: Some(Duration::ZERO), ..settings() }).await;
    publish(&bus, 0..50).await;
    tokio::time::sleep(Duration::from_millis(1500)).await; // longer than the tick
    bus.close().await;
    assert_eq!(kept(&place.path), 50);
}

#[tokio::test]
async fn what_the_users_limits_drop_is_counted() {
    for limits in [
        Settings { max_events: Some(10), ..settings() },
        Settings { max_age: Some(Duration::from_millis(1)), ..settings() },
    ] {
        let left = limits.max_events.unwrap_or(0);
        let place = place();
        let bus = open_with(&place.path, limits).await;
        let source = bus.subscribe(spec("g")).await.unwrap();
        publish(&bus, 0..30).await;
        let held = take_all(&source, 5).await; // in a handler: not lost
        settle(&source, &held[3..4], Verdict::Retry { after: Duration::from_secs(60), failure: Failure::default() })
            .await;
        until("the limit is kept", || async { bus.group_stats("g".into()).await.unwrap().expired == 30 - 4 - left })
            .await;
        let stats = bus.group_stats("g".into()).await.unwrap();
        assert_eq!((stats.lag, stats.in_flight, stats.retrying), (left, 4, 0));
        let bury = Verdict::DeadLetter { reason: DeadReason::Rejected, failure: Failure::default() };
        assert_eq!(settle(&source, &held[..1], bury).await, 0);
        let dead = bus.dead_letters(DeadLetterFilter::default(), None, 9).await.unwrap();
        assert!(dead[0].event.is_some(), "the dead letter has its event");
        bus.close().await;
        assert_eq!(kept(&place.path), i64::try_from(left).unwrap());
    }
}
