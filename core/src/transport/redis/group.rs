//! Groups: joining, counting, deleting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use serde_json::json;

use super::fault::{Failure, strange};
use super::member;
use super::partition::Partition;
use super::scripts;
use super::value::{self, Id};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, GroupStats, Start, disagrees, time};

/// Entries that one step of counting looks at.
const COUNT: usize = 2_000;

/// What a member knows of its group.
pub(super) struct Joined {
    /// Up to where the group was given the log.
    pub delivered: Id,
    /// Of the server's data, when the group was there: with the same one, a missing group was deleted on purpose.
    pub epoch: String,
}

/// Makes the group if it is new. With `before`: again, because the server may have lost it since; `NotFound` when it was
/// deleted on purpose; `InvalidConfig` when it has another order.
pub(super) async fn join(partition: &Partition, spec: &GroupSpec, before: Option<Joined>) -> Result<Joined> {
    let keys = &partition.keys;
    let start = match spec.start {
        Start::New => "$".to_owned(),
        Start::Beginning => "0".to_owned(),
        // The server gives what comes after the id.
        Start::At(at) => match time::to_ms(at) {
            0 => "0".to_owned(),
            ms => format!("{}-{}", ms - 1, u64::MAX),
        },
    };
    let facts = json!({
        "pattern": spec.pattern.as_str(), "service": &*spec.service, "subscription": &*spec.subscription, "start": start,
    });
    let fresh = format!("{:016x}", fastrand::u64(..));
    let (known, cursor) = before.map_or_else(Default::default, |before| (before.epoch, before.delivered.to_string()));
    let mut command = scripts::JOIN.call(&[&keys.events, &keys.groups, &keys.meta, &keys.bell, &keys.counts]);
    command.arg(&*spec.group).arg(facts.to_string()).arg(start).arg(fresh).arg(known);
    command.arg(cursor).arg(if spec.ordered { "1" } else { "" });
    let mut answer = match partition.work.script(&scripts::JOIN, &command, partition.patience()).await? {
        Value::Array(answer) => answer.into_iter(),
        other if value::text(other.clone())? == "other order" => return Err(disagrees(&spec.group, spec.ordered)),
        _ => return Err(member::deleted(&spec.group)),
    };
    match (answer.next(), answer.next(), answer.next(), answer.next()) {
        (Some(epoch), Some(version), Some(delivered), Some(now)) => {
            let epoch = value::text(epoch)?;
            partition.joined(epoch.clone(), value::number(version)?, value::number(now)?);
            Ok(Joined { delivered: value::id(delivered)?, epoch })
        }
        _ => Err(strange("a short join")),
    }
}

/// The pattern in a group's facts.
pub(super) fn pattern(facts: &str) -> Result<Pattern> {
    let facts: serde_json::Value = serde_json::from_str(facts).map_err(|_| strange("facts of a group"))?;
    Pattern::new(facts["pattern"].as_str().unwrap_or_default())
}

/// All groups of a partition with their facts, by name.
pub(super) async fn facts(partition: &Partition) -> Result<BTreeMap<String, serde_json::Value>> {
    let names = names_in(partition).await?;
    if names.is_empty() {
        return Ok(BTreeMap::new());
    }
    let mut ask = redis::cmd("HMGET");
    ask.arg(&partition.keys.groups).arg(&names);
    let found = value::list(partition.work.run(&ask, partition.patience()).await?)?;
    let mut facts = BTreeMap::new();
    for (name, found) in names.into_iter().zip(found).filter(|(_, found)| *found != Value::Nil) {
        let found = serde_json::from_str(&value::text(found)?).map_err(|_| strange("facts of a group"))?;
        facts.insert(name, found);
    }
    Ok(facts)
}

/// The groups of the stream, each with the last entry that it was given.
pub(super) async fn delivered(partition: &Partition) -> Result<Vec<(String, Id)>, Failure> {
    let mut ask = redis::cmd("XINFO");
    ask.arg("GROUPS").arg(&partition.keys.events);
    let mut groups = Vec::new();
    for row in value::list(partition.work.run(&ask, partition.patience()).await?)? {
        let mut facts = value::list(row)?.into_iter();
        let (mut name, mut delivered) = (String::new(), Id::default());
        while let (Some(fact), Some(content)) = (facts.next(), facts.next()) {
            match value::text(fact)?.as_str() {
                "name" => name = value::text(content)?,
                "last-delivered-id" => delivered = value::id(content)?,
                _ => {}
            }
        }
        groups.push((name, delivered));
    }
    Ok(groups)
}

async fn names_in(partition: &Partition) -> Result<Vec<String>> {
    let mut ask = redis::cmd("HKEYS");
    ask.arg(&partition.keys.groups);
    value::list(partition.work.run(&ask, partition.patience()).await?)?.into_iter().map(value::text).collect()
}

/// The names of all groups of the bus.
pub(super) async fn names(partitions: &[Arc<Partition>]) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for partition in partitions {
        names.extend(names_in(partition).await?);
    }
    Ok(names)
}

/// Counts over all partitions.
pub(super) async fn stats(partitions: &[Arc<Partition>], group: &Text) -> Result<GroupStats> {
    let mut total = None;
    for partition in partitions {
        let Some(part) = partition_stats(partition, group).await? else { continue };
        let sum: &mut GroupStats = total.get_or_insert_default();
        sum.lag += part.lag;
        sum.in_flight += part.in_flight;
        sum.retrying += part.retrying;
        sum.dead += part.dead;
        sum.expired += part.expired;
        sum.oldest = sum.oldest.max(part.oldest);
    }
    total.ok_or_else(|| Error::not_found(format!("there is no group {group:?} on this bus")))
}

async fn partition_stats(partition: &Partition, group: &Text) -> Result<Option<GroupStats>> {
    let (keys, own) = (&partition.keys, partition.keys.group(group));
    let mut command = scripts::STATS.call(&[
        &keys.events,
        &keys.groups,
        &keys.counts,
        &own.retry,
        &own.held,
        &own.work,
        &own.dead,
        &own.lanes,
    ]);
    command.arg(&**group);
    let answer = partition.work.script(&scripts::STATS, &command, partition.patience()).await?;
    if answer == Value::Nil {
        return Ok(None);
    }
    let mut facts = value::list(answer)?.into_iter();
    let mut next = || facts.next().ok_or_else(|| strange("short statistics"));
    let pattern = pattern(&value::text(next()?)?)?;
    let now = value::number(next()?)?;
    let delivered = value::text(next()?)?;
    let mut count = || value::number(next()?);
    let (leased, waiting, dead, expired, oldest, parked) = (count()?, count()?, count()?, count()?, count()?, count()?);
    let (lag, first) = lag(partition, &pattern, delivered).await?;
    let oldest = [(oldest >= 0).then_some(oldest), first].into_iter().flatten().min();
    Ok(Some(GroupStats {
        lag: lag + parked.unsigned_abs(),
        in_flight: leased.unsigned_abs(),
        retrying: waiting.unsigned_abs(),
        dead: dead.unsigned_abs(),
        expired: expired.unsigned_abs(),
        oldest: oldest.map(|at| Duration::from_millis((now - at).max(0).unsigned_abs())),
    }))
}

/// Entries after `from` that the pattern wants, counted one by one because the server's own number is wrong after the log
/// was trimmed; and the time of the first, in milliseconds.
async fn lag(partition: &Partition, pattern: &Pattern, mut from: String) -> Result<(u64, Option<i64>)> {
    let (mut lag, mut oldest) = (0, None);
    loop {
        let (next, counts) = types(partition, &from, "+").await?;
        for (event_type, count, first) in counts {
            if pattern.matches(&event_type) {
                lag += count;
                oldest = Some(oldest.map_or(first, |known: i64| known.min(first)));
            }
        }
        match next {
            Some(next) => from = next,
            None => return Ok((lag, oldest)),
        }
    }
}

/// How often each type stands after `from` and up to `to`, in one step; where the next step begins.
pub(super) async fn types(
    partition: &Partition,
    from: &str,
    to: &str,
) -> Result<(Option<String>, Vec<(String, u64, i64)>)> {
    let mut command = scripts::TYPES.call(&[&partition.keys.events]);
    command.arg(from).arg(to).arg(COUNT);
    let answer = partition.work.script(&scripts::TYPES, &command, partition.patience()).await?;
    let mut facts = value::list(answer)?.into_iter();
    let next = facts.next().map(value::text).transpose()?.filter(|next| !next.is_empty());
    let mut counts = Vec::new();
    while let (Some(event_type), Some(count), Some(first)) = (facts.next(), facts.next(), facts.next()) {
        counts.push((value::text(event_type)?, value::number(count)?.unsigned_abs(), value::number(first)?));
    }
    Ok((next, counts))
}

/// Forgets the group everywhere.
pub(super) async fn delete(partitions: &[Arc<Partition>], group: &str) -> Result<bool> {
    let mut existed = false;
    for partition in partitions {
        let (keys, own) = (&partition.keys, partition.keys.group(group));
        let mut command = scripts::DELETE.call(&[
            &keys.events,
            &keys.groups,
            &keys.counts,
            &keys.meta,
            &keys.bell,
            &own.retry,
            &own.held,
            &own.work,
            &own.dead,
            &own.lanes,
            &own.marks,
            &own.handling,
        ]);
        command.arg(group);
        let answer = partition.work.script(&scripts::DELETE, &command, partition.patience()).await?;
        existed |= value::number(answer)? == 1;
    }
    Ok(existed)
}
