//! A server whose memory is full: what is there goes on being handled, and nothing is lost.
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Job, Outcome, from_batch_fn, from_fn};
use polybus_core::transport::Outgoing;
use polybus_core::{BatchOptions, Bus, BusOptions, ErrorKind, SubscribeOptions};

use crate::support::*;

/// From now on the server refuses what needs memory.
fn fill(server: &RedisServer) {
    server.cli(&["CONFIG", "SET", "maxmemory", "1"]);
}

fn make_room(server: &RedisServer) {
    server.cli(&["CONFIG", "SET", "maxmemory", "0"]);
}

async fn assert_full(bus: &Bus) {
    assert_error(&refused(bus).await, ErrorKind::ConnectionFailed, &["out of memory", "maxmemory"]);
}

#[tokio::test]
async fn a_publish_is_refused_and_what_is_there_is_handled() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let (subscription, mut seen) = listen(&bus, "n", "all").await;
    subscription.pause();
    publish_numbers(&bus, "n", 20).await;
    fill(&server);
    assert_full(&bus).await;
    let batch = vec![outgoing(event("n", "98")), outgoing(event("n", "99"))];
    assert_error(&bus.publish(batch).await.unwrap_err(), ErrorKind::ConnectionFailed, &["out of memory"]);
    subscription.resume();
    seen.all_numbers(20).await;
    finished(&bus, "test/all").await;
    assert_full(&bus).await;
    // A process that begins now, on a group that is known, can help too.
    let other = self::bus(&server.url());
    let (_, _others) = listen(&other, "n", "all").await;
    make_room(&server);
    publish(&bus, "n", "20").await;
}

#[tokio::test]
async fn a_dead_letter_waits_until_it_can_be_stored() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let reject = |job: &Job| match payload(job).as_str() {
        "0" => Outcome::Rejected(Failure::new("Trouble", "as the test wants", "at test")),
        _ => Outcome::Done,
    };
    let (subscription, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("all"), reject).await;
    subscription.pause();
    publish_numbers(&bus, "n", 20).await;
    fill(&server);
    subscription.resume();
    seen.all_numbers(20).await;
    eventually("all but one are finished", || async { Ok(bus.group_stats("test/all").await?.in_flight == 1) }).await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
    make_room(&server);
    finished(&bus, "test/all").await;
    let letters = bus.dead_letters(Default::default(), None, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].event.as_ref().unwrap().payload, "0");
}

/// What comes again is acknowledged by the script that stores dead letters.
#[tokio::test]
async fn acknowledgements_do_not_wait_for_a_dead_letter() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let trouble = || Failure::new("Trouble", "as the test wants", "at test");
    // A batch, so that all are settled in one go.
    let handler = from_batch_fn(move |jobs: Vec<Job>| async move {
        let outcome = |job: &Job| match (job.attempt, payload(job).as_str()) {
            (1, _) => Outcome::RetryAfter(Duration::from_millis(500), trouble()),
            (_, "0") => Outcome::Rejected(trouble()),
            _ => Outcome::Done,
        };
        jobs.iter().map(|job| (job.id, outcome(job))).collect()
    });
    let batch = Some(BatchOptions { size: 10, wait: Duration::from_secs(60) });
    bus.subscribe("n", handler, SubscribeOptions { batch, ..SubscribeOptions::new("all") }).await.unwrap();
    publish_numbers(&bus, "n", 10).await;
    eventually("all wait", || async { Ok(bus.group_stats("test/all").await?.retrying == 10) }).await;
    fill(&server);
    eventually("all but one are finished", || async {
        let stats = bus.group_stats("test/all").await?;
        Ok(stats.in_flight == 1 && stats.retrying == 0)
    })
    .await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
    make_room(&server);
    finished(&bus, "test/all").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 1);
}

/// Moving what is there needs no room worth speaking of: retries and delayed events that fall due come all the same, and
/// hold nothing up.
#[tokio::test]
async fn retries_and_delayed_events_come_while_the_server_is_full() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let failed = AtomicBool::new(false);
    let wait = Duration::from_millis(300);
    let (_, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("all"), move |job| {
        match payload(job) == "1" && !failed.swap(true, Ordering::SeqCst) {
            true => Outcome::RetryAfter(wait, Failure::new("Trouble", "as the test wants", "at test")),
            false => Outcome::Done,
        }
    })
    .await;
    publish(&bus, "n", "1").await;
    seen.next().await;
    let delayed = Outgoing { delay: Some(wait), ..outgoing(event("n", "2")) };
    bus.publish(vec![delayed]).await.unwrap();
    eventually("it waits for its retry", || async { Ok(bus.group_stats("test/all").await?.retrying == 1) }).await;
    fill(&server);
    let mut come: Vec<_> = seen.take(2).await.iter().map(payload).collect();
    come.sort_unstable();
    assert_eq!(come, ["1", "2"]);
    finished(&bus, "test/all").await;
    assert_full(&bus).await;
}

/// A full server that is never swept would stay full.
#[tokio::test]
async fn finished_events_make_room() {
    let server = RedisServer::start();
    let bus = bus_with(&server.url(), BusOptions { retention: Some(Duration::ZERO), ..BusOptions::new("test") });
    let (subscription, mut seen) = listen(&bus, "n", "all").await;
    subscription.pause();
    publish_numbers(&bus, "n", 20).await;
    fill(&server);
    subscription.resume();
    seen.all_numbers(20).await;
    eventually("the log is swept", || async { Ok(server.cli(&["XLEN", "polybus:{default}:events"]) == "0") }).await;
}

/// Leases are kept, also those of retries, which lie in another place than first attempts.
#[tokio::test]
async fn what_is_being_handled_stays_ours() {
    let server = RedisServer::start();
    let lease = Duration::from_secs(1);
    let options = || BusOptions { lease, ..BusOptions::new("test") };
    let bus = bus_with(&server.url(), options());
    let (sender, mut started) = tokio::sync::mpsc::unbounded_channel();
    let (leave, left) = tokio::sync::watch::channel(false);
    let handler = from_fn(move |job| {
        let (sender, mut left) = (sender.clone(), left.clone());
        async move {
            let first = job.attempt == 1 && payload(&job) == "1";
            drop(sender.send(job));
            if first {
                return failed();
            }
            drop(left.wait_for(|left| *left).await);
            Outcome::Done
        }
    });
    let subscription = bus.subscribe("n", handler, SubscribeOptions::new("all")).await.unwrap();
    publish(&bus, "n", "1").await;
    publish(&bus, "n", "2").await;
    for _ in 0..3 {
        within(started.recv()).await.unwrap();
    }
    let other = bus_with(&server.url(), options());
    let (_, others) = listen(&other, "n", "all").await;
    fill(&server);
    // Within two leases a lost one would have been taken over.
    tokio::time::sleep(3 * lease).await;
    assert!(others.is_empty());
    leave.send_replace(true);
    finished(&bus, "test/all").await;
    assert!(others.is_empty());
    assert_eq!(subscription.counters().leases_lost.load(Ordering::SeqCst), 0);
}
