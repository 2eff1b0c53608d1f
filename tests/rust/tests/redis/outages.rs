//! Servers that stop, die, hang or come back empty, and networks that break: publishers are told in time, consumers come
//! back and miss nothing.
use std::time::{Duration, Instant};

use polybus_conformance::proxy::Proxy;
use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::handler::Outcome;
use polybus_core::transport::Start;
use polybus_core::{ErrorKind, SubscribeOptions};

use crate::support::*;

fn durable() -> RedisServer {
    RedisServer::with(Options { appendfsync: Some("always"), ..Options::default() })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_kills_lose_nothing() {
    let mut server = durable();
    let consuming = bus(&server.url());
    let (_, mut seen) = listen(&consuming, "n", "all").await;
    let publishing = Publisher::start(&hasty(&server.url()));
    for _ in 0..3 {
        publishing.goes_on(100).await;
        server.kill9();
        server.restart(Data::Kept);
    }
    publishing.goes_on(100).await;
    let published = publishing.end().await;
    published.arrives(&mut seen).await;
    finished(&consuming, "test/all").await;
}

#[tokio::test]
async fn a_stopped_server_is_told_and_comes_back() {
    let mut server = durable();
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish(&bus, "n", "0").await;
    seen.all_numbers(1).await;
    server.stop();
    refused_at_last(&bus).await;
    for _ in 0..2 {
        assert_error(&refused(&bus).await, ErrorKind::ConnectionFailed, &[&server.address()]);
    }
    server.restart(Data::Kept);
    publish_at_last(&bus, "n", "1").await;
    assert_eq!(payload(&seen.next().await), "1");
    assert!(count(&bus, "reconnects_total") > 0);
    assert_eq!(count(&bus, "stream_resets_total"), 0);
}

#[tokio::test]
async fn a_server_that_hangs_for_two_seconds_is_told_and_goes_on() {
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish_numbers(&bus, "n", 10).await;
    server.pause();
    let paused = Instant::now();
    assert_error(&refused(&bus).await, ErrorKind::PublishUnknown, &["may or may not"]);
    while paused.elapsed() < Duration::from_secs(2) {
        let kind = refused(&bus).await.kind();
        assert!(matches!(kind, ErrorKind::PublishUnknown | ErrorKind::ConnectionFailed), "{kind:?}");
    }
    server.resume();
    publish_at_last(&bus, "n", "10").await;
    seen.all_numbers(11).await;
    finished(&bus, "test/all").await;
}

#[tokio::test]
async fn a_server_that_comes_back_empty_is_used_again() {
    let mut server = RedisServer::start();
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    let (_, mut others) = listen(&bus, "n", "others").await;
    publish_numbers(&bus, "n", 5).await;
    seen.all_numbers(5).await;
    others.all_numbers(5).await;
    server.restart(Data::Lost);
    publish_at_last(&bus, "n", "5").await;
    for seen in [&mut seen, &mut others] {
        assert_eq!(payload(&seen.next().await), "5");
    }
    eventually("resets are counted", || async { Ok(count(&bus, "stream_resets_total") == 2) }).await;
    finished(&bus, "test/all").await;
}

/// What was published before the consumer is back waits for it.
#[tokio::test]
async fn published_while_the_consumer_was_cut_off_arrives() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let consuming = bus(&format!("redis://{}", proxy.address()));
    let (_, mut seen) = listen(&consuming, "n", "all").await;
    proxy.black_hole();
    publish_numbers(&bus(&server.url()), "n", 50).await;
    proxy.cut();
    proxy.heal();
    seen.all_numbers(50).await;
    finished(&consuming, "test/all").await;
}

#[tokio::test]
async fn a_lost_answer_to_a_publish_is_unknown_and_it_happened_once() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let bus = hasty(&format!("redis://{}", proxy.address()));
    publish(&bus, "n", "0").await;
    proxy.cut_after(0);
    assert_error(&refused(&bus).await, ErrorKind::PublishUnknown, &["may or may not"]);
    publish(&bus, "n", "2").await;
    let batch = (3..5).map(|number| outgoing(event("n", &number.to_string()))).collect();
    proxy.cut_after(0);
    assert_eq!(bus.publish(batch).await.unwrap_err().kind(), ErrorKind::PublishUnknown);
    publish(&bus, "n", "5").await;
    let (_, mut seen) = subscribe(&bus, "*", from_the_beginning(), |_| Outcome::Done).await;
    let all: Vec<_> =
        seen.take(6).await.iter().map(|job| format!("{} {}", job.event.event_type, payload(job))).collect();
    assert_eq!(all, ["n 0", "refused 1", "n 2", "n 3", "n 4", "n 5"]);
    finished(&bus, "test/all").await;
    assert!(seen.is_empty());
}

fn from_the_beginning() -> SubscribeOptions {
    SubscribeOptions { start: Start::Beginning, ..one_at_a_time("all") }
}

/// Reads, acknowledgements and looks of the keeper: whichever answer is lost in its middle, nothing is.
#[tokio::test]
async fn lost_answers_to_a_consumer_lose_nothing() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let consuming = bus(&format!("redis://{}", proxy.address()));
    let (_, mut seen) = listen(&consuming, "n", "all").await;
    let publishing = bus(&server.url());
    for (round, bytes) in [0, 1, 10, 100, 300, 1_000, 3_000, 10_000].into_iter().enumerate() {
        proxy.cut_after(bytes);
        for number in 20 * round..20 * (round + 1) {
            publish(&publishing, "n", &number.to_string()).await;
        }
    }
    seen.all_numbers(160).await;
    finished(&consuming, "test/all").await;
}

#[tokio::test]
async fn a_name_that_is_not_known_is_told() {
    let error = not_opened(&hasty("redis://no-such-host.invalid:6379")).await;
    assert_error(&error, ErrorKind::ConnectionFailed, &["no-such-host.invalid"]);
}

/// While a server is away its clients come at different times: a tenth of them in each tenth of a second, measured at most
/// 20; all that lost it at once would come in one slice otherwise, a little spread by the machine, measured at least 39.
#[tokio::test]
async fn fifty_buses_do_not_come_back_together() {
    const BUSES: usize = 50;
    const SLICE: Duration = Duration::from_millis(100);
    let mut server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let url = format!("redis://{}", proxy.address());
    let mut all = Vec::new();
    for _ in 0..BUSES {
        let bus = bus(&url);
        let (_, seen) = listen(&bus, "n", "all").await;
        all.push((bus, seen));
    }
    let before = proxy.accepted();
    server.kill9();
    // By then the pauses have grown to their longest, a second.
    eventually("they try", || async { Ok(proxy.accepted() > before + 20 * BUSES) }).await;
    let arrivals = proxy.arrivals().split_off(before + 12 * BUSES);
    let within_a_slice = |from: &Instant| arrivals.iter().filter(|at| *at >= from && **at < *from + SLICE).count();
    let busiest = arrivals.iter().map(within_a_slice).max().unwrap();
    assert!(busiest < 30, "{busiest} attempts within {SLICE:?}");
    server.restart(Data::Lost);
    for (bus, _) in &all {
        publish(bus, "n", "0").await;
    }
}
