//! What is removed from the log, and when.
//!
//! An entry goes when every group has finished it and it is older than the retention time: one script, which looks at the
//! slowest group first. A bus without groups keeps everything: a group may still be made at the beginning. The user's own
//! limits, age, number and bytes, remove entries even if a group has not finished them; what each group loses is counted first,
//! and the script refuses if a group has moved meanwhile.

use std::time::Duration;

use super::fault::Failure;
use super::partition::Partition;
use super::value::{self, Id};
use super::{group, scripts};
use crate::pattern::Pattern;
use crate::transport::time;

/// How long finished events stay unless the user says otherwise: the server keeps them in memory.
pub(super) const RETENTION: Duration = Duration::from_secs(60);
/// Entries that one step removes at most.
const STEP: usize = 10_000;

/// What a bus keeps.
#[derive(Debug, Clone)]
pub(super) struct Limits {
    pub retention: Duration,
    pub max_age: Option<Duration>,
    /// Of one partition.
    pub max_events: Option<u64>,
    /// Of one partition, as the server measures it.
    pub max_bytes: Option<u64>,
}

impl Limits {
    /// The user set limits that hold whether or not anybody is subscribed here.
    pub fn are_hard(&self) -> bool {
        self.max_age.is_some() || self.max_events.is_some() || self.max_bytes.is_some()
    }

    /// Between two sweeps.
    pub fn every(&self) -> Duration {
        let shortest = self.max_age.map_or(self.retention, |age| age.min(self.retention));
        (shortest / 4).clamp(Duration::from_secs(1), Duration::from_secs(10))
    }
}

/// One step. Whether there may be more to do.
pub(super) async fn sweep(partition: &Partition, limits: &Limits) -> Result<bool, Failure> {
    let forced = drop_old(partition, limits).await?;
    let mut command = scripts::TRIM.call(&[&partition.keys.events, &partition.keys.meta]);
    // Other processes sweep too: whoever is first does it for all.
    let pause = time::millis(limits.every()) / 2;
    command.arg(time::millis(limits.retention)).arg(pause).arg(STEP);
    let answer = partition.work.script(&scripts::TRIM, &command, partition.patience()).await?;
    let more = value::list(answer)?.into_iter().nth(1).map_or(Ok(0), value::number)?;
    Ok(forced || more == 1)
}

/// Removes what the user's limits say. Whether there may be more.
async fn drop_old(partition: &Partition, limits: &Limits) -> Result<bool, Failure> {
    let mut keep = Id::default();
    if let Some(age) = limits.max_age {
        let oldest = partition.now() - time::millis(age);
        keep = Id(oldest.max(0).unsigned_abs(), 0);
    }
    if let Some(most) = limits.max_events {
        let mut ask = redis::cmd("XLEN");
        let kept = value::number(partition.work.run(ask.arg(&partition.keys.events), partition.patience()).await?)?;
        let surplus = kept.unsigned_abs().saturating_sub(most).min(STEP as u64);
        if surplus > 0 {
            keep = keep.max(after_first(partition, surplus).await?);
        }
    }
    if let Some(most) = limits.max_bytes {
        let surplus = memory(partition).await?.saturating_sub(most);
        if surplus > 0 {
            keep = keep.max(after_bytes(partition, surplus).await?);
        }
    }
    if keep == Id::default() || oldest(partition).await?.is_none_or(|oldest| oldest >= keep) {
        return Ok(false);
    }
    let mut command = scripts::DROP.call(&[&partition.keys.events, &partition.keys.counts]);
    command.arg(keep.to_string());
    for (name, delivered, lost) in losses(partition, keep).await? {
        if lost > 0 {
            log::warn!("a limit on the log removes {lost} events that group {name} had not been given");
        }
        command.arg(name).arg(delivered).arg(lost);
    }
    partition.work.script(&scripts::DROP, &command, partition.patience()).await?;
    Ok(true)
}

async fn oldest(partition: &Partition) -> Result<Option<Id>, Failure> {
    let mut ask = redis::cmd("XRANGE");
    ask.arg(&partition.keys.events).arg("-").arg("+").arg("COUNT").arg(1);
    let found = value::entries(partition.work.run(&ask, partition.patience()).await?)?;
    Ok(found.first().map(|entry| entry.id))
}

/// The memory of the log, in bytes.
pub(super) async fn memory(partition: &Partition) -> Result<u64, Failure> {
    let mut ask = redis::cmd("MEMORY");
    ask.arg("USAGE").arg(&partition.keys.events).arg("SAMPLES").arg(0);
    Ok(value::number(partition.work.run(&ask, partition.patience()).await?)?.max(0).unsigned_abs())
}

/// The id after the first entries that have so many bytes. Not what the server needs for them, which is more: what is
/// still too much goes with the next sweep.
async fn after_bytes(partition: &Partition, bytes: u64) -> Result<Id, Failure> {
    let (mut left, mut from, mut looked, mut keep) = (bytes, "-".to_owned(), 0, Id::default());
    while left > 0 && looked < STEP {
        let mut ask = redis::cmd("XRANGE");
        ask.arg(&partition.keys.events).arg(&from).arg("+").arg("COUNT").arg(100);
        let found = value::entries(partition.work.run(&ask, partition.patience()).await?)?;
        let Some(last) = found.last().map(|entry| entry.id) else { break };
        looked += found.len();
        for entry in &found {
            if left == 0 {
                break;
            }
            let size: usize = entry.fields.iter().map(|(name, content)| name.len() + content.len()).sum();
            left = left.saturating_sub(size as u64);
            keep = Id(entry.id.0, entry.id.1 + 1);
        }
        from = format!("({last}");
    }
    Ok(keep)
}

/// The id after the first `count` entries.
async fn after_first(partition: &Partition, count: u64) -> Result<Id, Failure> {
    let (mut left, mut from) = (count, "-".to_owned());
    loop {
        let mut ask = redis::cmd("XRANGE");
        ask.arg(&partition.keys.events).arg(&from).arg("+").arg("COUNT").arg(left.min(500));
        let found = value::entries(partition.work.run(&ask, partition.patience()).await?)?;
        let Some(last) = found.last().map(|entry| entry.id) else { return Ok(Id::default()) };
        left = left.saturating_sub(found.len() as u64);
        if left == 0 {
            return Ok(Id(last.0, last.1 + 1));
        }
        from = format!("({last}");
    }
}

/// For each group: its name, the last entry that it was given, and how many wanted ones before `keep` it was not.
async fn losses(partition: &Partition, keep: Id) -> Result<Vec<(String, String, u64)>, Failure> {
    let mut losses = Vec::new();
    for (name, delivered) in group::delivered(partition).await? {
        let delivered = delivered.to_string();
        let mut ask = redis::cmd("HGET");
        let facts = partition.work.run(ask.arg(&partition.keys.groups).arg(&name), partition.patience()).await?;
        // A group that is not ours wants everything.
        let pattern = match facts {
            redis::Value::Nil => Pattern::new("*")?,
            facts => group::pattern(&value::text(facts)?)?,
        };
        let (mut lost, mut from) = (0, delivered.clone());
        loop {
            let (next, counts) = group::types(partition, &from, &format!("({keep}")).await?;
            lost += counts.iter().filter(|(found, ..)| pattern.matches(found)).map(|(_, count, _)| count).sum::<u64>();
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        losses.push((name, delivered, lost));
    }
    Ok(losses)
}
