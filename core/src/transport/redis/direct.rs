//! Publishing from the thread that asks.
//!
//! A publish that has to wake another thread only to be written to a socket waits longer for that than for the server. So
//! whoever queues a publish also writes it, if nothing is under way and the connection is there; the answers are handed
//! out where they are read, and whatever came meanwhile goes next. The publisher's task only looks after the rest: it
//! connects, and says why it cannot.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use redis::Value;
use tokio::time::Instant;

use super::fault::Failure;
use super::partition::{Partition, lock};
use super::publish::{AGAIN, Job, Publisher, Row, command, patience};
use super::wire::Wire;
use crate::transport::Confirm;

/// The state of writes; one is under way at a time.
#[derive(Default)]
pub(super) struct Direct {
    pub confirm: OnceLock<Confirm>,
    writing: AtomicBool,
    /// When what was written has to be answered, and its connection, which lives until then whatever happens to the link.
    due: Mutex<Option<(Instant, u64, Wire)>>,
}

impl Direct {
    pub fn is_writing(&self) -> bool {
        self.writing.load(Ordering::Acquire)
    }

    /// Whether the caller may write now; then it has to end that, too.
    pub fn begin(&self) -> bool {
        !self.writing.swap(true, Ordering::AcqRel)
    }

    pub fn end(&self) {
        self.writing.store(false, Ordering::Release);
    }
}

impl Publisher {
    /// Writes what waits. False when that is left to the publisher's task.
    pub fn start(&self, partition: &Arc<Partition>) -> bool {
        let Some(confirm) = self.direct.confirm.get().copied().filter(|_| !partition.is_closed()) else { return false };
        loop {
            if !self.direct.begin() {
                return true; // its end goes on
            }
            let Some((wire, number)) = partition.publishing.own() else {
                self.direct.end();
                return false;
            };
            let jobs = self.next();
            if !jobs.is_empty() {
                let last = jobs.iter().map(|job| job.deadline).max().unwrap_or_else(Instant::now);
                *lock(&self.direct.due) = Some((last, number, wire.clone()));
                let (commands, count) = pack(partition, &jobs, confirm, last);
                let ours = partition.clone();
                wire.send(&commands, count, move |answers| {
                    let answers = ours.publishing.answered(number, answers);
                    ours.publisher.written(&ours, jobs, answers, confirm);
                });
                return true;
            }
            self.direct.end();
            if !self.has_waiting() {
                return true;
            }
        }
    }

    fn written(
        &self,
        partition: &Arc<Partition>,
        jobs: Vec<Job>,
        answers: Result<Vec<Value>, Failure>,
        confirm: Confirm,
    ) {
        drop(lock(&self.direct.due).take()); // and with it perhaps the connection
        let again = self.hand_out(jobs, answers, confirm);
        if again.is_empty() {
            return self.go_on(partition);
        }
        let ours = partition.clone();
        crate::process::current().runtime.spawn(async move {
            tokio::time::sleep(AGAIN).await;
            ours.publisher.put_back(again);
            ours.publisher.go_on(&ours);
        });
    }

    fn go_on(&self, partition: &Arc<Partition>) {
        self.direct.end();
        if self.has_waiting() && !self.start(partition) {
            self.wanted.notify_one();
        }
    }

    /// A caller has waited too long: drops the connection if it lets all of a write wait too long.
    pub fn give_up(&self, partition: &Partition) {
        let late = lock(&self.direct.due).take_if(|(due, ..)| *due <= Instant::now());
        if let Some((_, number, wire)) = late {
            partition.publishing.drop_live(number);
            wire.close();
        }
    }
}

/// The commands of all jobs as bytes, and how many answers they get.
fn pack(partition: &Partition, jobs: &[Job], confirm: Confirm, last: Instant) -> (Vec<u8>, usize) {
    let rows = || jobs.iter().flat_map(|job| job.rows.iter());
    let room: usize = rows().map(|row| row.bytes.len() + row.event_type.len() + 96).sum();
    let (mut out, mut count) = (Vec::with_capacity(room + 256), 0);
    let mut head = Vec::new();
    for word in [&b"XADD"[..], partition.keys.events.as_bytes(), b"*", b"t"] {
        text(&mut head, word);
    }
    for job in jobs {
        let whole = job.rows.len() > 1;
        if whole {
            out.extend_from_slice(b"*1\r\n$5\r\nMULTI\r\n");
        }
        for row in job.rows.iter() {
            match row.is_plain() {
                true => add(&mut out, &head, row),
                false => command(partition, row).write_packed_command(&mut out),
            }
        }
        if whole {
            out.extend_from_slice(b"*1\r\n$4\r\nEXEC\r\n");
        }
        count += job.rows.len() + if whole { 2 } else { 0 };
    }
    let mut wait = match confirm {
        Confirm::Memory => return (out, count),
        Confirm::Disk => redis::cmd("WAITAOF"),
        Confirm::Replica => redis::cmd("WAIT"),
    };
    wait.arg(1);
    if confirm == Confirm::Disk {
        wait.arg(0);
    }
    wait.arg(patience(last)).write_packed_command(&mut out);
    (out, count + 1)
}

/// `XADD <events> * t <type> e <event>`, and `k <key>` where there is one.
fn add(out: &mut Vec<u8>, head: &[u8], row: &Row) {
    out.extend_from_slice(if row.key.is_some() { b"*9\r\n" } else { b"*7\r\n" });
    out.extend_from_slice(head);
    text(out, row.event_type.as_bytes());
    text(out, b"e");
    text(out, &row.bytes);
    if let Some(key) = &row.key {
        text(out, b"k");
        text(out, key.as_bytes());
    }
}

fn text(out: &mut Vec<u8>, text: &[u8]) {
    let mut digits = [0; 20];
    let (mut at, mut left) = (digits.len(), text.len());
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    out.push(b'$');
    out.extend_from_slice(&digits[at..]);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(text);
    out.extend_from_slice(b"\r\n");
}
