//! Buses in parts: on one server, and on a cluster.
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::delivery::Failure;
use polybus_core::handler::Outcome;
use polybus_core::transport::Outgoing;
use polybus_core::{Bus, BusOptions, Event, SubscribeOptions};
use polybus_core::{ErrorKind, Result};

use crate::support::*;

fn in_parts(url: &str, partitions: u32) -> Bus {
    bus_with(url, BusOptions { partitions: Some(partitions), ..BusOptions::new("test") })
}

fn keyed(key: &str, payload: &str) -> Event {
    let meta = format!(r#"{{"partitionKey":"{key}"}}"#);
    new_event("n", payload.as_bytes().to_vec().into(), Some(meta.as_bytes()), 1 << 20).unwrap()
}

/// Publishes numbers for each of these keys in turn; the partitions that got some.
async fn publish_keyed(bus: &Bus, keys: &[String], numbers: std::ops::Range<usize>) -> Result<HashSet<String>> {
    let mut used = HashSet::new();
    for number in numbers {
        for key in keys {
            let receipt = bus.publish(vec![outgoing(keyed(key, &number.to_string()))]).await?.remove(0);
            used.insert(receipt.position.unwrap().split(':').next().unwrap().to_owned());
        }
    }
    Ok(used)
}

/// Numbers of each key, in the order in which they are seen.
async fn by_key(seen: &mut Seen, count: usize) -> HashMap<String, Vec<usize>> {
    let mut by_key: HashMap<String, Vec<usize>> = HashMap::new();
    for job in seen.take(count).await {
        let key = job.event.meta.partition_key.as_deref().unwrap().to_owned();
        by_key.entry(key).or_default().push(payload(&job).parse().unwrap());
    }
    by_key
}

fn keys() -> Vec<String> {
    (0..9).map(|number| format!("key-{number}")).collect()
}

#[tokio::test]
async fn keys_keep_their_order_on_one_server() {
    let server = RedisServer::start();
    keys_keep_their_order(&in_parts(&server.url(), 3)).await;
}

#[tokio::test]
async fn keys_keep_their_order_on_a_cluster() {
    let cluster = Cluster::start();
    let bus = in_parts(&cluster.url(), 3);
    keys_keep_their_order(&bus).await;
    dead_letters_of_all_partitions(&bus).await;
    delayed_events_come_when_they_are_due(&bus).await;
    // Without the option it has one part, on whichever node.
    let other = bus_with(&cluster.url(), BusOptions { bus: "other".into(), ..BusOptions::new("test") });
    let (_, mut seen) = listen(&other, "n", "all").await;
    publish_numbers(&other, "n", 10).await;
    seen.all_numbers(10).await;
}

async fn keys_keep_their_order(bus: &Bus) {
    let (_, mut seen) = subscribe(bus, "n", one_at_a_time("ordered"), |_| Outcome::Done).await;
    let keys = keys();
    let used = publish_keyed(bus, &keys, 0..10).await.unwrap();
    assert_eq!(used, ["0", "1", "2"].map(str::to_owned).into());
    // One batch over all partitions keeps the order, too.
    let batch = (10..20).flat_map(|number| keys.iter().map(move |key| keyed(key, &number.to_string())));
    let receipts = bus.publish(batch.map(outgoing).collect()).await.unwrap();
    assert_eq!(receipts.len(), 90);
    let by_key = by_key(&mut seen, 180).await;
    assert_eq!(by_key.len(), keys.len());
    for (key, numbers) in by_key {
        assert_eq!(numbers, (0..20).collect::<Vec<_>>(), "{key}");
    }
    finished(bus, "test/ordered").await;
    assert!(seen.is_empty());
}

#[tokio::test]
async fn dead_letters_and_delays_in_parts_on_one_server() {
    let server = RedisServer::start();
    let bus = in_parts(&server.url(), 3);
    dead_letters_of_all_partitions(&bus).await;
    delayed_events_come_when_they_are_due(&bus).await;
}

async fn dead_letters_of_all_partitions(bus: &Bus) {
    let reject = |job: &polybus_core::handler::Job| match job.redelivered {
        false => Outcome::Rejected(Failure::new("Trouble", "as the test wants", "at test")),
        true => Outcome::Done,
    };
    let (subscription, mut seen) = subscribe(bus, "n", SubscribeOptions::new("rejecting"), reject).await;
    publish_keyed(bus, &keys(), 0..3).await.unwrap();
    seen.take(27).await;
    finished(bus, "test/rejecting").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 27);

    let (mut letters, mut after) = (Vec::new(), None);
    loop {
        let page = bus.dead_letters(Default::default(), after, 7).await.unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        letters.extend(page);
    }
    let events: HashSet<_> = letters.iter().map(|letter| letter.event.as_ref().unwrap().meta.id.clone()).collect();
    assert_eq!((letters.len(), events.len()), (27, 27));

    let one = polybus_core::dead_letter::DeadLetterFilter { id: Some(letters[5].id.clone()), ..Default::default() };
    assert_eq!(bus.dead_replay(one).await.unwrap(), 1);
    assert_eq!(seen.next().await.event.meta.id, letters[5].event.as_ref().unwrap().meta.id);
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 26);
    seen.take(26).await;
    finished(bus, "test/rejecting").await;
    assert_eq!(bus.dead_count(Default::default()).await.unwrap(), 0);
    within(subscription.drain(DEADLINE)).await;
}

async fn delayed_events_come_when_they_are_due(bus: &Bus) {
    let (_, mut seen) = listen(bus, "n", "delayed").await;
    let delay = Duration::from_millis(300);
    let batch = keys().iter().map(|key| Outgoing { delay: Some(delay), ..outgoing(keyed(key, "1")) }).collect();
    let began = Instant::now();
    bus.publish(batch).await.unwrap();
    assert_eq!(by_key(&mut seen, 9).await.len(), 9);
    assert!(began.elapsed() >= delay, "{:?}", began.elapsed());
}

#[tokio::test]
async fn another_number_of_partitions_is_refused() {
    let server = RedisServer::start();
    let three = in_parts(&server.url(), 3);
    three.start().await.unwrap();
    let error = not_opened(&in_parts(&server.url(), 2)).await;
    assert_error(&error, ErrorKind::InvalidConfig, &["partitions=3", "2"]);
    let whatever_it_has = bus(&server.url());
    let (_, mut seen) = listen(&whatever_it_has, "n", "all").await;
    publish_keyed(&three, &keys(), 0..2).await.unwrap();
    assert_eq!(by_key(&mut seen, 18).await.len(), 9);
    let details = whatever_it_has.guarantees().await.unwrap().details;
    assert!(details.contains(&("partitions", "3".to_owned())), "{details:?}");
}

/// A server that lost everything is told again, so that the next process finds the same partitions.
#[tokio::test]
async fn the_number_of_partitions_outlives_a_flush() {
    let server = RedisServer::start();
    let three = in_parts(&server.url(), 3);
    let (_kept, _) = listen(&three, "n", "all").await;
    server.cli(&["FLUSHALL"]);
    eventually("it is written again", || async {
        Ok(server.cli(&["HGET", "polybus:{default}:meta", "partitions"]).trim() == "3")
    })
    .await;
    let whatever_it_has = bus(&server.url());
    let (_, mut seen) = listen(&whatever_it_has, "n", "other").await;
    publish_keyed(&three, &keys(), 0..2).await.unwrap();
    assert_eq!(by_key(&mut seen, 18).await.len(), 9);
}

/// The slot of one partition moves to another node with all its keys, while the bus runs.
#[tokio::test]
async fn a_slot_that_moves_is_followed() {
    let cluster = Cluster::start();
    let bus = in_parts(&cluster.url(), 3);
    let (_, mut seen) = subscribe(&bus, "n", one_at_a_time("all"), |_| Outcome::Done).await;
    publish_keyed(&bus, &keys(), 0..5).await.unwrap();
    let before = by_key(&mut seen, 45).await;
    let (from, to) = move_slot(&cluster, "{default:0}");
    publish_keyed(&bus, &keys(), 5..10).await.unwrap();
    let after = by_key(&mut seen, 45).await;
    for key in keys() {
        assert_eq!([&before[&key][..], &after[&key][..]].concat(), (0..10).collect::<Vec<_>>(), "{key}");
    }
    finished(&bus, "test/all").await;
    // All connections have gone to the new node: nobody keeps asking the old one.
    let refusals = || {
        cluster.nodes[from]
            .cli(&["INFO", "errorstats"])
            .lines()
            .find_map(|line| line.strip_prefix("errorstat_MOVED:count=")?.parse::<u64>().ok())
    };
    publish_keyed(&bus, &keys(), 10..11).await.unwrap();
    by_key(&mut seen, 9).await;
    assert!(refusals().unwrap_or(0) < 20, "{:?}", refusals());
    assert_ne!(cluster.nodes[to].cli(&["EXISTS", "polybus:{default:0}:events"]), "0");
}

/// Moves the slot of `key` to the next node. Index of the old one and of the new one.
fn move_slot(cluster: &Cluster, key: &str) -> (usize, usize) {
    let nodes = &cluster.nodes;
    let slot = nodes[0].cli(&["CLUSTER", "KEYSLOT", key]);
    let keys = |node: usize| nodes[node].cli(&["CLUSTER", "GETKEYSINSLOT", &slot, "1000"]);
    let from = (0..3).find(|node| !keys(*node).is_empty()).unwrap();
    let to = (from + 1) % 3;
    let id = |node: usize| nodes[node].cli(&["CLUSTER", "MYID"]);
    nodes[to].cli(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &id(from)]);
    nodes[from].cli(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &id(to)]);
    let (port, moved) = (nodes[to].port().to_string(), keys(from));
    let migrate = ["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
    nodes[from].cli(&[&migrate[..], &moved.lines().collect::<Vec<_>>()].concat());
    for node in [to, from, 3 - to - from] {
        nodes[node].cli(&["CLUSTER", "SETSLOT", &slot, "NODE", &id(to)]);
    }
    (from, to)
}
