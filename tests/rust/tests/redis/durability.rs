//! What the server keeps is told as it is, with the command that helps.
use std::cell::RefCell;

use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::transport::{Confirm, Durability};
use polybus_core::{BusOptions, ErrorKind};

use crate::support::*;

fn with(durability: Durability, confirm: Confirm) -> BusOptions {
    let publish_timeout = std::time::Duration::from_millis(500);
    BusOptions { durability, confirm, publish_timeout, ..BusOptions::new("test") }
}

#[tokio::test]
async fn the_log_decides_what_is_told() {
    for (appendfsync, told) in [(None, "memory"), (Some("everysec"), "process"), (Some("always"), "disk")] {
        let server = RedisServer::with(Options { appendfsync, ..Options::default() });
        let guarantees = bus(&server.url()).guarantees().await.unwrap();
        assert_eq!((guarantees.transport, guarantees.delivery), ("redis", "at-least-once"));
        assert_eq!(guarantees.durability, told);
        assert_eq!(guarantees.warnings.is_empty(), appendfsync.is_some(), "{:?}", guarantees.warnings);
        let details: std::collections::HashMap<_, _> = guarantees.details.into_iter().collect();
        assert_eq!(details["appendonly"], if appendfsync.is_some() { "yes" } else { "no" });
        assert_eq!(details["address"], server.address());
    }
}

/// A server that forgets and evicts is warned about, until the commands in the warnings were run.
#[tokio::test]
async fn the_commands_in_the_warnings_help() {
    let more = vec![("maxmemory-policy", "allkeys-lru".to_owned())];
    let server = RedisServer::with(Options { maxmemory: Some("100mb"), more, ..Options::default() });
    let bus = bus(&server.url());
    let warnings = bus.guarantees().await.unwrap().warnings;
    assert!(warnings.iter().any(|warning| warning.contains("allkeys-lru")), "{warnings:?}");
    for warning in &warnings {
        let command = warning.split_once("redis-cli ").unwrap().1.split_once(" (").unwrap().0;
        server.cli(&command.split(' ').collect::<Vec<_>>());
    }
    let guarantees = bus.guarantees().await.unwrap();
    assert_eq!(guarantees.warnings, [""; 0]);
    assert_eq!(guarantees.durability, "process");
}

#[tokio::test]
async fn what_is_required_is_refused_by_a_weak_server() {
    let required = with(Durability::Required, Confirm::Memory);
    let forgetful = RedisServer::start();
    let error = not_opened(&bus_with(&forgetful.url(), required.clone())).await;
    assert_error(&error, ErrorKind::Unsupported, &["required", "redis-cli CONFIG SET appendonly yes"]);

    let more = vec![("maxmemory-policy", "allkeys-lru".to_owned())];
    let evicting = RedisServer::with(Options { appendfsync: Some("everysec"), more, ..Options::default() });
    let error = not_opened(&bus_with(&evicting.url(), required.clone())).await;
    assert_error(&error, ErrorKind::Unsupported, &["redis-cli CONFIG SET maxmemory-policy noeviction"]);
    evicting.cli(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
    bus_with(&evicting.url(), required).start().await.unwrap();

    let full = with(Durability::Full, Confirm::Memory);
    let error = not_opened(&bus_with(&forgetful.url(), full.clone())).await;
    assert_error(&error, ErrorKind::Unsupported, &["redis-cli CONFIG SET appendonly yes"]);
    evicting.cli(&["CONFIG", "SET", "appendfsync", "always"]);
    bus_with(&evicting.url(), full).start().await.unwrap();
}

/// Opening logs on the thread that opens, so each test hears its own.
struct Hear;

thread_local!(static HEARD: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) });

impl log::Log for Hear {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        HEARD.with_borrow_mut(|heard| heard.push(record.args().to_string()));
    }

    fn flush(&self) {}
}

#[tokio::test]
async fn a_weak_server_is_warned_about_once_unless_that_is_off() {
    log::set_logger(&Hear).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let server = RedisServer::start();
    for (durability, times) in [(Durability::Off, 0), (Durability::Warn, 1)] {
        let bus = bus_with(&server.url(), with(durability, Confirm::Memory));
        publish(&bus, "n", "1").await;
        publish(&bus, "n", "2").await;
        let heard = HEARD.take();
        assert_eq!(heard.iter().filter(|line| line.contains("in memory only")).count(), times, "{heard:?}");
    }
}

#[tokio::test]
async fn the_disk_confirms_where_it_can() {
    let everysec = RedisServer::with(Options { appendfsync: Some("everysec"), ..Options::default() });
    let disk = with(Durability::Warn, Confirm::Disk);
    let on_everysec = bus_with(&everysec.url(), disk.clone());
    if everysec.cli(&["COMMAND", "INFO", "WAITAOF"]).is_empty() {
        assert_error(&not_opened(&on_everysec).await, ErrorKind::Unsupported, &["WAITAOF", "appendfsync always"]);
    } else {
        publish(&on_everysec, "n", "1").await;
        assert_eq!(on_everysec.guarantees().await.unwrap().durability, "disk");
    }
    let always = RedisServer::with(Options { appendfsync: Some("always"), ..Options::default() });
    publish(&bus_with(&always.url(), disk.clone()), "n", "1").await;
    let error = not_opened(&bus_with(&RedisServer::start().url(), disk)).await;
    assert_error(&error, ErrorKind::Unsupported, &["redis-cli CONFIG SET appendonly yes"]);
}

#[tokio::test]
async fn a_replica_confirms_or_the_publish_is_unknown() {
    let master = RedisServer::start();
    let bus = bus_with(&master.url(), with(Durability::Off, Confirm::Replica));
    assert_error(&not_opened(&bus).await, ErrorKind::Unsupported, &["needs a replica"]);

    let replica = RedisServer::with(Options { replica_of: Some(master.port()), ..Options::default() });
    replica.until(&["INFO", "replication"], "master_link_status:up");
    master.until(&["INFO", "replication"], "state=online");
    // The replica may be busy with its first copy.
    let patient = BusOptions { publish_timeout: DEADLINE, ..with(Durability::Off, Confirm::Replica) };
    publish(&bus_with(&master.url(), patient), "n", "1").await;
    let length = ["XLEN", "polybus:{default}:events"];
    assert_eq!(replica.cli(&length), "1");

    replica.pause();
    assert_error(&refused(&bus).await, ErrorKind::PublishUnknown, &["replica"]);
    assert_eq!(master.cli(&length), "2");
    replica.resume();
    publish_at_last(&bus, "n", "3").await;
}
