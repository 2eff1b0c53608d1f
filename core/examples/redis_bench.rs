//! The Rust programs of `bench/run.py --only redis-end-to-end`: the core's transport, and a bare redis-rs loop.
//!
//! One process is a producer or a consumer, as its argument says, a JSON object: `{"url": "redis://127.0.0.1:6379",
//! "events": 100000, "part": "consume", "how": "polybus"}`. It speaks lines of JSON, like the programs in `bench/tasks`.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use polybus_core::clock::Clock;
use polybus_core::codec;
use polybus_core::delivery::{Body, Verdict};
use polybus_core::event::{Event, EventType, Meta};
use polybus_core::pattern::Pattern;
use polybus_core::transport::{
    Confirm, Durability, GroupSpec, Outgoing, Settings, Settlement, Source, Start, Transport, connect,
};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, cmd, pipe};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
const TYPE: &str = "order.created";
const BATCH: u64 = 100;
const STREAM: &str = "events";
const GROUP: &str = "bench";

/// What XREADGROUP says: by stream, the entries, each an id and its fields.
type Entries = Vec<(String, Vec<(String, Vec<Bytes>)>)>;
type Failure = Box<dyn std::error::Error + Send + Sync>;

static HANDLED: AtomicU64 = AtomicU64::new(0);

async fn count(_payload: &[u8]) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn handled() -> u64 {
    HANDLED.load(Ordering::Relaxed)
}

/// Nanoseconds, comparable between processes.
fn now() -> i64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec * 1_000_000_000 + time.tv_nsec
}

fn say(facts: &Value) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{facts}")?;
    Ok(out.flush()?)
}

/// Tells the runner that all is open, and blocks until it says go.
fn wait_for_go() -> Result<(), Failure> {
    say(&json!({ "ready": true }))?;
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}

/// 200 bytes as JSON.
fn payload(i: u64) -> String {
    let start = format!(r#"{{"orderId":"order-{i:08}","sent":0,"note":""#);
    let note = "x".repeat(200 - start.len() - 2);
    format!(r#"{start}{note}"}}"#)
}

fn batches(events: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    (0..events).step_by(BATCH as usize).map(move |start| start..events.min(start + BATCH))
}

async fn open(url: &str) -> Result<Arc<dyn Transport>, Failure> {
    let settings = Settings {
        bus: "default".into(),
        durability: Durability::Warn,
        retention: None,
        max_age: None,
        max_events: None,
        max_bytes: None,
        confirm: Confirm::Memory,
        idempotency_window: None,
        partitions: None,
        max_payload_bytes: 1 << 20,
        publish_buffer_bytes: None,
        when_full: polybus_core::transport::WhenFull::Wait,
        clock: Clock::default(),
        allow_network_fs: false,
    };
    Ok(connect(url, settings).await?)
}

fn outgoing(event_type: &EventType, i: u64) -> Outgoing {
    let event = Event::new(event_type.clone(), payload(i).into(), Meta::new(SystemTime::now()));
    Outgoing { event, delay: None, expires_in: None }
}

async fn produce(url: &str, events: u64) -> Result<Value, Failure> {
    let bus = open(url).await?;
    let event_type = EventType::new(TYPE)?;
    wait_for_go()?;
    let started = now();
    for batch in batches(events) {
        bus.publish(batch.map(|i| outgoing(&event_type, i)).collect(), PATIENCE).await?;
    }
    let ended = now();
    bus.close().await;
    Ok(json!({ "started": started, "ended": ended }))
}

async fn consume(url: &str, events: u64) -> Result<Value, Failure> {
    let bus = open(url).await?;
    let spec = GroupSpec {
        group: GROUP.into(),
        subscription: GROUP.into(),
        service: "bench".into(),
        pattern: Pattern::new("order.*")?,
        start: Start::New,
        broadcast: false,
        ordered: false,
        lease: Duration::from_secs(30),
        responder: false,
        keep_expired: false,
    };
    let source = bus.subscribe(spec).await?;
    say(&json!({ "ready": true }))?;
    let mut settling = tokio::spawn(async { Ok(Vec::new()) });
    while handled() < events {
        let mut batch = Vec::new();
        for delivery in source.take(1000).await? {
            if let Body::Event(event) = &delivery.body {
                count(&event.payload).await;
            }
            batch.push(Settlement { lease: delivery.lease, verdict: Verdict::Ack });
        }
        // Settled while the next ones are taken, as the dispatcher does.
        settling.await??;
        let source: Arc<dyn Source> = source.clone();
        settling = tokio::spawn(async move { source.settle(batch).await });
    }
    settling.await??;
    let ended = now();
    bus.close().await;
    Ok(json!({ "ended": ended, "handled": handled() }))
}

async fn bare(url: &str) -> Result<MultiplexedConnection, Failure> {
    // A read that blocks for a second is no fault; its default is half of one.
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    Ok(Client::open(url)?.get_multiplexed_async_connection_with_config(&config).await?)
}

async fn bare_produce(url: &str, events: u64) -> Result<Value, Failure> {
    let mut connection = bare(url).await?;
    let event_type = EventType::new(TYPE)?;
    wait_for_go()?;
    let started = now();
    for batch in batches(events) {
        let mut pipeline = pipe();
        for i in batch {
            let event = codec::encode(&outgoing(&event_type, i).event)?;
            pipeline.cmd("XADD").arg(STREAM).arg("*").arg("t").arg(TYPE).arg("e").arg(event).ignore();
        }
        pipeline.exec_async(&mut connection).await?;
    }
    Ok(json!({ "started": started, "ended": now() }))
}

async fn bare_consume(url: &str, events: u64) -> Result<Value, Failure> {
    let mut connection = bare(url).await?;
    cmd("XGROUP").arg("CREATE").arg(STREAM).arg(GROUP).arg("$").arg("MKSTREAM").exec_async(&mut connection).await?;
    say(&json!({ "ready": true }))?;
    let mut done: Vec<String> = Vec::new();
    while handled() < events {
        // What was handled is acknowledged on the way to the next batch.
        let mut pipeline = pipe();
        if !done.is_empty() {
            pipeline.cmd("XACK").arg(STREAM).arg(GROUP).arg(&done).ignore();
        }
        pipeline.cmd("XREADGROUP").arg("GROUP").arg(GROUP).arg("one").arg("COUNT").arg(BATCH);
        pipeline.arg("BLOCK").arg(1000).arg("STREAMS").arg(STREAM).arg(">");
        let (streams,): (Entries,) = pipeline.query_async(&mut connection).await?;
        done.clear();
        for (id, fields) in streams.into_iter().flat_map(|(_, entries)| entries) {
            if let Some(event) = fields.get(3) {
                count(event).await;
            }
            done.push(id);
        }
    }
    cmd("XACK").arg(STREAM).arg(GROUP).arg(&done).exec_async(&mut connection).await?;
    Ok(json!({ "ended": now(), "handled": handled() }))
}

async fn run() -> Result<(), Failure> {
    let ask: Value = serde_json::from_str(&std::env::args().nth(1).ok_or("give a JSON object: see the file's head")?)?;
    let text = |name: &str| ask[name].as_str().ok_or(format!("{name:?} is missing"));
    let (url, events) = (text("url")?, ask["events"].as_u64().ok_or("\"events\" is missing")?);
    let facts = match (text("how")?, text("part")?) {
        ("polybus", "produce") => produce(url, events).await?,
        ("polybus", "consume") => consume(url, events).await?,
        ("bare", "produce") => bare_produce(url, events).await?,
        ("bare", "consume") => bare_consume(url, events).await?,
        (how, part) => return Err(format!("no program {how:?} {part:?}").into()),
    };
    say(&facts)
}

fn main() -> Result<(), Failure> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run())
}
