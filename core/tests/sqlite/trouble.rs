//! What a bus makes of a store in trouble: bytes that are no event, a lock that is not given back.

use std::time::Duration;

use polybus_core::handler::{Outcome, from_fn};
use polybus_core::{Bus, BusOptions, ErrorKind, SubscribeOptions};

use crate::support::{PATIENCE, outgoing, place, until, url};

/// X8: a dead letter with its bytes at first sight; what comes after it is handled.
#[tokio::test]
async fn bytes_that_are_no_event_become_a_dead_letter() {
    let place = place();
    let bus = Bus::new(&url(&place.path), BusOptions::new("shop")).unwrap();
    let (sender, mut handled) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_fn(move |job| {
        sender.send(job.event.payload.clone()).unwrap();
        std::future::ready(Outcome::Done)
    });
    let subscription = bus.subscribe("order.*", handler, SubscribeOptions::new("s")).await.unwrap();
    bus.publish(vec![outgoing(1)]).await.unwrap();
    assert_eq!(handled.recv().await.unwrap(), "1");
    subscription.drain(PATIENCE).await;
    bus.publish(vec![outgoing(2), outgoing(3)]).await.unwrap();
    bus.close(PATIENCE).await;

    let file = rusqlite::Connection::open(&place.path).unwrap();
    let last = "(SELECT max(seq) FROM polybus_events)";
    let damaged = file.execute(&format!("UPDATE polybus_events SET event = x'7b00ff' WHERE seq = {last} - 1"), []);
    assert_eq!(damaged.unwrap(), 1);
    drop(file);

    bus.start().await.unwrap();
    let (sender, mut handled) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_fn(move |job| {
        sender.send(job.event.payload.clone()).unwrap();
        std::future::ready(Outcome::Done)
    });
    bus.subscribe("order.*", handler, SubscribeOptions::new("s")).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, handled.recv()).await.unwrap().unwrap(), "3");
    until("the dead letter", async || bus.dead_count(Default::default()).await.unwrap() == 1).await;
    let letter = bus.dead_letters(Default::default(), None, 1).await.unwrap().remove(0);
    assert_eq!((letter.reason.as_str(), letter.attempts, &letter.raw[..]), ("undecodable", 1, &b"{\x00\xff"[..]));
    assert!(letter.event.is_none());
}

/// X14: the lock is held elsewhere; the publish fails within its timeout, and is not stored afterwards either.
#[tokio::test]
async fn a_publish_that_cannot_start_fails_in_time_and_never_happens() {
    let place = place();
    let timeout = Duration::from_millis(200);
    let options = BusOptions { publish_timeout: timeout, ..BusOptions::new("shop") };
    let bus = Bus::new(&url(&place.path), options).unwrap();
    let (sender, mut handled) = tokio::sync::mpsc::unbounded_channel();
    let handler = from_fn(move |job| {
        sender.send(job.event.payload.clone()).unwrap();
        std::future::ready(Outcome::Done)
    });
    bus.subscribe("order.*", handler, SubscribeOptions::new("s")).await.unwrap();

    let lock = std::fs::File::open(format!("{}.lock", place.path.display())).unwrap();
    lock.lock().unwrap();
    let error = tokio::time::timeout(PATIENCE, bus.publish(vec![outgoing(1)])).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PublishTimeout);
    assert!(error.is_retryable());
    lock.unlock().unwrap();

    bus.publish(vec![outgoing(2)]).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, handled.recv()).await.unwrap().unwrap(), "2");
    bus.close(PATIENCE).await;
}
