//! Groups that keep order per key: what they leave on the server, and a server that loses it.

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Job, Outcome};

use super::*;

fn ordered() -> SubscribeOptions {
    SubscribeOptions { ordered: true, start: Start::Beginning, ..SubscribeOptions::new("mail") }
}

async fn publish_keyed(bus: &Bus, key: &str, numbers: impl IntoIterator<Item = usize>) {
    let meta = format!("{{\"partitionKey\":\"{key}\"}}");
    let event = |number: usize| new_event("n", number.to_string().into(), Some(meta.as_bytes()), 1 << 20).unwrap();
    bus.publish(numbers.into_iter().map(|number| outgoing(event(number))).collect()).await.unwrap();
}

fn key(job: &Job) -> String {
    job.event.meta.partition_key.as_deref().unwrap_or_default().to_owned()
}

/// Of the group's own keys, only the dead letters may be there.
fn assert_nothing_is_left(server: &RedisServer) {
    for name in ["retry", "held", "work", "lanes"] {
        let key = format!("polybus:{{default}}:{name}:{MAIL}");
        assert_eq!(server.cli(&["EXISTS", &key]).trim(), "0", "{key}");
    }
    assert!(server.cli(&["XPENDING", EVENTS, MAIL]).trim().starts_with('0'));
}

#[tokio::test]
async fn nothing_is_left_of_what_is_finished() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut mail) = subscribe(&bus, "n", ordered(), |job| match payload(job).as_str() {
        "1" => Outcome::Rejected(Failure::new("Reject", "no", "")),
        "2" if job.attempt == 1 => failed(),
        _ => Outcome::Done,
    })
    .await;
    publish(&bus, "other", "0").await;
    for name in ["a", "b", ""] {
        publish_keyed(&bus, name, 0..5).await;
    }
    mail.take(18).await;
    finished(&bus, MAIL).await;
    assert_nothing_is_left(&server);
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 3);
    mail.take(3).await;
    finished(&bus, MAIL).await;
    assert_nothing_is_left(&server);
    assert!(bus.delete_group(MAIL).await.unwrap());
}

/// What waited is lost with the server's data; what is published afterwards is handled, also under the keys that were busy.
#[tokio::test]
async fn everything_is_flushed_in_the_middle() {
    let server = RedisServer::start();
    let (bus, gate) = (bus(&server.url()), Gate::new());
    let pass = gate.clone();
    let (_mail, mut mail) = attend(&bus, "n", ordered(), move |_| {
        let pass = pass.clone();
        async move {
            pass.pass().await;
            Outcome::Done
        }
    })
    .await;
    publish_keyed(&bus, "a", 0..3).await;
    assert_eq!(payload(&mail.next().await), "0");
    server.cli(&["FLUSHALL"]);
    publish_keyed(&bus, "a", 3..6).await;
    assert_eq!(payload(&mail.next().await), "3"); // the first is lost, and its end ends nothing
    gate.open(99);
    let rest: Vec<_> = mail.take(2).await.iter().map(payload).collect();
    assert_eq!(rest, ["4", "5"]);
    finished(&bus, MAIL).await;
    assert_nothing_is_left(&server);
}

/// The group's own store is damaged by hand: no key is stuck for ever.
#[tokio::test]
async fn what_waited_without_its_event_is_passed_over() {
    let server = RedisServer::start();
    let (bus, gate) = (bus(&server.url()), Gate::new());
    let pass = gate.clone();
    let (_mail, mut mail) = attend(&bus, "n", ordered(), move |_| {
        let pass = pass.clone();
        async move {
            pass.pass().await;
            Outcome::Done
        }
    })
    .await;
    publish_keyed(&bus, "a", 0..3).await;
    mail.next().await;
    let parked = || async { Ok(bus.group_stats(MAIL).await?.lag == 2) };
    eventually("the others wait behind it", parked).await;
    server.cli(&["DEL", &format!("polybus:{{default}}:work:{MAIL}")]);
    gate.open(99);
    publish_keyed(&bus, "a", 3..5).await;
    let rest: Vec<_> = mail.take(2).await.iter().map(payload).collect();
    assert_eq!(rest, ["3", "4"]);
    finished(&bus, MAIL).await;
}

#[tokio::test]
async fn partitions_keep_the_order_of_their_keys() {
    let server = RedisServer::start();
    let options = || BusOptions { partitions: Some(3), ..options() };
    let buses = [(); 2].map(|()| Bus::new(&server.url(), options()).unwrap());
    let mut handled = Vec::new();
    let log = Arc::new(std::sync::Mutex::new(Vec::new()));
    for bus in &buses {
        let log = log.clone();
        let flaky = SubscribeOptions { retry: Some(quick(1000)), ..ordered() };
        handled.push(
            subscribe(bus, "n", flaky, move |job| {
                if fastrand::u8(..5) == 0 {
                    return failed();
                }
                log.lock().unwrap().push((key(job), payload(job)));
                Outcome::Done
            })
            .await,
        );
    }
    for name in 0..12 {
        publish_keyed(&buses[0], &format!("k{name}"), 0..20).await;
    }
    eventually("all are handled", || async { Ok(log.lock().unwrap().len() == 240) }).await;
    for name in 0..12 {
        let log = log.lock().unwrap();
        let numbers: Vec<_> =
            log.iter().filter(|(key, _)| *key == format!("k{name}")).map(|(_, n)| n.clone()).collect();
        assert_eq!(numbers, (0..20).map(|number| number.to_string()).collect::<Vec<_>>());
    }
    finished(&buses[1], MAIL).await;
}
