//! What a naive consumer of a stream gets wrong, one file for each.

mod connections;
mod consumers;
mod dead_owners;
mod entries;
mod half_open;
mod hoarding;
mod leases;
mod losses;
mod memory;
mod ordered;
mod requests;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::{Seen, attend, eventually, quick};
use polybus_core::handler::Outcome;
use polybus_core::transport::Start;
use polybus_core::{Bus, BusOptions, SubscribeOptions, Subscription};
use tokio::sync::Semaphore;

const EVENTS: &str = "polybus:{default}:events";
/// Group of the subscription `mail`.
const MAIL: &str = "test/mail";
/// The shortest that a bus takes.
const LEASE: Duration = Duration::from_secs(1);

/// Of a bus with the shortest lease.
fn options() -> BusOptions {
    BusOptions { lease: LEASE, retry: quick(3), ..BusOptions::new("test") }
}

fn bus(url: &str) -> Bus {
    Bus::new(url, options()).unwrap()
}

/// One event at a time, from the beginning if the group is new.
fn one_by_one(name: &str) -> SubscribeOptions {
    SubscribeOptions { concurrency: Some(1), start: Start::Beginning, ..SubscribeOptions::new(name) }
}

/// Holds handlers back until it lets them pass.
#[derive(Clone)]
struct Gate(Arc<Semaphore>);

impl Gate {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    fn open(&self, handlers: usize) {
        self.0.add_permits(handlers);
    }

    async fn pass(&self) {
        self.0.acquire().await.unwrap().forget();
    }
}

/// Subscribes a handler that waits at the gate and then answers with `outcome`.
async fn wait_at(gate: &Gate, bus: &Bus, options: SubscribeOptions, outcome: fn() -> Outcome) -> (Subscription, Seen) {
    let gate = gate.clone();
    let run = move |_: &_| {
        let gate = gate.clone();
        async move {
            gate.pass().await;
            outcome()
        }
    };
    attend(bus, "*", options, run).await
}

/// Waits for what only the server can tell.
async fn until(what: &str, probe: impl Fn() -> bool) {
    eventually(what, || std::future::ready(Ok(probe()))).await;
}

/// The consumers of a group, with the number of entries that each holds.
fn consumers(server: &RedisServer, group: &str) -> Vec<(String, u64)> {
    let told = server.cli(&["XINFO", "CONSUMERS", EVENTS, group]);
    let lines: Vec<_> = told.lines().collect();
    let mut found = Vec::new();
    for pair in lines.chunks_exact(2) {
        match pair {
            ["name", name] => found.push(((*name).to_owned(), 0)),
            ["pending", count] => found.last_mut().unwrap().1 = count.parse().unwrap(),
            _ => {}
        }
    }
    found
}

/// How many entries a group has taken and not finished.
fn pending(server: &RedisServer, group: &str) -> u64 {
    server.cli(&["XPENDING", EVENTS, group]).lines().next().unwrap().parse().unwrap()
}

/// A number in `INFO`.
fn info(server: &RedisServer, name: &str) -> u64 {
    let told = server.cli(&["INFO", "everything"]);
    let line = told.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {told}")).trim().parse().unwrap()
}

/// A consumer of the group that takes `count` events and is never heard of again.
fn take_as_ghost(server: &RedisServer, group: &str, count: usize) {
    let count = count.to_string();
    server.cli(&["XREADGROUP", "GROUP", group, "ghost", "COUNT", &count, "STREAMS", EVENTS, ">"]);
}

/// A count that the transport keeps.
fn counted(bus: &Bus, name: &str) -> u64 {
    bus.transport_counts().into_iter().find(|(found, _)| *found == name).unwrap().1
}
