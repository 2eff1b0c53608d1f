//! One member of a durable group.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::claim::{self, Again, Claim, Member, Progress, Taken};
use super::group::{self, Joined};
use super::job::Made;
use super::marks::{self, Marks};
use super::store::{Store, answered};
use super::{clock, fault, mail, settle};
use crate::codec;
use crate::delivery::{Body, Delivery, Lease};
use crate::error::Result;
use crate::event::Text;
use crate::transport::{Begun, GroupSpec, Settlement, Source, Task};

/// Longest sleep of a waiting `take`: a bound on the harm of a clock that jumps.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// The [`Source`] of a group.
pub(super) struct GroupSource {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    member: Arc<Member>,
    progress: Arc<Mutex<Progress>>,
    marks: Marks,
    closed: watch::Sender<bool>,
    max_payload: usize,
}

/// Joins the group of `spec`.
pub(super) async fn join(store: Arc<Store>, bus: i64, spec: GroupSpec, max_payload: usize) -> Result<Arc<GroupSource>> {
    let wanted = spec.clone();
    // Others of the group may have to follow a new pattern.
    let responder = spec.responder.then(|| fastrand::i64(1..));
    let lease = clock::millis(spec.lease).max(1);
    let join = move |tx: &rusqlite::Connection| {
        let joined = group::join(tx, bus, &wanted)?;
        mail::be_there(tx, responder, joined.group, lease)?;
        Ok(Made::ring(joined))
    };
    let Joined { group, cursor } = store.write(1, join).await?;
    let member = Member {
        bus,
        group,
        name: spec.group,
        ordered: spec.ordered,
        lease,
        responder,
        keep_expired: spec.keep_expired,
    };
    let progress = Progress {
        owner: None,
        counter: 0,
        scanned: cursor,
        pattern: spec.pattern,
        ready: VecDeque::new(),
        closed: false,
    };
    let shared = Shared {
        store,
        member: Arc::new(member),
        progress: Arc::new(Mutex::new(progress)),
        marks: Marks::default(),
        closed: watch::Sender::new(false),
        max_payload,
    };
    Ok(Arc::new(GroupSource { shared: Arc::new(shared) }))
}

impl Shared {
    async fn take(&self, max: usize) -> Result<Vec<Delivery>> {
        self.store.check()?;
        let mut closed = self.closed.subscribe();
        let mut bell = self.store.bell.listen();
        loop {
            if *closed.borrow() {
                return Err(fault::closed());
            }
            // Before the look: a ring that comes while we look must not be missed.
            bell.borrow_and_update();
            let ready = self.ready(max);
            if !ready.is_empty() {
                return Ok(ready);
            }
            let wait = self.claim(max).await?;
            // Something may be ready although this claim found nothing: the claim of a dropped `take` came before it.
            if wait == Some(Duration::ZERO) || !claim::lock(&self.progress).ready.is_empty() {
                continue;
            }
            tokio::select! {
                _ = bell.changed() => {}
                () = tokio::time::sleep(wait.unwrap_or(LONGEST_WAIT).min(LONGEST_WAIT)) => {}
                _ = closed.changed() => {}
            }
        }
    }

    async fn claim(&self, max: usize) -> Result<Again> {
        let instance = crate::process::current().instance_id.clone();
        let (job, answer) = Claim::new(self.member.clone(), self.progress.clone(), instance, max);
        self.store.send(job)?;
        answered(answer.await)
    }

    fn ready(&self, max: usize) -> Vec<Delivery> {
        let taken: Vec<Taken> = {
            let mut progress = claim::lock(&self.progress);
            let count = progress.ready.len().min(max.max(1));
            progress.ready.drain(..count).collect()
        };
        let received_at = std::time::SystemTime::now();
        let delivery = |taken: Taken| Delivery {
            body: decode(taken.bytes, self.max_payload),
            lease: Lease { position: taken.position, token: taken.token },
            attempt: taken.attempt,
            redelivered: taken.redelivered,
            received_at,
            first_failed_at: taken.first_failed_at.map(clock::from_ms),
            expired: taken.expired,
        };
        taken.into_iter().map(delivery).collect()
    }

    fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }
}

/// The event in `raw`, or why it is none.
pub(super) fn decode(raw: bytes::Bytes, max_payload: usize) -> Body {
    match codec::decode(&raw, max_payload) {
        Ok(event) => Body::Event(event),
        Err(cause) => Body::Undecodable { raw, reason: cause.to_string() },
    }
}

/// Hands back what `progress` holds. A job, because a claim that is still queued must come first.
fn leave(member: Arc<Member>, progress: Arc<Mutex<Progress>>) -> impl FnMut(&rusqlite::Connection) -> Result<Made<()>> {
    move |tx| {
        let mut progress = claim::lock(&progress);
        progress.closed = true;
        progress.ready.clear();
        mail::be_gone(tx, member.responder)?;
        let waiting = settle::leave(tx, &member, &progress)?;
        Ok(Made { value: (), ring: waiting })
    }
}

impl Source for GroupSource {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.take(max).await.map_err(|cause| cause.during("take")) })
    }

    fn settle(&self, settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if settlements.is_empty() {
                return Ok(Vec::new());
            }
            let member = shared.member.clone();
            let rows = settlements.len();
            let (leases, held) = shared.marks.of(&settlements);
            let settled = move |tx: &rusqlite::Connection| {
                let settled = settle::settle(tx, &member, &settlements, &held)?;
                Ok(Made { value: settled.lost, ring: settled.waiting })
            };
            let lost = shared.store.write(rows, settled).await.map_err(|cause| cause.during("settle"))?;
            shared.marks.forget(&leases);
            Ok(lost)
        })
    }

    fn begin(&self, wanted: Vec<(Lease, Text)>, keep: Duration) -> Task<Result<Vec<Begun>>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            let (member, asked) = (shared.member.clone(), wanted.clone());
            let begin = move |tx: &rusqlite::Connection| {
                let begun = asked.iter().map(|(lease, key)| marks::begin(tx, &member, *lease, key));
                Ok(Made::quiet(begun.collect::<Result<Vec<_>>>()?))
            };
            let begun = shared.store.write(wanted.len(), begin).await.map_err(|cause| cause.during("begin"))?;
            let ours = wanted.into_iter().zip(&begun).filter(|(_, begun)| **begun == Begun::Run);
            shared.marks.add(ours.map(|(mark, _)| mark), keep);
            Ok(begun)
        })
    }

    fn heartbeat(&self, held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            let (member, progress) = (shared.member.clone(), shared.progress.clone());
            let beat = move |tx: &rusqlite::Connection| {
                let mut progress = claim::lock(&progress);
                if !progress.closed {
                    mail::be_there(tx, member.responder, member.group, member.lease)?;
                }
                Ok(Made::quiet(settle::heartbeat(tx, &member, &mut progress, &held)?))
            };
            let lost = shared.store.write(1, beat).await.map_err(|cause| cause.during("heartbeat"))?;
            shared.marks.forget(&lost);
            Ok(lost)
        })
    }

    fn close(&self) -> Task<()> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if shared.store.check().is_err() || shared.closed.send_replace(true) {
                return;
            }
            let left = shared.store.write(1, leave(shared.member.clone(), shared.progress.clone())).await;
            if let Err(cause) = left {
                log::warn!(
                    "group {}: leaving failed, its deliveries return with their lease: {cause}",
                    shared.member.name
                );
            }
        })
    }
}

impl Drop for GroupSource {
    fn drop(&mut self) {
        if self.shared.store.check().is_err() || self.shared.is_closed() {
            return;
        }
        self.shared.closed.send_replace(true);
        let (job, _) =
            super::job::Write::new((1, 0), None, leave(self.shared.member.clone(), self.shared.progress.clone()));
        // The store may be closed; then the leases run out.
        let _ = self.shared.store.send(job);
    }
}
