//! Measures the SQLite transport on this machine: `cargo run --release -p polybus-core --example sqlite_bench [DIR]`.
//!
//! The consumer is a second process: this program again, with a role in its environment.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use polybus_core::Result;
use polybus_core::delivery::{Body, Verdict};
use polybus_core::event::{Event, EventType, Meta};
use polybus_core::pattern::Pattern;
use polybus_core::transport::{
    Confirm, Durability, GroupSpec, Outgoing, Settings, Settlement, Source, Start, Transport, connect,
};

const PATIENCE: Duration = Duration::from_secs(60);
const EVENTS: usize = 300_000;

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn open(path: &Path, durability: Durability) -> Result<Arc<dyn Transport>> {
    let settings = Settings {
        bus: "default".into(),
        durability,
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
        clock: polybus_core::clock::Clock::default(),
        allow_network_fs: false,
    };
    connect(&format!("sqlite:///{}", path.display()), settings).await
}

fn spec(group: &str, pattern: &str) -> Result<GroupSpec> {
    Ok(GroupSpec {
        group: group.into(),
        subscription: group.into(),
        service: "bench".into(),
        pattern: Pattern::new(pattern)?,
        start: Start::New,
        broadcast: false,
        ordered: false,
        lease: Duration::from_secs(30),
        responder: false,
        keep_expired: false,
    })
}

fn micros() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros())
}

/// An event of about 200 bytes of payload that begins with the time of its making.
fn outgoing(event_type: &EventType) -> Outgoing {
    let payload = format!("[{},\"{}\"]", micros(), "x".repeat(170));
    let event = Event::new(event_type.clone(), payload.into(), Meta::new(SystemTime::now()));
    Outgoing { event, delay: None, expires_in: None }
}

struct Consumer {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Consumer {
    fn start(path: &Path, count: usize, durability: &str) -> Result<Self, Failure> {
        let mut child = Command::new(std::env::current_exe()?)
            .env("BENCH_CONSUME", count.to_string())
            .env("BENCH_DURABILITY", durability)
            .arg(path)
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut consumer = Self { child, output };
        consumer.line()?;
        Ok(consumer)
    }

    fn line(&mut self) -> Result<String, Failure> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    fn finish(mut self) -> Result<String, Failure> {
        let line = self.line()?;
        self.child.wait()?;
        Ok(line)
    }
}

async fn settle(source: &Arc<dyn Source>, batch: Vec<Settlement>) -> Result<()> {
    source.settle(batch).await.map(drop)
}

async fn consume(path: &Path, count: usize, durability: Durability) -> Result<(), Failure> {
    let bus = open(path, durability).await?;
    let source = bus.subscribe(spec("consumer", "bench.**")?).await?;
    println!("ready");
    let mut delays = Vec::with_capacity(count);
    let mut settling = tokio::spawn(async { Ok(()) });
    while delays.len() < count {
        let taken = source.take(1000).await?;
        let now = micros();
        for delivery in &taken {
            if let Body::Event(event) = &delivery.body {
                let text = std::str::from_utf8(&event.payload[1..17])?;
                delays.push(now.saturating_sub(text.parse()?));
            }
        }
        let batch = taken.iter().map(|d| Settlement { lease: d.lease, verdict: Verdict::Ack }).collect();
        // Settled while the next ones are taken, as the dispatcher does.
        settling.await??;
        let source = source.clone();
        settling = tokio::spawn(async move { settle(&source, batch).await });
    }
    settling.await??;
    delays.sort_unstable();
    let at = |part: usize| delays[(delays.len() - 1) * part / 100];
    println!("delay p50 {} us, p99 {} us, max {} us", at(50), at(99), at(100));
    bus.close().await;
    Ok(())
}

fn fresh(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(format!("{name}.db"));
    for suffix in ["", "-wal", "-shm", ".lock", ".bell"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
    }
    path
}

fn rate(count: usize, started: Instant) -> f64 {
    count as f64 / started.elapsed().as_secs_f64()
}

async fn throughput(directory: &Path, name: &str, durability: Durability) -> Result<(), Failure> {
    let path = fresh(directory, name);
    let bus = open(&path, durability).await?;
    let consumer = Consumer::start(&path, EVENTS, name)?;
    let event_type = EventType::new("bench.event")?;
    let started = Instant::now();
    for _ in 0..EVENTS / 100 {
        bus.publish((0..100).map(|_| outgoing(&event_type)).collect(), PATIENCE).await?;
    }
    let published = rate(EVENTS, started);
    let said = consumer.finish()?;
    println!(
        "publish_many(100) to another process, {name}: {:.0} events/s taken and acked ({published:.0}/s published; {said})",
        rate(EVENTS, started)
    );
    bus.close().await;
    Ok(())
}

async fn latency(directory: &Path) -> Result<(), Failure> {
    const COUNT: usize = 500;
    let path = fresh(directory, "latency");
    let bus = open(&path, Durability::Normal).await?;
    let consumer = Consumer::start(&path, COUNT, "normal")?;
    let event_type = EventType::new("bench.event")?;
    for _ in 0..COUNT {
        bus.publish(vec![outgoing(&event_type)], PATIENCE).await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("one event to an idle process, normal: {}", consumer.finish()?);
    bus.close().await;
    Ok(())
}

/// What a program without a bus would do: one INSERT, one COMMIT, in a loop.
fn bare(directory: &Path) -> Result<f64, Failure> {
    const COUNT: usize = 2000;
    let file = rusqlite::Connection::open(fresh(directory, "bare"))?;
    file.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE t(id INTEGER PRIMARY KEY, type, event)",
    )?;
    let body = vec![b'x'; 600];
    let started = Instant::now();
    for _ in 0..COUNT {
        file.execute_batch("BEGIN IMMEDIATE")?;
        file.prepare_cached("INSERT INTO t(type, event) VALUES('bench.event', ?1)")?.execute([&body])?;
        file.execute_batch("COMMIT")?;
    }
    Ok(rate(COUNT, started))
}

async fn commits(directory: &Path) -> Result<(), Failure> {
    const COUNT: usize = 2000;
    let path = fresh(directory, "commits");
    let bus = open(&path, Durability::Full).await?;
    let event_type = EventType::new("bench.event")?;
    let (mut plain, mut ours) = (0.0_f64, 0.0_f64);
    // In turns, and the best of each: the disk is shared with others.
    for _ in 0..3 {
        plain = plain.max(bare(directory)?);
        let started = Instant::now();
        for _ in 0..COUNT {
            bus.publish(vec![outgoing(&event_type)], PATIENCE).await?;
        }
        ours = ours.max(rate(COUNT, started));
    }
    println!("one awaited publish at a time, full: {ours:.0}/s; bare sqlite3 {plain:.0}/s; ratio {:.2}", ours / plain);
    let started = Instant::now();
    let tasks: Vec<_> = (0..64)
        .map(|_| {
            let (bus, event_type) = (bus.clone(), event_type.clone());
            tokio::spawn(async move {
                for _ in 0..500 {
                    bus.publish(vec![outgoing(&event_type)], PATIENCE).await?;
                }
                Ok::<_, polybus_core::Error>(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    let many = rate(64 * 500, started);
    println!("64 publishers at once, full: {many:.0}/s; {:.1} x one at a time", many / ours);
    bus.close().await;
    Ok(())
}

/// Processor time of all threads of this process.
fn cpu_time() -> Duration {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let spent = threads.flatten().filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(spent.sum())
}

async fn idle(directory: &Path) -> Result<(), Failure> {
    let bus = open(&fresh(directory, "idle"), Durability::Normal).await?;
    let mut waiting = Vec::new();
    for group in 0..20 {
        let source = bus.subscribe(spec(&format!("group-{group}"), "bench.**")?).await?;
        waiting.push(tokio::spawn(async move { source.take(10).await.map(drop) }));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (before, started) = (cpu_time(), Instant::now());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let share = (cpu_time() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    println!("idle with 20 subscriptions: {:.2} % of one core", share * 100.0);
    bus.close().await;
    Ok(())
}

async fn run() -> Result<(), Failure> {
    let directory: PathBuf = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, Into::into);
    if let Ok(count) = std::env::var("BENCH_CONSUME") {
        let full = std::env::var("BENCH_DURABILITY").is_ok_and(|name| name == "full");
        return consume(&directory, count.parse()?, if full { Durability::Full } else { Durability::Normal }).await;
    }
    let directory = directory.join(format!("polybus-bench-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    throughput(&directory, "normal", Durability::Normal).await?;
    throughput(&directory, "full", Durability::Full).await?;
    latency(&directory).await?;
    commits(&directory).await?;
    idle(&directory).await?;
    std::io::stdout().flush()?;
    std::fs::remove_dir_all(&directory)?;
    Ok(())
}

fn main() -> Result<(), Failure> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run())
}
