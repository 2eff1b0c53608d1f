//! Dead letters: one stream for each group and partition.
//!
//! A letter's id is that of its entry, with partition and group behind it: `1732464000000-0:0:shop/mail`. Letters are
//! listed in the order of the entries' ids, which is that of their times. Filters are applied here, page by page: the
//! server cannot match patterns.

use std::sync::Arc;

use redis::Value;

use super::group;
use super::partition::Partition;
use super::scripts;
use super::value::{self, Entry, Id};
use crate::codec;
use crate::dead_letter::{DeadLetter, DeadLetterFilter};
use crate::delivery::{DeadReason, Failure};
use crate::error::{Error, Result};
use crate::event::Text;
use crate::transport::time;

/// Letters that are read, or changed, in one step.
const PAGE: usize = 200;

/// Names one letter; ordered by age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    entry: Id,
    partition: u32,
    group: String,
}

impl Name {
    /// `None` for a text that names no letter.
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ':');
        let (entry, partition, group) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { entry: Id::parse(entry)?, partition: partition.parse().ok()?, group: group.to_owned() })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.entry, self.partition, self.group)
    }
}

/// What to do with each selected letter.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Replay,
    Purge,
}

/// One stream of letters.
struct Shelf {
    partition: Arc<Partition>,
    group: String,
}

/// The streams that `filter` can select from.
async fn shelves(partitions: &[Arc<Partition>], filter: &DeadLetterFilter) -> Result<Vec<Shelf>> {
    let one = match &filter.id {
        Some(id) => match Name::parse(id) {
            Some(name) => Some(name),
            None => return Ok(Vec::new()),
        },
        None => None,
    };
    let groups = match (&filter.group, &one) {
        (Some(group), _) => [group.to_string()].into(),
        (None, Some(name)) => [name.group.clone()].into(),
        (None, None) => group::names(partitions).await?,
    };
    let mut shelves = Vec::new();
    for group in groups {
        for partition in partitions {
            let wanted = one.as_ref().is_none_or(|name| name.group == group && name.partition == partition.number);
            if wanted {
                shelves.push(Shelf { partition: partition.clone(), group: group.clone() });
            }
        }
    }
    Ok(shelves)
}

impl Shelf {
    fn key(&self) -> String {
        self.partition.keys.group(&self.group).dead
    }

    async fn page(&self, from: &str, to: &str, count: usize) -> Result<Vec<Entry>> {
        let mut ask = redis::cmd("XRANGE");
        ask.arg(self.key()).arg(from).arg(to).arg("COUNT").arg(count);
        value::entries(self.partition.work.run(&ask, self.partition.patience()).await?)
    }

    fn letter(&self, mut entry: Entry, max_payload: usize) -> Result<DeadLetter> {
        let name = Name { entry: entry.id, partition: self.partition.number, group: self.group.clone() };
        let raw = entry.take("e").unwrap_or_default();
        let reason = entry.text("r").unwrap_or_default();
        let from = entry.text("p").filter(|from| !from.is_empty()).and_then(|from| Id::parse(&from));
        let at = |ms: Option<i64>| time::from_ms(ms.unwrap_or(i64::try_from(name.entry.0).unwrap_or_default()));
        Ok(DeadLetter {
            event: codec::decode(&raw, max_payload).ok(),
            raw,
            error: Failure {
                kind: entry.text("k").unwrap_or_default(),
                message: entry.text("m").unwrap_or_default(),
                stack: entry.text("s").unwrap_or_default(),
                code: None,
            },
            attempts: entry.number("n").and_then(|attempts| u32::try_from(attempts).ok()).unwrap_or(1),
            first_failed_at: at(entry.number("f")),
            last_failed_at: at(entry.number("l")),
            subscription: entry.text("u").unwrap_or_default().into(),
            group: self.group.as_str().into(),
            reason: DeadReason::parse(&reason).ok_or_else(|| {
                Error::connection_failed(format!(
                    "a dead letter has the reason {reason:?}, which this version does not know"
                ))
            })?,
            replayed_from: from.map(|entry| Name { entry, ..name.clone() }.to_string().into()),
            id: name.to_string().into(),
        })
    }

    /// Walks over the letters that `filter` selects, from `after` on, in order.
    async fn walk(
        &self,
        filter: &DeadLetterFilter,
        after: Option<&Name>,
        max_payload: usize,
        mut visit: impl FnMut(DeadLetter) -> bool,
    ) -> Result<()> {
        let one = filter.id.as_deref().and_then(Name::parse).map(|name| name.entry.to_string());
        let mut from = match (&one, after) {
            (Some(id), _) => id.clone(),
            (None, Some(after)) => {
                let ours = Name { entry: after.entry, partition: self.partition.number, group: self.group.clone() };
                if ours > *after { after.entry.to_string() } else { format!("({}", after.entry) }
            }
            (None, None) => "-".to_owned(),
        };
        let to = one.as_deref().unwrap_or("+");
        loop {
            let page = self.page(&from, to, PAGE).await?;
            let (count, last) = (page.len(), page.last().map(|entry| entry.id));
            for entry in page {
                let letter = self.letter(entry, max_payload)?;
                if filter.matches(&letter) && !visit(letter) {
                    return Ok(());
                }
            }
            match last {
                Some(last) if count == PAGE => from = format!("({last}"),
                _ => return Ok(()),
            }
        }
    }
}

/// Letters in order of their ids, those after `after`, at most `limit`.
pub(super) async fn list(
    partitions: &[Arc<Partition>],
    filter: &DeadLetterFilter,
    after: Option<Text>,
    limit: usize,
    max_payload: usize,
) -> Result<Vec<DeadLetter>> {
    let after = after.map(|id| {
        Name::parse(&id).ok_or_else(|| Error::not_found(format!("there is no dead letter {id:?} to continue after")))
    });
    let after = after.transpose()?;
    let mut letters = Vec::new();
    for shelf in shelves(partitions, filter).await? {
        let mut taken = 0;
        shelf
            .walk(filter, after.as_ref(), max_payload, |letter| {
                letters.push((Name::parse(&letter.id), letter));
                taken += 1;
                taken < limit
            })
            .await?;
    }
    letters.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(letters.into_iter().map(|(_, letter)| letter).take(limit).collect())
}

/// Walks over the letters of one group that are not older than `from`, each with its entry of the log if it tells.
pub(super) async fn visit(
    partition: &Arc<Partition>,
    group: &str,
    from: Id,
    max_payload: usize,
    mut visit: impl FnMut(Option<Id>, DeadLetter),
) -> Result<()> {
    let shelf = Shelf { partition: partition.clone(), group: group.to_owned() };
    let mut from = Id(from.0, 0).to_string();
    loop {
        let page = shelf.page(&from, "+", PAGE).await?;
        let (count, last) = (page.len(), page.last().map(|entry| entry.id));
        for mut entry in page {
            let of = entry.text("i").and_then(|id| Id::parse(&id));
            visit(of, shelf.letter(entry, max_payload)?);
        }
        match last {
            Some(last) if count == PAGE => from = format!("({last}"),
            _ => return Ok(()),
        }
    }
}

/// How many letters `filter` selects.
pub(super) async fn count(partitions: &[Arc<Partition>], filter: &DeadLetterFilter, max_payload: usize) -> Result<u64> {
    let all = filter.id.is_none() && filter.pattern.is_none() && filter.since.is_none() && filter.before.is_none();
    let mut total = 0;
    for shelf in shelves(partitions, filter).await? {
        if all {
            let mut ask = redis::cmd("XLEN");
            let length = shelf.partition.work.run(ask.arg(shelf.key()), shelf.partition.patience()).await?;
            total += value::number(length)?.unsigned_abs();
        } else {
            shelf
                .walk(filter, None, max_payload, |_| {
                    total += 1;
                    true
                })
                .await?;
        }
    }
    Ok(total)
}

/// Replays or removes what `filter` selects and existed when the call began.
pub(super) async fn change(
    partitions: &[Arc<Partition>],
    filter: &DeadLetterFilter,
    change: Change,
    max_payload: usize,
) -> Result<u64> {
    let mut total = 0;
    for shelf in shelves(partitions, filter).await? {
        let mut ids = Vec::new();
        shelf
            .walk(filter, None, max_payload, |letter| {
                ids.extend(Name::parse(&letter.id).map(|name| name.entry.to_string()));
                true
            })
            .await?;
        for ids in ids.chunks(PAGE) {
            total += shelf.change(change, ids).await?;
        }
    }
    Ok(total)
}

impl Shelf {
    async fn change(&self, change: Change, ids: &[String]) -> Result<u64> {
        let (partition, own) = (&self.partition, self.partition.keys.group(&self.group));
        let done: Value = match change {
            Change::Purge => {
                let mut remove = redis::cmd("XDEL");
                partition.work.run(remove.arg(&own.dead).arg(ids), partition.patience()).await?
            }
            Change::Replay => {
                let keys = &partition.keys;
                let mut command =
                    scripts::REPLAY.call(&[&own.dead, &own.retry, &own.work, &keys.groups, &keys.bell, &own.lanes]);
                command.arg(&self.group).arg(ids);
                partition.work.script(&scripts::REPLAY, &command, partition.patience()).await?
            }
        };
        Ok(value::number(done)?.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_order_by_age() {
        let name = Name::parse("1732464000000-2:0:shop/a:b").unwrap();
        assert_eq!((name.entry, name.group.as_str()), (Id(1_732_464_000_000, 2), "shop/a:b"));
        assert_eq!(name.to_string(), "1732464000000-2:0:shop/a:b");
        assert!(Name::parse("9-1:0:z") < Name::parse("10-0:0:a"));
        for other in ["987654", "1-2", "1-2:x:g", ""] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
