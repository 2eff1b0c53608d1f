//! Storing events: a plain XADD for one, a transaction for several.
//!
//! Each partition has one task that stores ([`Publisher`]). What is published while a write is under way goes together
//! with the next one: concurrent publishers share round trips without doing anything, and share the waiting for a disk or
//! a replica. What is delayed or expires goes through the script `later`, because only the server knows its time, and what
//! has an idempotency key through `once`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};
use tokio::sync::{Notify, OwnedSemaphorePermit, oneshot};
use tokio::time::Instant;

use super::direct::Direct;
use super::fault::{self, Failure, strange};
use super::keys::partition_of;
use super::partition::{Partition, lock};
use super::{scripts, value};
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Text;
use crate::transport::room::Room;
use crate::transport::{Confirm, Outgoing, Receipt, Settings, time};

/// Before something is repeated that the server refused because it starts or fails over.
pub(super) const AGAIN: Duration = Duration::from_millis(50);
/// Events, and bytes of them, that one write carries at most.
const MOST: usize = 5_000;
const BYTES: usize = 8 << 20;
/// What the storing task is given beyond a caller's deadline to say what is wrong.
const GRACE: Duration = Duration::from_millis(100);

pub(super) struct Row {
    pub index: usize,
    id: Text,
    pub event_type: Text,
    pub key: Option<Text>,
    /// The idempotency key, and how long it is remembered, in milliseconds.
    once: Option<(Text, i64)>,
    pub bytes: Bytes,
    /// Milliseconds.
    delay: Option<i64>,
    expires_in: Option<i64>,
}

impl Row {
    /// Where it goes, of so many. An idempotency key is remembered where its event is: it decides, unless a partition key
    /// does.
    pub fn partition(&self, count: usize) -> usize {
        let key = self.key.as_ref().or_else(|| self.once.as_ref().map(|(key, _)| key));
        partition_of(key.map(|key| &**key), count as u32) as usize
    }

    /// Whether a plain XADD stores it.
    pub fn is_plain(&self) -> bool {
        self.once.is_none() && self.delay.is_none() && self.expires_in.is_none()
    }

    /// Bytes of the event.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }
}

/// One caller's events for one partition: all or nothing.
pub(super) struct Job {
    pub(super) rows: Arc<Vec<Row>>,
    pub(super) deadline: Instant,
    state: Arc<AtomicU8>,
    _room: Arc<OwnedSemaphorePermit>,
    reply: oneshot::Sender<Result<Vec<Value>>>,
}

/// Nobody may change its mind once it is sent.
const QUEUED: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

fn step(state: &AtomicU8, from: u8, to: u8) -> bool {
    state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

/// A job as its caller sees it.
pub(super) struct Queued {
    answer: oneshot::Receiver<Result<Vec<Value>>>,
    state: Arc<AtomicU8>,
    deadline: Instant,
}

impl Queued {
    /// The answers to its rows, or why there are none: whether nothing was stored, or perhaps all.
    pub async fn stored(self, partition: &Partition) -> Result<Vec<Value>> {
        match tokio::time::timeout_at(self.deadline + GRACE, self.answer).await {
            Ok(answer) => answer.unwrap_or_else(|_| Err(fault::closed())),
            Err(_) if step(&self.state, QUEUED, GIVEN_UP) => Err(Error::new(
                ErrorKind::PublishTimeout,
                "the publish did not start in time and nothing was stored; the server is slow or far behind, try again",
            )),
            Err(_) => {
                partition.publisher.give_up(partition);
                let late = Error::connection_failed("Redis did not answer in time");
                Err(explain(Failure { unknown: true, ..late.into() }))
            }
        }
    }
}

/// What waits to be stored in one partition.
#[derive(Default)]
pub(super) struct Publisher {
    queue: Mutex<VecDeque<Job>>,
    pub(super) wanted: Notify,
    pub(super) direct: Direct,
}

impl Publisher {
    /// Queues jobs, each whole or not at all, in order and together.
    pub fn queue(
        &self,
        partition: &Arc<Partition>,
        jobs: impl Iterator<Item = Arc<Vec<Row>>>,
        room: &Arc<OwnedSemaphorePermit>,
        deadline: Instant,
    ) -> Vec<Queued> {
        let mut waiting = Vec::with_capacity(jobs.size_hint().0);
        let jobs = jobs.map(|rows| {
            let (reply, answer) = oneshot::channel();
            let state = Arc::new(AtomicU8::new(QUEUED));
            waiting.push(Queued { answer, state: state.clone(), deadline });
            Job { rows, deadline, state, _room: room.clone(), reply }
        });
        lock(&self.queue).extend(jobs);
        if !self.start(partition) {
            self.wanted.notify_one();
        }
        waiting
    }

    /// Stores until the partition is closed.
    pub async fn run(partition: Arc<Partition>, confirm: Confirm) {
        let publisher = &partition.publisher;
        while !partition.is_closed() {
            // Whoever ends a direct write goes on with what waits.
            let idle = publisher.earliest().filter(|_| !publisher.direct.is_writing());
            let Some(deadline) = idle else {
                publisher.wanted.notified().await;
                continue;
            };
            // First: what waits for a connection was not sent, and its callers may still be told so.
            if let Err(failure) = partition.publishing.ready(deadline).await {
                publisher.refuse(&failure);
                continue;
            }
            if publisher.start(&partition) {
                continue;
            }
            if publisher.direct.begin() {
                let jobs = publisher.next();
                if !jobs.is_empty() {
                    publisher.write(&partition, jobs, confirm).await;
                }
                publisher.direct.end();
            }
        }
        lock(&publisher.queue).clear();
    }

    pub fn close(&self) {
        self.wanted.notify_one();
    }

    fn earliest(&self) -> Option<Instant> {
        lock(&self.queue).iter().map(|job| job.deadline).min()
    }

    /// Tells those whose time is up that there is no connection, and all of them when there never will be one.
    fn refuse(&self, failure: &Failure) {
        let hopeless = !failure.again && failure.error.kind() != ErrorKind::ConnectionFailed;
        let now = Instant::now();
        let mut queue = lock(&self.queue);
        let (late, rest): (VecDeque<_>, _) = queue.drain(..).partition(|job| hopeless || job.deadline <= now);
        *queue = rest;
        drop(queue);
        for job in late.into_iter().filter(|job| step(&job.state, QUEUED, GIVEN_UP)) {
            drop(job.reply.send(Err(failure.error.clone())));
        }
    }

    pub(super) fn next(&self) -> Vec<Job> {
        let mut queue = lock(&self.queue);
        let (mut jobs, mut count, mut bytes) = (Vec::new(), 0, 0);
        while count < MOST
            && bytes < BYTES
            && let Some(job) = queue.pop_front()
        {
            if step(&job.state, QUEUED, SENT) {
                count += job.rows.len();
                bytes += job.rows.iter().map(|row| row.bytes.len()).sum::<usize>();
                jobs.push(job);
            }
        }
        jobs
    }

    /// One write: every job's commands, and one waiting for all of them.
    async fn write(&self, partition: &Partition, jobs: Vec<Job>, confirm: Confirm) {
        let last = jobs.iter().map(|job| job.deadline).max().unwrap_or_else(Instant::now);
        let mut commands = Pipeline::with_capacity(jobs.len() + 1);
        commands.ignore_errors();
        for job in &jobs {
            add(&mut commands, partition, &job.rows);
        }
        match confirm {
            Confirm::Memory => {}
            Confirm::Disk => {
                commands.cmd("WAITAOF").arg(1).arg(0).arg(patience(last));
            }
            Confirm::Replica => {
                commands.cmd("WAIT").arg(1).arg(patience(last));
            }
        }
        let answers = partition.publishing.run_all(&commands, last).await;
        let again = self.hand_out(jobs, answers, confirm);
        if !again.is_empty() {
            tokio::time::sleep(AGAIN).await;
            self.put_back(again);
        }
    }

    /// Tells the callers what became of their jobs. Those that are to be tried again in a moment are left.
    pub(super) fn hand_out(
        &self,
        jobs: Vec<Job>,
        answers: Result<Vec<Value>, Failure>,
        confirm: Confirm,
    ) -> VecDeque<Job> {
        let mut answers = match answers {
            Ok(answers) => answers.into_iter(),
            Err(failure) => {
                let error = explain(failure);
                jobs.into_iter().for_each(|job| drop(job.reply.send(Err(error.clone()))));
                return VecDeque::new();
            }
        };
        let sorted: Vec<_> = jobs.iter().map(|job| sort(&mut answers, job.rows.len())).collect();
        let confirmed = confirmed(answers.next(), confirm);
        let mut again = VecDeque::new();
        for (job, stored) in jobs.into_iter().zip(sorted) {
            match stored {
                Err(failure) if failure.again && Instant::now() + AGAIN < job.deadline => {
                    job.state.store(QUEUED, Ordering::Release);
                    again.push_back(job);
                }
                Err(failure) => drop(job.reply.send(Err(explain(failure)))),
                Ok(done) => drop(job.reply.send(confirmed.clone().map(|()| done))),
            }
        }
        again
    }

    pub(super) fn put_back(&self, mut again: VecDeque<Job>) {
        let mut queue = lock(&self.queue);
        again.append(&mut queue);
        *queue = again;
    }

    pub(super) fn has_waiting(&self) -> bool {
        !lock(&self.queue).is_empty()
    }
}

/// Stores the batch, when there is room for it. Atomic within a partition; a failure lists what was not accepted.
pub(super) async fn publish(
    partitions: &[Arc<Partition>],
    room: &Room,
    batch: Vec<Outgoing>,
    deadline: Instant,
    limits: (&Settings, usize),
) -> Result<Vec<Receipt>> {
    let count = batch.len();
    let mut parts: Vec<Vec<Row>> = partitions.iter().map(|_| Vec::new()).collect();
    let mut bytes = 0;
    for (index, outgoing) in batch.into_iter().enumerate() {
        let row = row(index, outgoing, limits)?;
        bytes += row.bytes.len();
        parts[row.partition(partitions.len())].push(row);
    }
    let room = Arc::new(room.enter(count, bytes, deadline).await?);
    let (mut receipts, mut failures) = (vec![None; count], Vec::new());
    let several = partitions.len() > 1;
    let work = partitions.iter().zip(parts).filter(|(_, rows)| !rows.is_empty());
    let stored = work.map(|(partition, rows)| {
        let (rows, room) = (Arc::new(rows), room.clone());
        async move { (rows.clone(), store(partition, rows, room, deadline, several).await) }
    });
    for (rows, stored) in futures_util::future::join_all(stored).await {
        match stored {
            Ok(stored) => {
                for (row, stored) in rows.iter().zip(stored) {
                    receipts[row.index] = Some(stored.receipt(row));
                }
            }
            Err(error) => failures.extend(rows.iter().map(|row| (row.index, error.clone()))),
        }
    }
    if failures.is_empty() {
        return receipts.into_iter().map(|receipt| receipt.ok_or_else(|| strange("a short answer"))).collect();
    }
    let error = failures[0].1.clone();
    if failures.len() == count {
        return Err(error);
    }
    failures.sort_unstable_by_key(|(index, _)| *index);
    let message = format!("{} of {count} events were not accepted: {}", failures.len(), error.message());
    Err(Error::new(error.kind(), message).listing(failures))
}

/// `limits`: what the user set, and the bytes of an event that the server takes.
pub(super) fn row(
    index: usize,
    Outgoing { event, delay, expires_in }: Outgoing,
    (settings, largest): (&Settings, usize),
) -> Result<Row> {
    let bytes: Bytes = codec::encode(&event)?.into();
    if bytes.len() > largest {
        return Err(Error::new(
            ErrorKind::PayloadTooLarge,
            format!(
                "the event has {} bytes, and this Redis takes {largest} (proto-max-bulk-len); raise that, or publish a \
                 reference to the data",
                bytes.len()
            ),
        ));
    }
    Ok(Row {
        index,
        id: event.meta.id.clone(),
        event_type: event.event_type.text().clone(),
        key: event.meta.partition_key.clone(),
        once: settings.once(&event).map(|(key, window)| (key, time::millis(window).max(1))),
        bytes,
        delay: delay.filter(|delay| !delay.is_zero()).map(time::millis),
        expires_in: expires_in.map(time::millis),
    })
}

pub(super) fn command(partition: &Partition, row: &Row) -> Cmd {
    let keys = &partition.keys;
    let key = row.key.as_deref();
    if row.is_plain() {
        let mut add = redis::cmd("XADD");
        add.arg(&keys.events).arg("*").arg("t").arg(&*row.event_type).arg("e").arg(&row.bytes[..]);
        if let Some(key) = key {
            add.arg("k").arg(key);
        }
        return add;
    }
    let store = [&*keys.events, &*keys.delayed, &*keys.delayed_data, &*keys.meta, &*keys.bell];
    let mut later = match &row.once {
        None => scripts::LATER.call_by_text(&store),
        Some((once, window)) => {
            let seen = keys.seen(once);
            let mut command = scripts::ONCE.call_by_text(&[&[&*seen], &store[..]].concat());
            command.arg(*window).arg(&*row.id);
            command
        }
    };
    let number = |ms: Option<i64>| ms.map_or(String::new(), |ms| ms.to_string());
    later.arg(number(row.delay)).arg(number(row.expires_in));
    later.arg(&*row.event_type).arg(&row.bytes[..]).arg(key.unwrap_or_default());
    later
}

/// Where an event is, or the one that was published before under its key, and that one's id.
pub(super) struct Stored {
    position: Option<Text>,
    first: Option<Text>,
}

impl Stored {
    /// Of this row.
    pub fn receipt(self, row: &Row) -> Receipt {
        let duplicate = self.first.is_some();
        Receipt { id: self.first.unwrap_or_else(|| row.id.clone()), position: self.position, duplicate }
    }
}

/// Stores what belongs to one partition. What became of each, in order.
pub(super) async fn store(
    partition: &Arc<Partition>,
    rows: Arc<Vec<Row>>,
    room: Arc<OwnedSemaphorePermit>,
    deadline: Instant,
    several: bool,
) -> Result<Vec<Stored>> {
    let mut queued = partition.publisher.queue(partition, std::iter::once(rows), &room, deadline);
    drop(room);
    let Some(queued) = queued.pop() else { return Err(strange("no job")) };
    queued.stored(partition).await?.into_iter().map(|answer| stored(partition, answer, several)).collect()
}

/// What one row's answer says.
pub(super) fn stored(partition: &Partition, answer: Value, several: bool) -> Result<Stored> {
    let mut first = None;
    let id = match answer {
        Value::Array(parts) => {
            let mut parts = parts.into_iter();
            let (id, due) = (parts.next(), parts.next());
            if let Some(due @ 1..) = due.map(value::number).transpose()? {
                partition.delayed_until(due);
            }
            first = parts.next().map(value::text).transpose()?.filter(|id| !id.is_empty());
            id.unwrap_or(Value::Nil)
        }
        answer => answer,
    };
    let id = value::text(id)?;
    let position = match several {
        _ if id.is_empty() => None,
        true => Some(format!("{}:{id}", partition.number).into()),
        false => Some(id.into()),
    };
    Ok(Stored { position, first: first.map(Into::into) })
}

fn add(commands: &mut Pipeline, partition: &Partition, rows: &[Row]) {
    if let [row] = rows {
        commands.add_command(command(partition, row));
        return;
    }
    commands.cmd("MULTI");
    for row in rows {
        commands.add_command(command(partition, row));
    }
    commands.cmd("EXEC");
}

/// The answers to one job's rows.
fn sort(answers: &mut impl Iterator<Item = Value>, rows: usize) -> Result<Vec<Value>, Failure> {
    let mut next = || answers.next().map_or_else(|| Err(strange("a short pipeline").into()), fault::check);
    if rows == 1 {
        return Ok(vec![next()?]);
    }
    // The first refusal says why; EXEC would only say that there was one. All are taken, whatever they say.
    let queued: Vec<_> = (0..=rows).map(|_| next()).collect();
    let done = next();
    queued.into_iter().collect::<Result<Vec<_>, _>>()?;
    let done = value::list(done?)?;
    if done.len() != rows {
        return Err(strange("a short transaction").into());
    }
    done.into_iter().map(fault::check).collect()
}

/// Whether the write reached what `confirm` names.
fn confirmed(answer: Option<Value>, confirm: Confirm) -> Result<()> {
    let answer = match confirm {
        Confirm::Memory => return Ok(()),
        Confirm::Disk | Confirm::Replica => fault::check(answer.unwrap_or(Value::Nil)).map_err(explain)?,
    };
    let reached = match answer {
        Value::Array(counts) => counts.into_iter().next().map_or(Ok(0), value::number)?,
        count => value::number(count)?,
    };
    if reached >= 1 {
        return Ok(());
    }
    let what = if confirm == Confirm::Disk { "its disk" } else { "a replica" };
    Err(Error::new(
        ErrorKind::PublishUnknown,
        format!(
            "Redis has the event in memory, and did not confirm in time that it is on {what}; it may be lost with the server"
        ),
    ))
}

/// What the server may wait, in milliseconds. Its answer must come before our own deadline, at which the connection would
/// be given up, and it looks at its clock ten times a second.
pub(super) fn patience(deadline: Instant) -> u64 {
    let left = deadline.saturating_duration_since(Instant::now());
    (left.as_millis() as u64).saturating_sub(200).max(1)
}

/// A publish that was sent and not answered may have happened.
pub(super) fn explain(failure: Failure) -> Error {
    if !failure.unknown {
        return failure.error;
    }
    let message = format!(
        "the event was sent and not confirmed, it may or may not be stored ({}); publish it again if a duplicate does no harm, or with an idempotency key",
        failure.error.message()
    );
    Error::new(ErrorKind::PublishUnknown, message).caused_by(failure.error)
}
