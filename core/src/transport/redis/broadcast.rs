//! A subscription without a group: a cursor in memory over the log, from the moment of subscribing. Nothing is leased,
//! so nothing can be settled, and nothing outlives the process.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use redis::{Cmd, Value};
use tokio::sync::{Notify, watch};

use super::doorbell::Waiter;
use super::fault::{Failure, closed};
use super::hold::decode;
use super::partition::{Partition, lock};
use super::value::{self, Id};
use crate::delivery::{Delivery, Lease};
use crate::error::{ErrorKind, Result};
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, Settlement, Source, Task};

/// Entries that one read asks for.
const COUNT: usize = 200;
/// Between looks at the end of the log, which may have become another log.
const CHECK: Duration = Duration::from_secs(2);
/// Before a look is repeated that failed.
const AGAIN: Duration = Duration::from_millis(100);

pub(super) struct BroadcastSource(Arc<Shared>);

struct Shared {
    readers: Vec<Arc<Reader>>,
    ready: Arc<Ready>,
    closed: watch::Sender<bool>,
}

#[derive(Default)]
struct Ready {
    deliveries: Mutex<VecDeque<Delivery>>,
    arrived: Notify,
    next: AtomicI64,
}

/// The cursor in one partition.
struct Reader {
    partition: Arc<Partition>,
    pattern: Pattern,
    max_payload: usize,
    ready: Arc<Ready>,
    state: Mutex<State>,
}

struct State {
    cursor: Id,
    /// There may be entries after `cursor`.
    fresh: bool,
    waiting: bool,
}

/// Subscribes from now on.
pub(super) async fn join(
    partitions: &[Arc<Partition>],
    spec: GroupSpec,
    max_payload: usize,
) -> Result<Arc<BroadcastSource>> {
    let ready = Arc::new(Ready::default());
    let mut readers = Vec::new();
    for partition in partitions {
        let cursor = partition.look(&[]).await?.last;
        readers.push(Arc::new(Reader {
            partition: partition.clone(),
            pattern: spec.pattern.clone(),
            max_payload,
            ready: ready.clone(),
            state: Mutex::new(State { cursor, fresh: false, waiting: false }),
        }));
    }
    Ok(Arc::new(BroadcastSource(Arc::new(Shared { readers, ready, closed: watch::Sender::new(false) }))))
}

impl Reader {
    fn read_command(&self) -> Cmd {
        let mut command = redis::cmd("XREAD");
        command.arg("COUNT").arg(COUNT).arg("STREAMS").arg(&self.partition.keys.events);
        command.arg(lock(&self.state).cursor.to_string());
        command
    }

    async fn look(&self) -> Result<(), Failure> {
        lock(&self.state).waiting = false;
        while lock(&self.state).fresh && !self.ready.is_full() {
            let answer = self.partition.work.run(&self.read_command(), self.partition.patience()).await?;
            self.receive(answer)?;
        }
        Ok(())
    }

    /// A log that ends before our cursor is another log: begin with it.
    async fn check(&self) -> Result<(), Failure> {
        let last = self.partition.look(&[]).await?.last;
        let mut state = lock(&self.state);
        if last < state.cursor {
            log::warn!(
                "stream_reset: {} was lost; broadcasts go on with what is there now",
                self.partition.keys.events
            );
            (state.cursor, state.fresh) = (Id::default(), true);
        }
        Ok(())
    }

    fn receive(&self, answer: Value) -> Result<()> {
        let entries = value::read(answer)?;
        let now = self.partition.now();
        let mut state = lock(&self.state);
        state.fresh = entries.len() >= COUNT;
        if let Some(last) = entries.last() {
            state.cursor = last.id;
        }
        drop(state);
        for mut entry in entries {
            let matches = entry.text("t").is_some_and(|event_type| self.pattern.matches(&event_type));
            if !matches || entry.number("x").is_some_and(|at| at <= now) {
                continue;
            }
            let (codec_name, raw) = (entry.take("c"), entry.take("e").unwrap_or_default());
            self.ready.add(Delivery {
                body: decode(&raw, self.max_payload, codec_name.as_deref()),
                lease: Lease { position: self.ready.next.fetch_add(1, Ordering::Relaxed), token: 0 },
                attempt: 1,
                redelivered: false,
                received_at: SystemTime::now(),
                first_failed_at: None,
                expired: false,
            });
        }
        Ok(())
    }
}

impl Ready {
    fn add(&self, delivery: Delivery) {
        lock(&self.deliveries).push_back(delivery);
        self.arrived.notify_one();
    }

    fn is_full(&self) -> bool {
        lock(&self.deliveries).len() >= COUNT
    }

    fn take(&self, max: usize) -> Vec<Delivery> {
        let mut deliveries = lock(&self.deliveries);
        let count = deliveries.len().min(max);
        deliveries.drain(..count).collect()
    }
}

impl Waiter for Reader {
    fn command(&self) -> Option<Cmd> {
        let waits = lock(&self.state).waiting && !self.ready.is_full();
        waits.then(|| self.read_command())
    }

    fn waits(&self) -> bool {
        lock(&self.state).waiting && !self.ready.is_full()
    }

    fn position(&self) -> Id {
        lock(&self.state).cursor
    }

    fn answer(&self, answer: Result<Value, Failure>, _seen: Option<Id>) -> bool {
        let before = self.position();
        if answer.map_err(|failure| failure.error).and_then(|answer| self.receive(answer)).is_err() {
            lock(&self.state).fresh = true;
        }
        let found = self.position() != before;
        if found || lock(&self.state).fresh {
            lock(&self.state).waiting = false;
            self.ready.arrived.notify_one();
        }
        found
    }

    fn disarmed(&self) {}
}

impl Shared {
    async fn take(&self, max: usize) -> Result<Vec<Delivery>> {
        let mut closing = self.closed.subscribe();
        let mut check_at = tokio::time::Instant::now() + CHECK;
        loop {
            if *closing.borrow() {
                return Err(closed());
            }
            let arrived = self.ready.arrived.notified();
            let ready = self.ready.take(max);
            if !ready.is_empty() {
                return Ok(ready);
            }
            let check = tokio::time::Instant::now() >= check_at;
            if check {
                check_at = tokio::time::Instant::now() + CHECK;
            }
            let mut waits = true;
            for reader in &self.readers {
                let looked = async {
                    if check {
                        reader.check().await?;
                    }
                    reader.look().await
                };
                match looked.await {
                    Ok(()) => {}
                    Err(failure) if failure.error.kind() == ErrorKind::ConnectionFailed => {
                        lock(&reader.state).fresh = true;
                        tokio::time::sleep(AGAIN.mul_f64(0.5 + fastrand::f64())).await;
                    }
                    Err(failure) => return Err(failure.error),
                }
                if !lock(&reader.state).fresh {
                    lock(&reader.state).waiting = true;
                }
                let waiter: Arc<dyn Waiter> = reader.clone();
                if !reader.partition.doorbell.wait(&waiter) {
                    lock(&reader.state).fresh = true;
                }
                waits &= !lock(&reader.state).fresh;
            }
            if !waits || !lock(&self.ready.deliveries).is_empty() {
                continue;
            }
            tokio::select! {
                () = arrived => {}
                () = tokio::time::sleep_until(check_at) => {}
                _ = closing.changed() => {}
            }
        }
    }
}

impl Source for BroadcastSource {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let shared = self.0.clone();
        Box::pin(async move { shared.take(max.max(1)).await.map_err(|cause| cause.during("take")) })
    }

    fn settle(&self, _settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn heartbeat(&self, _held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn close(&self) -> Task<()> {
        self.0.closed.send_replace(true);
        self.0.readers.iter().for_each(|reader| lock(&reader.state).waiting = false);
        Box::pin(async {})
    }
}
