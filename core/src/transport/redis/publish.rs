//! Storing events: a plain XADD for one, a transaction for several.
//!
//! Commands of concurrent publishers share writes to the socket by themselves. What is delayed or expires goes through
//! the script `later`, because only the server knows its time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, Pipeline, Value};
use tokio::time::Instant;

use super::fault::{self, Failure, strange};
use super::keys::partition_of;
use super::partition::Partition;
use super::{scripts, value};
use crate::codec;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Text;
use crate::transport::{Confirm, Outgoing, Receipt, time};

/// Before a batch is repeated that the server refused because it starts or fails over.
const AGAIN: Duration = Duration::from_millis(50);

struct Row {
    index: usize,
    id: Text,
    event_type: Text,
    key: Option<Text>,
    bytes: Bytes,
    /// Milliseconds.
    delay: Option<i64>,
    expires_in: Option<i64>,
}

/// Stores the batch. Atomic within a partition; a failure lists what was not accepted.
pub(super) async fn publish(
    partitions: &[Arc<Partition>],
    batch: Vec<Outgoing>,
    confirm: Confirm,
    deadline: Instant,
) -> Result<Vec<Receipt>> {
    let count = batch.len();
    let mut parts: Vec<Vec<Row>> = partitions.iter().map(|_| Vec::new()).collect();
    for (index, outgoing) in batch.into_iter().enumerate() {
        let row = row(index, outgoing)?;
        parts[partition_of(row.key.as_deref(), partitions.len() as u32) as usize].push(row);
    }
    let (mut receipts, mut failures) = (vec![None; count], Vec::new());
    let several = partitions.len() > 1;
    let work = partitions.iter().zip(&parts).filter(|(_, rows)| !rows.is_empty());
    let stored =
        work.map(|(partition, rows)| async move { (rows, store(partition, rows, confirm, deadline, several).await) });
    for (rows, stored) in futures_util::future::join_all(stored).await {
        match stored {
            Ok(positions) => {
                for (row, position) in rows.iter().zip(positions) {
                    receipts[row.index] = Some(Receipt { id: row.id.clone(), position });
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

fn row(index: usize, Outgoing { event, delay, expires_in }: Outgoing) -> Result<Row> {
    Ok(Row {
        index,
        id: event.meta.id.clone(),
        event_type: event.event_type.text().clone(),
        key: event.meta.partition_key.clone(),
        bytes: codec::encode(&event)?.into(),
        delay: delay.filter(|delay| !delay.is_zero()).map(time::millis),
        expires_in: expires_in.map(time::millis),
    })
}

fn command(partition: &Partition, row: &Row) -> Cmd {
    let keys = &partition.keys;
    let key = row.key.as_deref();
    if row.delay.is_none() && row.expires_in.is_none() {
        let mut add = redis::cmd("XADD");
        add.arg(&keys.events).arg("*").arg("t").arg(&*row.event_type).arg("e").arg(&row.bytes[..]);
        if let Some(key) = key {
            add.arg("k").arg(key);
        }
        return add;
    }
    let mut later =
        scripts::LATER.call_by_text(&[&keys.events, &keys.delayed, &keys.delayed_data, &keys.meta, &keys.bell]);
    let number = |ms: Option<i64>| ms.map_or(String::new(), |ms| ms.to_string());
    later.arg(number(row.delay)).arg(number(row.expires_in));
    later.arg(&*row.event_type).arg(&row.bytes[..]).arg(key.unwrap_or_default());
    later
}

/// Stores what belongs to one partition, and waits for what `confirm` asks. The positions, in order.
async fn store(
    partition: &Partition,
    rows: &[Row],
    confirm: Confirm,
    deadline: Instant,
    several: bool,
) -> Result<Vec<Option<Text>>> {
    let answers = if let ([row], Confirm::Memory) = (rows, confirm) {
        let answer = partition.publishing.run(&command(partition, row), deadline).await;
        vec![answer.map_err(explain)?]
    } else {
        transaction(partition, rows, confirm, deadline).await?
    };
    let position = |answer: Value| -> Result<Option<Text>> {
        let id = match answer {
            Value::Array(parts) => {
                let mut parts = parts.into_iter();
                let (id, due) = (parts.next(), parts.next());
                match due.map(value::number).transpose()? {
                    Some(due) if due > 0 => {
                        partition.delayed_until(due);
                        return Ok(None);
                    }
                    _ => id.unwrap_or(Value::Nil),
                }
            }
            answer => answer,
        };
        let id = value::text(id)?;
        Ok(Some(if several { format!("{}:{id}", partition.number).into() } else { id.into() }))
    };
    answers.into_iter().map(position).collect()
}

async fn transaction(partition: &Partition, rows: &[Row], confirm: Confirm, deadline: Instant) -> Result<Vec<Value>> {
    let mut commands = Pipeline::new();
    commands.ignore_errors().cmd("MULTI");
    for row in rows {
        commands.add_command(command(partition, row));
    }
    commands.cmd("EXEC");
    match confirm {
        Confirm::Memory => {}
        Confirm::Disk => {
            commands.cmd("WAITAOF").arg(1).arg(0).arg(patience(deadline));
        }
        Confirm::Replica => {
            commands.cmd("WAIT").arg(1).arg(patience(deadline));
        }
    }
    loop {
        let answers = partition.publishing.run_all(&commands, deadline).await.map_err(explain)?;
        match sort(answers, rows.len(), confirm) {
            Err(failure) if failure.again && Instant::now() + AGAIN < deadline => {
                tokio::time::sleep(AGAIN).await;
            }
            other => return other.map_err(explain),
        }
    }
}

/// The answers to the rows, out of those to `MULTI`, the rows as they were queued, `EXEC`, and the waiting.
fn sort(answers: Vec<Value>, rows: usize, confirm: Confirm) -> Result<Vec<Value>, Failure> {
    let mut answers = answers.into_iter();
    for _ in 0..=rows {
        // The first refusal says why; EXEC would only say that there was one.
        fault::check(answers.next().unwrap_or(Value::Nil))?;
    }
    let done = value::list(fault::check(answers.next().unwrap_or(Value::Nil))?)?;
    if done.len() != rows {
        return Err(strange("a short transaction").into());
    }
    let done = done.into_iter().map(fault::check).collect::<Result<Vec<_>, _>>()?;
    let reached = match confirm {
        Confirm::Memory => return Ok(done),
        Confirm::Disk => value::list(fault::check(answers.next().unwrap_or(Value::Nil))?)?.into_iter().next(),
        Confirm::Replica => answers.next().map(fault::check).transpose()?,
    };
    if reached.map(value::number).transpose()?.unwrap_or(0) >= 1 {
        return Ok(done);
    }
    let what = if confirm == Confirm::Disk { "its disk" } else { "a replica" };
    let error = Error::new(
        ErrorKind::PublishUnknown,
        format!(
            "Redis has the event in memory, and did not confirm in time that it is on {what}; it may be lost with the server"
        ),
    );
    Err(error.into())
}

/// What the server may wait, in milliseconds. Its answer must come before our own deadline, at which the connection would
/// be given up, and it looks at its clock ten times a second.
fn patience(deadline: Instant) -> u64 {
    let left = deadline.saturating_duration_since(Instant::now());
    (left.as_millis() as u64).saturating_sub(200).max(1)
}

/// A publish that was sent and not answered may have happened.
pub(super) fn explain(failure: Failure) -> Error {
    if !failure.unknown {
        return failure.error;
    }
    let message = format!(
        "the event was sent and not confirmed, it may or may not be stored ({}); publish it again if a duplicate does no harm",
        failure.error.message()
    );
    Error::new(ErrorKind::PublishUnknown, message).caused_by(failure.error)
}
