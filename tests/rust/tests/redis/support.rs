//! Buses on servers of a test's own.
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::transport::Receipt;
use polybus_core::{Bus, BusOptions, Error, ErrorKind, Result, SubscribeOptions};
use tokio::task::JoinHandle;

/// What a publish may take whose timeout is [`HASTY`]: the timeout, and a machine that does other things too.
pub const SOON: Duration = Duration::from_secs(4);
const HASTY: Duration = Duration::from_millis(500);

pub fn bus(url: &str) -> Bus {
    bus_with(url, BusOptions::new("test"))
}

/// One that gives up a publish after half a second.
pub fn hasty(url: &str) -> Bus {
    bus_with(url, BusOptions { publish_timeout: HASTY, ..BusOptions::new("test") })
}

pub fn bus_with(url: &str, options: BusOptions) -> Bus {
    Bus::new(url, BusOptions { retry: quick(3), ..options }).unwrap()
}

pub async fn try_publish(bus: &Bus, event_type: &str, payload: &str) -> Result<Receipt> {
    Ok(bus.publish(vec![outgoing(event(event_type, payload))]).await?.remove(0))
}

/// The error of a publish, which must come soon.
pub async fn refused(bus: &Bus) -> Error {
    let published = tokio::time::timeout(SOON, try_publish(bus, "refused", "1")).await;
    published.expect("a publish takes longer than its timeout").unwrap_err()
}

/// As [`refused`], once the loss of the connection is noticed: a publish that was written before is unknown.
pub async fn refused_at_last(bus: &Bus) -> Error {
    loop {
        let error = refused(bus).await;
        if error.kind() != ErrorKind::PublishUnknown {
            return error;
        }
    }
}

/// The error of opening, which must come soon.
pub async fn not_opened(bus: &Bus) -> Error {
    tokio::time::timeout(2 * SOON, bus.start()).await.expect("opening hangs").unwrap_err()
}

/// The error has that kind, and its message each of these parts.
#[track_caller]
pub fn assert_error(error: &Error, kind: ErrorKind, parts: &[&str]) {
    assert_eq!(error.kind(), kind, "{error:?}");
    for part in parts {
        assert!(error.to_string().contains(part), "{part:?} is not in {error:?}");
    }
}

/// Publishes until it works.
pub async fn publish_at_last(bus: &Bus, event_type: &str, payload: &str) {
    let published = || async { Ok(try_publish(bus, event_type, payload).await.is_ok()) };
    eventually("a publish succeeds again", published).await;
}

pub fn count(bus: &Bus, name: &str) -> u64 {
    bus.transport_counts().into_iter().find(|(known, _)| *known == name).unwrap().1
}

pub fn one_at_a_time(name: &str) -> SubscribeOptions {
    SubscribeOptions { concurrency: Some(1), ..SubscribeOptions::new(name) }
}

/// A connection that stays, for where a redis-cli would be refused.
pub struct Administrator(BufReader<TcpStream>);

impl Administrator {
    pub fn of(server: &RedisServer) -> Self {
        Self(BufReader::new(TcpStream::connect(server.address()).unwrap()))
    }

    /// Runs a command that answers in one line.
    pub fn tell(&mut self, words: &str) {
        self.0.get_mut().write_all(format!("{words}\r\n").as_bytes()).unwrap();
        let mut answer = String::new();
        self.0.read_line(&mut answer).unwrap();
        assert!(answer.starts_with(['+', ':']), "{words}: {answer}");
    }
}

/// Publishes numbers of type `n` one after the other until it is told to stop.
pub struct Publisher {
    stop: Arc<AtomicBool>,
    confirmed: Arc<AtomicUsize>,
    task: JoinHandle<Published>,
}

/// By what became of them.
#[derive(Default)]
pub struct Published {
    pub confirmed: HashSet<String>,
    pub unknown: HashSet<String>,
    pub refused: HashSet<String>,
}

impl Publisher {
    pub fn start(bus: &Bus) -> Self {
        let (stop, confirmed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (bus, stopped, confirms) = (bus.clone(), stop.clone(), confirmed.clone());
        let task = tokio::spawn(async move {
            let mut all = Published::default();
            for number in 0.. {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let number = number.to_string();
                match try_publish(&bus, "n", &number).await {
                    Ok(_) => {
                        confirms.fetch_add(1, Ordering::SeqCst);
                        all.confirmed.insert(number)
                    }
                    Err(error) if error.kind() == ErrorKind::PublishUnknown => all.unknown.insert(number),
                    Err(error) => {
                        assert_error(&error, ErrorKind::ConnectionFailed, &[]);
                        all.refused.insert(number)
                    }
                };
            }
            all
        });
        Self { stop, confirmed, task }
    }

    /// Waits until so many more are confirmed.
    pub async fn goes_on(&self, more: usize) {
        let wanted = self.confirmed.load(Ordering::SeqCst) + more;
        eventually("publishing goes on", || async { Ok(self.confirmed.load(Ordering::SeqCst) >= wanted) }).await;
    }

    pub async fn end(self) -> Published {
        self.stop.store(true, Ordering::SeqCst);
        within(self.task).await.unwrap()
    }
}

impl Published {
    /// Waits until everything confirmed was seen. What was seen besides may be unknown, not refused.
    pub async fn arrives(&self, seen: &mut Seen) {
        let mut missing = self.confirmed.clone();
        while !missing.is_empty() {
            let Ok(job) = tokio::time::timeout(DEADLINE, seen.next()).await else {
                panic!("lost: {missing:?} of {}", self.confirmed.len());
            };
            let number = payload(&job);
            assert!(!self.refused.contains(&number), "{number} was said not to be stored");
            missing.remove(&number);
        }
    }
}
