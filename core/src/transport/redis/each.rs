//! Many publishes at once, each by itself: as many jobs of the publisher, queued together and awaited together.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::time::Instant;

use super::fault::strange;
use super::partition::Partition;
use super::publish::{Queued, Row, row, store, stored};
use crate::error::Result;
use crate::transport::room::Room;
use crate::transport::{Outgoing, Receipt, Settings};

/// What becomes of each, in order.
pub(super) async fn publish(
    partitions: &[Arc<Partition>],
    room: &Room,
    batch: Vec<Outgoing>,
    deadline: Instant,
    limits: (&Settings, usize),
) -> Vec<Result<Receipt>> {
    let mut outcomes: Vec<Option<Result<Receipt>>> = Vec::with_capacity(batch.len());
    let mut rows = Vec::with_capacity(batch.len());
    for (index, outgoing) in batch.into_iter().enumerate() {
        match row(index, outgoing, limits) {
            Ok(row) => {
                rows.push(Arc::new(vec![row]));
                outcomes.push(None);
            }
            Err(error) => outcomes.push(Some(Err(error))),
        }
    }
    let bytes = rows.iter().map(|row| row[0].size()).sum();
    let several = partitions.len() > 1;
    let Some(permit) = room.try_enter(rows.len(), bytes) else {
        let alone = rows.iter().map(|row| alone(partitions, room, row, deadline));
        for (row, outcome) in rows.iter().zip(join_all(alone).await) {
            outcomes[row[0].index] = Some(outcome);
        }
        return all(outcomes);
    };
    let permit = Arc::new(permit);
    let place = |row: &Row| row.partition(partitions.len());
    let mut queued: Vec<(usize, Arc<Vec<Row>>, Queued)> = Vec::with_capacity(rows.len());
    for (number, partition) in partitions.iter().enumerate() {
        let ours: Vec<_> = rows.iter().filter(|row| !several || place(&row[0]) == number).cloned().collect();
        let jobs = partition.publisher.queue(partition, ours.iter().cloned(), &permit, deadline);
        queued.extend(ours.into_iter().zip(jobs).map(|(row, job)| (number, row, job)));
    }
    drop(permit);
    for (number, row, job) in queued {
        let answer = job.stored(&partitions[number]).await;
        let answer = answer.and_then(|mut answers| answers.pop().ok_or_else(|| strange("a short answer")));
        let stored = answer.and_then(|answer| stored(&partitions[number], answer, several));
        outcomes[row[0].index] = Some(stored.map(|stored| stored.receipt(&row[0])));
    }
    all(outcomes)
}

/// One of them, when there is no room for all.
async fn alone(partitions: &[Arc<Partition>], room: &Room, row: &Arc<Vec<Row>>, deadline: Instant) -> Result<Receipt> {
    let permit = Arc::new(room.enter(1, row[0].size(), deadline).await?);
    let partition = &partitions[row[0].partition(partitions.len())];
    let mut stored = store(partition, row.clone(), permit, deadline, partitions.len() > 1).await?;
    stored.pop().map(|stored| stored.receipt(&row[0])).ok_or_else(|| strange("a short answer"))
}

fn all(outcomes: Vec<Option<Result<Receipt>>>) -> Vec<Result<Receipt>> {
    outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(strange("no answer")))).collect()
}
