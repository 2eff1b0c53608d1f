//! What the tests share: a bus in a directory of its own, waiting with a deadline, and children of this very program.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use polybus_core::delivery::{Body, Delivery, Verdict};
use polybus_core::event::{Event, EventType, Meta};
use polybus_core::pattern::Pattern;
use polybus_core::transport::{
    Confirm, Durability, GroupSpec, Outgoing, Receipt, Settings, Settlement, Source, Start, Transport, connect,
};

pub const TYPE: &str = "order.created";
/// Nothing here should take longer, on a busy machine either.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn settings() -> Settings {
    Settings {
        bus: "default".into(),
        durability: Durability::Normal,
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
    }
}

pub fn url(path: &Path) -> String {
    format!("sqlite:///{}", path.display())
}

pub async fn open(path: &Path) -> Arc<dyn Transport> {
    open_with(path, settings()).await
}

pub async fn open_with(path: &Path, settings: Settings) -> Arc<dyn Transport> {
    connect(&url(path), settings).await.unwrap()
}

pub struct Place {
    pub directory: tempfile::TempDir,
    pub path: PathBuf,
}

pub fn place() -> Place {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().canonicalize().unwrap().join("events.db");
    Place { directory, path }
}

pub fn event_of(event_type: &str, payload: &str) -> Event {
    Event::new(EventType::new(event_type).unwrap(), payload.to_owned().into(), Meta::new(SystemTime::now()))
}

pub fn outgoing(n: usize) -> Outgoing {
    Outgoing { event: event_of(TYPE, &n.to_string()), delay: None, expires_in: None }
}

pub async fn publish(bus: &Arc<dyn Transport>, range: std::ops::Range<usize>) -> Vec<Receipt> {
    bus.publish(range.map(outgoing).collect(), PATIENCE).await.unwrap()
}

pub fn spec(group: &str) -> GroupSpec {
    GroupSpec {
        group: group.into(),
        subscription: "on-order".into(),
        service: "shop".into(),
        pattern: Pattern::new(TYPE).unwrap(),
        start: Start::New,
        broadcast: false,
        ordered: false,
        lease: Duration::from_secs(30),
        responder: false,
        keep_expired: false,
    }
}

pub async fn take(source: &Arc<dyn Source>, max: usize) -> Vec<Delivery> {
    tokio::time::timeout(PATIENCE, source.take(max)).await.expect("a delivery within the deadline").unwrap()
}

/// Takes until there are `count`.
pub async fn take_all(source: &Arc<dyn Source>, count: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(take(source, count - all.len()).await);
    }
    all
}

pub fn number(delivery: &Delivery) -> usize {
    match &delivery.body {
        Body::Event(event) => std::str::from_utf8(&event.payload).unwrap().parse().unwrap(),
        Body::Undecodable { reason, .. } => panic!("{reason}"),
    }
}

pub fn numbers(deliveries: &[Delivery]) -> Vec<usize> {
    deliveries.iter().map(number).collect()
}

/// Settles and returns how many had no effect.
pub async fn settle(source: &Arc<dyn Source>, deliveries: &[Delivery], verdict: Verdict) -> usize {
    let batch =
        deliveries.iter().map(|delivery| Settlement { lease: delivery.lease, verdict: verdict.clone() }).collect();
    source.settle(batch).await.unwrap().len()
}

/// Whether `source` has nothing to give for a moment. The one place that waits for something not to happen.
pub async fn is_idle(source: &Arc<dyn Source>) -> bool {
    tokio::time::timeout(Duration::from_millis(150), source.take(1)).await.is_err()
}

/// Asks until `probe` says yes.
pub async fn until<F: Future<Output = bool>>(what: &str, mut probe: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !probe().await {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Publishes until that fails.
pub async fn first_failure(bus: &Arc<dyn Transport>) -> polybus_core::Error {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Err(cause) = bus.publish(vec![outgoing(1)], PATIENCE).await {
            return cause;
        }
        assert!(Instant::now() < deadline, "no publish failed within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs the test `name` of this program in a process of its own, with `role` and the path in its environment.
pub fn child(name: &str, role: &str, path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("POLYBUS_ROLE", role)
        .env("POLYBUS_PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The role and the path, in a child.
pub fn role() -> Option<(String, PathBuf)> {
    Some((std::env::var("POLYBUS_ROLE").ok()?, std::env::var_os("POLYBUS_PATH")?.into()))
}

/// Waits for a line of the child that contains `signal`; returns it.
pub fn wait_line(reader: &mut impl std::io::BufRead, signal: &str) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the child ended before it said {signal:?}");
        if line.contains(signal) {
            return line;
        }
    }
}
