//! Reading the log, what became of its events, and handing them to a group again.
//!
//! A position is the id of an entry; with several partitions, the partition's number before it. They are merged in the
//! order of the ids, which are times: of one server they are in order, between the nodes of a cluster as far as their
//! clocks agree.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::fault::{Failure, strange};
use super::partition::Partition;
use super::value::{self, Entry, Id};
use super::{dead, group, hold, scripts};
use crate::dead_letter::DeadLetter;
use crate::delivery::Body;
use crate::error::Result;
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, Record, ReplayBatch, ReplayStep, Status, bad_position, no_group};
use crate::pattern::Pattern;
use crate::transport::time;

/// Entries that one read asks for.
const PAGE: usize = 200;
/// Entries of a partition that one step of a replay looks at.
const SCAN: usize = 2_000;

/// Where an entry stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    entry: Id,
    partition: u32,
}

impl Place {
    fn parse(text: &str, partitions: usize) -> Result<Self> {
        let place = match (partitions, text.split_once(':')) {
            (1, None) => Id::parse(text).map(|entry| Self { entry, partition: 0 }),
            (1, Some(_)) | (_, None) => None,
            (_, Some((number, id))) => {
                let number = number.parse().ok().filter(|number| (*number as usize) < partitions);
                number.zip(Id::parse(id)).map(|(partition, entry)| Self { entry, partition })
            }
        };
        place.ok_or_else(|| bad_position(text))
    }

    fn text(self, partitions: usize) -> Text {
        match partitions {
            1 => self.entry.to_string().into(),
            _ => format!("{}:{}", self.partition, self.entry).into(),
        }
    }
}

/// The arguments of `XRANGE` for what `filter` selects of a partition by time, after a place; `None` when there is
/// nothing.
fn range(filter: &HistoryFilter, after: Option<Place>, partition: u32) -> Option<(String, String)> {
    let since = filter.since.map(|at| Id(time::to_ms(at).unsigned_abs(), 0));
    let from = match after {
        Some(after) if since.is_none_or(|since| since <= after.entry) => {
            let ours = Place { entry: after.entry, partition };
            if ours > after { after.entry.to_string() } else { format!("({}", after.entry) }
        }
        _ => since.map_or("-".to_owned(), |since| since.to_string()),
    };
    let to = match filter.until.map(time::to_ms) {
        None => "+".to_owned(),
        Some(0) => return None, // the server refuses what ends before the first id
        Some(ms) => format!("({ms}-0"),
    };
    Some((from, to))
}

/// Up to `limit` events after a position.
pub(super) async fn list(
    partitions: &[Arc<Partition>],
    filter: &HistoryFilter,
    after: Option<Text>,
    limit: usize,
    records: bool,
    max_payload: usize,
) -> Result<Vec<HistoryEntry>> {
    let after = after.map(|after| Place::parse(&after, partitions.len())).transpose()?;
    let mut found = Vec::new();
    for partition in partitions {
        read(partition, filter, after, limit, |place, entry| found.push((place, entry))).await?;
    }
    found.sort_by_key(|(place, _)| *place);
    found.truncate(limit);
    let mut entries = Vec::with_capacity(found.len());
    let mut seen = Vec::with_capacity(found.len());
    for (place, mut stored) in found {
        let codec_name = stored.take("c");
        let event_type = stored.text("t").unwrap_or_default();
        let raw = stored.take("e").unwrap_or_default();
        let (event, raw) = match hold::decode(&raw, max_payload, codec_name.as_deref()) {
            Body::Event(event) => (Some(event), None),
            Body::Undecodable { raw, .. } => (None, Some(raw)),
        };
        let id = event.as_ref().map(|event| event.meta.id.clone());
        seen.push(Seen { place, event_type, id });
        entries.push(HistoryEntry {
            event,
            raw,
            position: place.text(partitions.len()),
            published_at: time::from_ms(i64::try_from(place.entry.0).unwrap_or(i64::MAX)),
            records: records.then(Vec::new),
        });
    }
    if records && !entries.is_empty() {
        for partition in partitions {
            for (index, record) in tell(partition, &seen, max_payload).await? {
                entries[index].records.get_or_insert_default().push(record);
            }
        }
    }
    Ok(entries)
}

/// Up to `limit` matching entries of a partition.
async fn read(
    partition: &Partition,
    filter: &HistoryFilter,
    after: Option<Place>,
    limit: usize,
    mut keep: impl FnMut(Place, Entry),
) -> Result<()> {
    let Some((mut from, to)) = range(filter, after, partition.number) else { return Ok(()) };
    let mut left = limit;
    loop {
        let mut ask = redis::cmd("XRANGE");
        let most = if filter.pattern.is_some() { PAGE } else { PAGE.min(left) };
        ask.arg(&partition.keys.events).arg(&from).arg(&to).arg("COUNT").arg(most);
        let page = value::entries(partition.work.run(&ask, partition.patience()).await?)?;
        let (count, Some(last)) = (page.len(), page.last().map(|entry| entry.id)) else { return Ok(()) };
        for entry in page {
            let event_type = entry.fields.iter().find(|(name, _)| name.as_ref() == b"t");
            let event_type = event_type.map(|(_, found)| String::from_utf8_lossy(found)).unwrap_or_default();
            if filter.wants(&event_type) {
                keep(Place { entry: entry.id, partition: partition.number }, entry);
                left -= 1;
                if left == 0 {
                    return Ok(());
                }
            }
        }
        if count < most {
            return Ok(());
        }
        from = format!("({last}");
    }
}

/// An entry of a page.
struct Seen {
    place: Place,
    event_type: String,
    /// The event's.
    id: Option<Text>,
}

/// The records of the entries that are in this partition, each with the entry's index, by the names of the groups.
async fn tell(partition: &Arc<Partition>, seen: &[Seen], max_payload: usize) -> Result<Vec<(usize, Record)>> {
    let ours: Vec<_> = seen.iter().enumerate().filter(|(_, seen)| seen.place.partition == partition.number).collect();
    let Some((_, first)) = ours.first() else { return Ok(Vec::new()) };
    let mut records = Vec::new();
    for (name, facts) in group::facts(partition).await? {
        let pattern = Pattern::new(facts["pattern"].as_str().unwrap_or_default())?;
        let begin = begin(&facts);
        let asked: Vec<_> = ours.iter().filter(|(_, seen)| pattern.matches(&seen.event_type)).collect();
        if asked.is_empty() {
            continue;
        }
        let mut dead: BTreeMap<usize, DeadLetter> = BTreeMap::new();
        dead::visit(partition, &name, first.place.entry, max_payload, |entry, letter| {
            let event = letter.event.as_ref().map(|event| &event.meta.id);
            let same = |seen: &Seen| match entry {
                Some(entry) => seen.place.entry == entry,
                None => event.is_some() && seen.id.as_ref() == event, // of an older version
            };
            if let Some((index, _)) = asked.iter().find(|(_, seen)| same(seen)) {
                dead.insert(*index, letter);
            }
        })
        .await?;
        let own = partition.keys.group(&name);
        let mut command = scripts::RECORDS.call(&[&partition.keys.events, &own.retry, &own.held, &own.work]);
        command.arg(&name);
        for (_, seen) in &asked {
            command.arg(seen.place.entry.to_string());
        }
        let answer = partition.work.script(&scripts::RECORDS, &command, partition.patience()).await?;
        let mut answer = value::list(answer)?.into_iter();
        let mut next = || answer.next().ok_or_else(|| strange("short records"));
        let delivered = value::id(next()?)?;
        for (index, seen) in asked {
            let (how, attempts) = (value::text(next()?)?, value::number(next()?)?);
            let (failed, due) = (value::text(next()?)?.parse().ok(), value::number(next()?)?);
            let waits = how == "r" && failed.is_some() && due > 0;
            let status = match how.as_str() {
                "p" | "h" => Status::Processing,
                "r" if waits => Status::Failed,
                "r" | "w" => Status::Pending,
                _ => match dead.remove(index) {
                    Some(letter) => {
                        records.push((*index, of_letter(&name, letter)));
                        continue;
                    }
                    None if seen.place.entry < begin => continue,
                    None if seen.place.entry > delivered => Status::Pending,
                    None => Status::Completed,
                },
            };
            let record = Record {
                attempts: (status != Status::Completed).then(|| u32::try_from(attempts).unwrap_or(u32::MAX)),
                first_failed_at: failed.map(time::from_ms),
                retry_at: waits.then(|| time::from_ms(due)),
                ..Record::new(name.as_str().into(), status)
            };
            records.push((*index, record));
        }
    }
    Ok(records)
}

/// Where a group began.
fn begin(facts: &serde_json::Value) -> Id {
    match facts["start"].as_str() {
        Some("$") => Id(facts["created"].as_f64().unwrap_or_default() as u64, 0),
        Some(start) => Id::parse(start).unwrap_or_default(),
        None => Id::default(),
    }
}

fn of_letter(group: &str, letter: DeadLetter) -> Record {
    Record {
        attempts: Some(letter.attempts),
        first_failed_at: Some(letter.first_failed_at),
        last_failed_at: Some(letter.last_failed_at),
        error: Some(letter.error),
        dead_letter: Some(letter.id),
        reason: Some(letter.reason),
        ..Record::new(group.into(), Status::Failed)
    }
}

/// One step of a replay: in each partition one script, so that a batch is whole in each.
pub(super) async fn replay(partitions: &[Arc<Partition>], step: &ReplayStep) -> Result<ReplayBatch> {
    let count = partitions.len();
    let after = step.after.as_ref().map(|after| Place::parse(after, count)).transpose()?;
    let Some(pattern) = pattern(partitions, &step.group).await? else {
        return Err(unknown(partitions, &step.group).await?);
    };
    let ends = match &step.end {
        Some(end) => {
            end.split(',').map(|end| Id::parse(end).ok_or_else(|| bad_position(end))).collect::<Result<_>>()?
        }
        None => ends(partitions, &step.group).await?,
    };
    let mut looked = Vec::new();
    // Beyond the least of the partitions that were not read to their end, nothing is in order yet.
    let mut horizon: Option<Place> = None;
    for (partition, end) in partitions.iter().zip(&ends) {
        let rows = peek(partition, &step.filter, after, *end).await?;
        if rows.len() == SCAN {
            let last = rows.last().map(|(place, _)| *place);
            horizon = horizon.into_iter().chain(last).min();
        }
        looked.extend(rows);
    }
    looked.sort_by_key(|(place, _)| *place);
    let mut batch = ReplayBatch {
        handed: 0,
        skipped: 0,
        position: None,
        end: ends.iter().map(Id::to_string).collect::<Vec<_>>().join(",").into(),
        done: horizon.is_none(),
    };
    let mut parts: Vec<Vec<Id>> = vec![Vec::new(); count];
    let mut asked = 0;
    for (place, event_type) in looked.into_iter().filter(|(place, _)| horizon.is_none_or(|last| *place <= last)) {
        if asked == step.max {
            batch.done = false;
            break;
        }
        batch.position = Some(place.text(count));
        if step.filter.wants(&event_type) && pattern.matches(&event_type) {
            parts[place.partition as usize].push(place.entry);
            asked += 1;
        }
    }
    for (partition, ids) in partitions.iter().zip(parts).filter(|(_, ids)| !ids.is_empty()) {
        batch.handed += hand(partition, &step.group, &ids).await?;
    }
    batch.skipped = (asked as u64).saturating_sub(batch.handed);
    Ok(batch)
}

async fn hand(partition: &Partition, group: &Text, ids: &[Id]) -> Result<u64, Failure> {
    let (keys, own) = (&partition.keys, partition.keys.group(group));
    let mut command =
        scripts::AGAIN.call(&[&keys.events, &own.retry, &own.work, &keys.groups, &keys.bell, &keys.counts, &own.lanes]);
    command.arg(&**group);
    for id in ids {
        command.arg(id.to_string());
    }
    let answer = partition.work.script(&scripts::AGAIN, &command, partition.patience()).await?;
    if answer == redis::Value::Nil {
        return Err(no_group(group, []).into()); // deleted a moment ago
    }
    Ok(value::number(answer)?.unsigned_abs())
}

async fn peek(
    partition: &Partition,
    filter: &HistoryFilter,
    after: Option<Place>,
    end: Id,
) -> Result<Vec<(Place, String)>> {
    let Some((from, mut to)) = range(filter, after, partition.number) else { return Ok(Vec::new()) };
    if filter.until.is_none_or(|until| Id(time::to_ms(until).unsigned_abs(), 0) > end) {
        to = end.to_string();
    }
    let mut command = scripts::PEEK.call(&[&partition.keys.events]);
    command.arg(from).arg(to).arg(SCAN);
    let answer = partition.work.script(&scripts::PEEK, &command, partition.patience()).await?;
    let mut answer = value::list(answer)?.into_iter();
    let mut rows = Vec::new();
    while let (Some(id), Some(event_type)) = (answer.next(), answer.next()) {
        rows.push((Place { entry: value::id(id)?, partition: partition.number }, value::text(event_type)?));
    }
    Ok(rows)
}

/// What the group follows; `None` when there is no such group.
async fn pattern(partitions: &[Arc<Partition>], group: &str) -> Result<Option<Pattern>> {
    for partition in partitions {
        let mut ask = redis::cmd("HGET");
        let facts = partition.work.run(ask.arg(&partition.keys.groups).arg(group), partition.patience()).await?;
        if facts != redis::Value::Nil {
            return group::pattern(&value::text(facts)?).map(Some);
        }
    }
    Ok(None)
}

/// Up to where the group was given each partition.
async fn ends(partitions: &[Arc<Partition>], group: &str) -> Result<Vec<Id>> {
    let mut ends = Vec::new();
    for partition in partitions {
        let delivered = group::delivered(partition).await?;
        let end = delivered.into_iter().find(|(name, _)| name == group).map(|(_, delivered)| delivered);
        ends.push(end.unwrap_or_default());
    }
    Ok(ends)
}

async fn unknown(partitions: &[Arc<Partition>], group: &str) -> Result<crate::Error> {
    let names = group::names(partitions).await?;
    Ok(no_group(group, names.iter().map(String::as_str)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_round_trip_and_merge_by_time() {
        let place = Place::parse("2:17-1", 3).unwrap();
        assert_eq!((place.text(3).as_ref(), Place::parse("17-1", 1).unwrap().text(1).as_ref()), ("2:17-1", "17-1"));
        assert!(Place::parse("0:9-1", 3).unwrap() < Place::parse("0:10-0", 3).unwrap());
        for (text, partitions) in [("17-1", 3), ("3:17-1", 3), ("0:17-1", 1), ("17", 1), ("", 1), ("x-1", 1)] {
            assert!(Place::parse(text, partitions).is_err(), "{text}");
        }
        let after = Some(place);
        let none = HistoryFilter::default();
        assert_eq!(range(&none, after, 1).unwrap().0, "(17-1");
        assert_eq!(range(&none, after, 2).unwrap().0, "(17-1");
        assert_eq!(range(&none, after, 3).unwrap().0, "17-1");
    }
}
