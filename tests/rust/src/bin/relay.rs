//! A relay that ends itself, as `kill -9` does, when it reaches a step: `relay <database> <bus> <name of the bus> <step>`.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::sync::Arc;
use std::time::Duration;

use polybus_core::outbox::relay::{Relay, RelayOptions};
use polybus_core::{Bus, BusOptions};
use rustix::process::{Signal, getpid, kill_process};

#[tokio::main]
async fn main() {
    let [database, url, bus, last] = <[String; 4]>::try_from(std::env::args().skip(1).collect::<Vec<_>>()).unwrap();
    let bus = Bus::new(&url, BusOptions { bus, ..BusOptions::new("relay") }).unwrap();
    let probe = move |step: &'static str| {
        if step == last {
            kill_process(getpid(), Signal::KILL).unwrap();
        }
    };
    let lease = Duration::from_millis(500);
    let options = RelayOptions { batch: 4, lease, probe: Some(Arc::new(probe)), ..RelayOptions::default() };
    Relay::new(&database, Arc::new(bus), options).unwrap().run().await.unwrap();
}
