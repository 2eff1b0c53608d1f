//! How fast a group that keeps order is, beside one that does not: takes and settles in one process, no handlers.
//!
//! `ordered_bench <url> <events> <keys>`, with a URL like `redis://127.0.0.1:6379` or `sqlite:///bench.db`. The last line is for
//! a key that is blocked: all events but a thousand stand behind one that nobody settles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use polybus_core::bus::new_event;
use polybus_core::clock::Clock;
use polybus_core::delivery::Verdict;
use polybus_core::pattern::Pattern;
use polybus_core::transport::{
    Confirm, Durability, GroupSpec, Outgoing, Settings, Settlement, Source, Start, Transport, connect,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const PATIENCE: Duration = Duration::from_secs(60);

fn spec(name: &str, ordered: bool) -> Result<GroupSpec, Failure> {
    Ok(GroupSpec {
        responder: false,
        keep_expired: false,
        group: format!("bench/{name}").into(),
        subscription: name.into(),
        service: "bench".into(),
        pattern: Pattern::new("order.*")?,
        start: Start::New,
        broadcast: false,
        ordered,
        lease: Duration::from_secs(30),
    })
}

async fn publish(bus: &Arc<dyn Transport>, events: usize, key: impl Fn(usize) -> String) -> Result<(), Failure> {
    for first in (0..events).step_by(500) {
        let batch = (first..events.min(first + 500)).map(|number| {
            let meta = format!("{{\"partitionKey\":\"{}\"}}", key(number));
            let event = new_event("order.created", number.to_string().into(), Some(meta.as_bytes()), 1 << 20)?;
            Ok(Outgoing { event, delay: None, expires_in: None })
        });
        bus.publish(batch.collect::<Result<Vec<_>, Failure>>()?, PATIENCE).await?;
    }
    Ok(())
}

/// Events a second.
async fn drain(source: &Arc<dyn Source>, events: usize) -> Result<f64, Failure> {
    let begun = Instant::now();
    let mut handled = 0;
    let mut settling = tokio::spawn(async { Ok(Vec::new()) });
    while handled < events {
        let taken = source.take(1000).await?;
        handled += taken.len();
        let batch = taken.iter().map(|delivery| Settlement { lease: delivery.lease, verdict: Verdict::Ack }).collect();
        settling.await??;
        let source = source.clone();
        settling = tokio::spawn(async move { source.settle(batch).await });
    }
    settling.await??;
    Ok(events as f64 / begun.elapsed().as_secs_f64())
}

async fn run() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("give a URL, a number of events and a number of keys");
    let (url, events, keys): (_, usize, usize) = (next()?, next()?.parse()?, next()?.parse()?);
    let settings = Settings {
        publish_buffer_bytes: None,
        when_full: Default::default(),
        idempotency_window: None,
        bus: format!("bench-{}", std::process::id()).into(),
        durability: Durability::Off,
        retention: None,
        max_age: None,
        max_events: None,
        max_bytes: None,
        confirm: Confirm::Memory,
        partitions: None,
        max_payload_bytes: 1 << 20,
        clock: Clock::default(),
        allow_network_fs: false,
    };
    let bus = connect(&url, settings).await?;
    let (plain, ordered) = (bus.subscribe(spec("plain", false)?).await?, bus.subscribe(spec("ordered", true)?).await?);
    publish(&bus, events, |number| format!("k{}", number % keys)).await?;
    println!("unordered: {:.0}/s", drain(&plain, events).await?);
    println!("ordered, {keys} keys: {:.0}/s", drain(&ordered, events).await?);
    publish(&bus, events, |number| if number < events - 1000 { "blocked".to_owned() } else { format!("k{number}") })
        .await?;
    let blocked = ordered.take(1).await?;
    let begun = Instant::now();
    drain(&ordered, 1000).await?;
    println!("{} events behind one of their key, then 1000 others: {:.2?}", events - 1001, begun.elapsed());
    drop(blocked);
    bus.delete_group("bench/plain".into()).await?;
    bus.delete_group("bench/ordered".into()).await?;
    bus.close().await;
    Ok(())
}

fn main() -> Result<(), Failure> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run())
}
