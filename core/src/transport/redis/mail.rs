//! Replies to requests, and who answers them.
//!
//! A mailbox is a list that expires with its youngest letter. Its owner waits on a connection of its own
//! (`BLMPOP`), which exists while requests are made: `docs/decisions/0016-a-mailbox-is-no-log.md` says why it does not wait
//! at the doorbell. All of it is in the slot of the first partition.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use redis::Value;
use tokio::time::Instant;

use super::fault::Failure;
use super::link::Link;
use super::partition::{Partition, lock};
use super::{scripts, value};
use crate::error::Result;
use crate::event::Text;
use crate::pattern::Pattern;
use crate::transport::{GroupSpec, Mailbox, Task, time};

/// Longest wait of one read, in seconds.
const BLOCK: u64 = 1;
/// How late its answer may be before the connection counts as dead.
const MARGIN: Duration = Duration::from_secs(3);
/// Letters that one read takes at most.
const MOST: usize = 1000;
/// After a loss of the server's data, members need this long at most to come back: until then nobody can be missed.
const GRACE: Duration = Duration::from_secs(5);

/// Puts a letter into the box.
pub(super) async fn post(partition: &Partition, mailbox: &str, letter: &[u8], ttl: Duration) -> Result<()> {
    let mut command = scripts::POST.call(&[&partition.keys.mail(mailbox)]);
    command.arg(letter).arg(time::millis(ttl).max(1));
    partition.work.script(&scripts::POST, &command, partition.patience()).await?;
    Ok(())
}

/// A sign of life of a responder, or its farewell.
pub(super) async fn be_there(
    partition: &Partition,
    spec: &GroupSpec,
    consumer: &str,
    lease: i64,
) -> Result<(), Failure> {
    let mut command = scripts::ALIVE.call(&[&partition.keys.responders]);
    command.arg(format!("{consumer}|{}", spec.pattern.as_str())).arg(lease);
    partition.work.script(&scripts::ALIVE, &command, partition.patience()).await.map(drop)
}

/// The data of the server, as a requester saw it last.
#[derive(Default)]
pub(super) struct Seen(Mutex<(String, Option<Instant>)>);

impl Seen {
    /// Whether the server has not lost its data just now.
    fn is_settled(&self, epoch: String) -> bool {
        let mut seen = lock(&self.0);
        if seen.0 != epoch {
            if !seen.0.is_empty() {
                seen.1 = Some(Instant::now());
            }
            seen.0 = epoch;
        }
        seen.1.is_none_or(|lost| lost.elapsed() > GRACE)
    }
}

/// Whether a responder that lives answers requests of this type; `None` when the server has just lost its data.
pub(super) async fn has_responder(partition: &Partition, seen: &Seen, event_type: &str) -> Result<Option<bool>> {
    let command = scripts::RESPONDERS.call(&[&partition.keys.responders, &partition.keys.meta]);
    let answer = partition.work.script(&scripts::RESPONDERS, &command, partition.patience()).await?;
    let mut answer = value::list(answer)?.into_iter().map(value::text);
    let settled = seen.is_settled(answer.next().transpose()?.unwrap_or_default());
    for responder in answer {
        if let Some((_, pattern)) = responder?.split_once('|')
            && Pattern::new(pattern).is_ok_and(|pattern| pattern.matches(event_type))
        {
            return Ok(Some(true));
        }
    }
    Ok(settled.then_some(false))
}

/// The reading end.
pub(super) struct RedisMailbox(Arc<Open>);

struct Open {
    link: Link,
    key: String,
}

impl RedisMailbox {
    pub fn new(partition: &Partition, name: &Text) -> Self {
        let key = partition.keys.mail(name);
        Self(Arc::new(Open { link: Link::new(partition.server.clone(), partition.keys.events.clone()), key }))
    }
}

impl Mailbox for RedisMailbox {
    fn next(&self) -> Task<Result<Vec<Bytes>>> {
        let open = self.0.clone();
        Box::pin(async move {
            let mut read = redis::cmd("BLMPOP");
            read.arg(BLOCK).arg(1).arg(&open.key).arg("LEFT").arg("COUNT").arg(MOST);
            let answer = open.link.run(&read, Instant::now() + Duration::from_secs(BLOCK) + MARGIN).await?;
            match answer {
                Value::Nil => Ok(Vec::new()),
                found => {
                    let letters = value::list(found)?.into_iter().nth(1).unwrap_or(Value::Nil);
                    value::list(letters)?.into_iter().map(value::bytes).collect()
                }
            }
        })
    }
}
