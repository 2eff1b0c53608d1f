//! Reading the log, and handing parts of it to a group again.

use std::time::{Duration, SystemTime};

use ahash::AHashSet;

use super::group::{Group, Pending};
use super::store::{Buried, State, Store, lock};
use crate::error::Result;
use crate::event::Text;
use crate::history::{HistoryEntry, HistoryFilter, Record, ReplayBatch, ReplayStep, Status, bad_position, no_group};

/// Where a page begins: positions grow along the log.
fn position(after: Option<&Text>) -> Result<i64> {
    let parse = |text: &Text| text.parse().ok().filter(|at| *at >= 0).ok_or_else(|| bad_position(text));
    after.map_or(Ok(0), parse)
}

impl Store {
    pub fn history(
        &self,
        filter: &HistoryFilter,
        after: Option<&Text>,
        limit: usize,
        records: bool,
    ) -> Result<Vec<HistoryEntry>> {
        let after = position(after)?;
        let born = self.clock.now() - self.clock.elapsed();
        let mut state = lock(self);
        state.enforce(self.clock.elapsed());
        let found = state.part(filter, after, born).take(limit);
        let entry = |past: &Pending| HistoryEntry {
            event: Some(past.event.clone()),
            raw: None,
            position: past.position.to_string().into(),
            published_at: born + past.published,
            records: records.then(|| state.records(past, born)),
        };
        Ok(found.map(entry).collect())
    }

    pub fn replay_log(&self, step: &ReplayStep) -> Result<ReplayBatch> {
        let after = position(step.after.as_ref())?;
        let born = self.clock.now() - self.clock.elapsed();
        let mut state = lock(self);
        state.enforce(self.clock.elapsed());
        let Some(id) = state.names.get(&step.group).copied() else {
            return Err(no_group(&step.group, state.names.keys().map(|name| &**name)));
        };
        let Some(group) = state.groups.get(&id) else { return Err(no_group(&step.group, [])) };
        let end = step.end.as_ref().map_or(Ok(state.position), |end| position(Some(end)))?;
        let busy: AHashSet<i64> = group.unfinished().map(|(pending, ..)| pending.position).collect();
        let pattern = &group.spec.pattern;
        let mut batch = ReplayBatch { handed: 0, skipped: 0, position: None, end: end.to_string().into(), done: true };
        let mut again = Vec::new();
        for past in state.part(&step.filter, after, born).take_while(|past| past.position <= end) {
            if again.len() == step.max {
                batch.done = false;
                break;
            }
            batch.position = Some(past.position.to_string().into());
            if !pattern.matches(past.event.event_type.as_str()) {
                continue;
            }
            if busy.contains(&past.position) {
                batch.skipped += 1;
                continue;
            }
            again.push(Pending { expires: None, redelivered: true, ..past.clone() });
        }
        batch.handed = again.len() as u64;
        state.on(id, |group| group.push_first(again));
        Ok(batch)
    }
}

impl State {
    /// What of the log `filter` selects after a position. `born` is when the store's clock began.
    fn part(&self, filter: &HistoryFilter, after: i64, born: SystemTime) -> impl Iterator<Item = &Pending> {
        let first = self.log.partition_point(|past| past.position <= after);
        let first =
            first.max(self.log.partition_point(|past| filter.since.is_some_and(|at| born + past.published < at)));
        let (until, filter) = (filter.until, filter.clone());
        self.log
            .iter()
            .skip(first)
            .take_while(move |past| until.is_none_or(|until| born + past.published < until))
            .filter(move |past| filter.wants(past.event.event_type.as_str()))
    }

    /// What each group did with an event, by the names of the groups.
    fn records(&self, past: &Pending, born: SystemTime) -> Vec<Record> {
        let mut groups: Vec<_> =
            self.names.iter().filter_map(|(name, id)| Some((name, self.groups.get(id)?))).collect();
        groups.sort_unstable_by_key(|(name, _)| *name);
        groups.into_iter().filter_map(|(name, group)| self.record(name, group, past, born)).collect()
    }

    fn record(&self, name: &Text, group: &Group, past: &Pending, born: SystemTime) -> Option<Record> {
        let known = group.unfinished().find(|(pending, ..)| pending.position == past.position);
        if let Some((pending, leased, due)) = known {
            let status = match () {
                () if leased => Status::Processing,
                () if due.is_some() => Status::Failed,
                () => Status::Pending,
            };
            return Some(Record {
                attempts: Some(pending.attempts),
                first_failed_at: pending.first_failed,
                retry_at: due.map(|due: Duration| born + due),
                error: pending.failure.as_deref().cloned(),
                ..Record::new(name.clone(), status)
            });
        }
        let mut dead = self.dead.values().rev();
        if let Some(Buried { letter, .. }) =
            dead.find(|dead| dead.position == past.position && dead.letter.group == *name)
        {
            return Some(Record {
                attempts: Some(letter.attempts),
                first_failed_at: Some(letter.first_failed_at),
                last_failed_at: Some(letter.last_failed_at),
                error: Some(letter.error.clone()),
                dead_letter: Some(letter.id.clone()),
                reason: Some(letter.reason),
                ..Record::new(name.clone(), Status::Failed)
            });
        }
        let concerned = past.position > group.begin && group.spec.pattern.matches(past.event.event_type.as_str());
        concerned.then(|| Record::new(name.clone(), Status::Completed))
    }
}
