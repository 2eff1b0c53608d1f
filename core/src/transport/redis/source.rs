//! One subscription's hold on its group, over all partitions of the bus.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::fault::{Failure, closed};
use super::hold::Hold;
use super::keys::partition_of;
use super::marks::{self, Mark, Step};
use super::member::Member;
use super::partition::Partition;
use super::settle::releases;
use crate::delivery::{Delivery, Lease};
use crate::error::{ErrorKind, Result};
use crate::event::Text;
use crate::transport::{Begun, GroupSpec, Settlement, Source, Task, time};

/// How long a delivery may wait here without room for it.
const HOARD: Duration = Duration::from_millis(50);
/// Before a look is repeated that failed because the server cannot be reached; the link waits as well.
const AGAIN: Duration = Duration::from_millis(100);
/// How long leaving may take: what it could not give back returns when its lease runs out.
const LEAVING: Duration = Duration::from_secs(3);

pub(super) struct GroupSource(Arc<Shared>);

struct Shared {
    hold: Arc<Hold>,
    members: Vec<Arc<Member>>,
    /// Where the next look begins, so that no partition is always the last.
    turn: AtomicUsize,
    /// A `take` is under way.
    taking: AtomicBool,
    /// Soon what there is no room for is given back.
    waning: AtomicBool,
    /// Soon others are told of what is due in an ordered group.
    passing: AtomicBool,
    /// Held by a look, which goes on when its `take` was dropped.
    looking: tokio::sync::Mutex<()>,
    closed: watch::Sender<bool>,
}

/// Says when a `take` has ended, also by being dropped.
struct Taking<'a>(&'a AtomicBool);

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Joins the group of `spec` in every partition.
pub(super) async fn join(
    partitions: &[Arc<Partition>],
    spec: GroupSpec,
    max_payload: usize,
) -> Result<Arc<GroupSource>> {
    let hold = Arc::new(Hold::default());
    // Never used again: a name that two processes share would make one look alive for the other.
    static NUMBERS: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
    let consumer = format!("{}-{number}", crate::process::current().instance_id);
    let mut members = Vec::new();
    for (index, partition) in partitions.iter().enumerate() {
        let (partition, consumer) = (partition.clone(), consumer.clone());
        members.push(Member::join(partition, index, spec.clone(), consumer, hold.clone(), max_payload).await?);
    }
    Ok(Arc::new(GroupSource(Arc::new(Shared {
        hold,
        members,
        turn: AtomicUsize::new(0),
        taking: AtomicBool::new(false),
        waning: AtomicBool::new(false),
        passing: AtomicBool::new(false),
        looking: tokio::sync::Mutex::default(),
        closed: watch::Sender::new(false),
    }))))
}

impl Shared {
    async fn take(self: Arc<Self>, max: usize) -> Result<Vec<Delivery>> {
        let mut closing = self.closed.subscribe();
        self.taking.store(true, Ordering::Release);
        let _ends = Taking(&self.taking);
        loop {
            if *closing.borrow() {
                return Err(closed());
            }
            let arrived = self.hold.arrived.notified();
            let ready = self.hold.ready(max);
            if !ready.is_empty() {
                if ready.len() == max {
                    self.full();
                }
                return Ok(ready);
            }
            // On a task of its own: a dropped `take` must not drop an answer that is under way.
            let look = crate::process::current().runtime.spawn(self.clone().look(max));
            let looked = tokio::select! {
                looked = look => looked.unwrap_or_else(|_| Err(closed().into())),
                _ = closing.changed() => continue,
            };
            let rest = match looked {
                Ok(rest) => rest,
                Err(failure) if self.hold.has_ready() => {
                    log::debug!("looking for more failed: {}", failure.error);
                    continue;
                }
                // The link says what is wrong, and waits; a subscription has nothing to add.
                Err(failure) if failure.error.kind() == ErrorKind::ConnectionFailed => {
                    log::debug!("take failed, again soon: {}", failure.error);
                    AGAIN.mul_f64(0.5 + fastrand::f64())
                }
                Err(failure) => return Err(failure.error),
            };
            if self.hold.has_ready() || rest.is_zero() {
                continue;
            }
            tokio::select! {
                () = arrived => {}
                () = tokio::time::sleep(rest) => {}
                _ = closing.changed() => {}
            }
        }
    }

    /// There is no room for more until the next `take`. What came beyond it, or still comes from a read that stands at the
    /// server, could run elsewhere, and is given back; but not at once: with quick handlers the next `take` is near, and what
    /// is given back has lost its place.
    fn full(self: &Arc<Self>) {
        if self.waning.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = self.clone();
        crate::process::current().runtime.spawn(async move {
            tokio::time::sleep(HOARD).await;
            shared.waning.store(false, Ordering::Release);
            if shared.taking.load(Ordering::Acquire) {
                return;
            }
            let reads = shared.members.iter().filter(|member| member.stop_reading()).count();
            let surplus = shared.hold.surplus();
            if surplus.is_empty() && reads == 0 {
                return;
            }
            shared.hand_on(surplus).await;
            for member in &shared.members {
                member.quiet().await;
            }
            if !shared.taking.load(Ordering::Acquire) {
                shared.hand_on(shared.hold.surplus()).await;
            }
        });
    }

    /// The next event of a key is for whoever handled the one before, who has room for it. If nothing takes it here soon (the
    /// subscription is paused, or ends) others are told.
    fn pass_on(self: &Arc<Self>) {
        if !self.members[0].spec.ordered || self.passing.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = self.clone();
        crate::process::current().runtime.spawn(async move {
            tokio::time::sleep(HOARD).await;
            shared.passing.store(false, Ordering::Release);
            if !shared.taking.load(Ordering::Acquire) {
                for member in &shared.members {
                    member.pass_on().await;
                }
            }
        });
    }

    async fn hand_on(&self, surplus: Vec<Delivery>) {
        if surplus.is_empty() {
            return;
        }
        if let Err(cause) = self.settle(releases(surplus.iter().map(|delivery| delivery.lease))).await {
            log::debug!("what there is no room for stays: {cause}");
            self.hold.put_ready(surplus);
        }
    }

    /// Looks at every partition once. How long nothing has to be looked at again, unless somebody rings.
    async fn look(self: Arc<Self>, max: usize) -> Result<Duration, Failure> {
        let _looking = self.looking.lock().await;
        let first = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.members.len();
        for index in 0..count {
            if *self.closed.borrow() {
                return Ok(Duration::ZERO);
            }
            self.members[(first + index) % count].look(max).await?;
        }
        if self.hold.has_ready() || *self.closed.borrow() {
            return Ok(Duration::ZERO);
        }
        let waits = self.members.iter().all(|member| member.wait(max));
        let rest = self.members.iter().map(|member| member.rest()).min().unwrap_or_default();
        Ok(if waits { rest } else { Duration::ZERO })
    }

    async fn settle(&self, settlements: Vec<Settlement>) -> Result<Vec<Lease>> {
        let mut lost = Vec::new();
        let leases: Vec<Lease> = settlements.iter().map(|settlement| settlement.lease).collect();
        let mut parts: Vec<Vec<_>> = self.members.iter().map(|_| Vec::new()).collect();
        let mut elsewhere: Vec<Vec<_>> = self.members.iter().map(|_| Vec::new()).collect();
        for Settlement { lease, verdict } in settlements {
            let held = self.hold.get(lease);
            if let Some(held) = &held
                && let Some(mark) = held.mark.as_deref().filter(|mark| mark.partition != held.partition)
            {
                elsewhere[mark.partition].push((Step::of(&verdict), mark.clone()));
            }
            match held {
                Some(held) => parts[held.partition].push((lease, held, verdict)),
                None => lost.push(lease),
            }
        }
        for (member, marks) in self.members.iter().zip(&elsewhere) {
            member.mark(marks).await?;
        }
        let mut failure = None;
        for (member, part) in self.members.iter().zip(parts) {
            if part.is_empty() {
                continue;
            }
            match member.settle(part).await {
                Ok(refused) => lost.extend(refused),
                Err(cause) => failure = Some(cause.error),
            }
        }
        let Some(error) = failure else { return Ok(lost) };
        // The rest was done: acknowledgements go on while a full server refuses dead letters.
        let left = leases.iter().enumerate().filter(|(_, lease)| self.hold.get(**lease).is_some());
        let left = left.map(|(index, _)| (index, error.clone())).collect();
        Err(error.listing(left))
    }

    async fn begin(&self, wanted: Vec<(Lease, Text)>, keep: Duration) -> Result<Vec<Begun>> {
        // What is not held any more must not run either; its verdict will find that out.
        let mut begun = vec![Begun::Busy(Duration::ZERO); wanted.len()];
        let mut parts: Vec<Vec<_>> = self.members.iter().map(|_| Vec::new()).collect();
        for (index, (lease, key)) in wanted.into_iter().enumerate() {
            let Some(held) = self.hold.get(lease) else { continue };
            let mark = Mark {
                partition: partition_of(Some(&key), self.members.len() as u32) as usize,
                token: format!("{}-{}", self.members[held.partition].consumer, lease.position).into(),
                delivery: marks::delivery(&held),
                keep: time::millis(keep),
                key,
            };
            // Before it is sent: if the answer is lost, the verdict will end the mark.
            self.hold.mark(lease, Some(mark.clone()));
            parts[mark.partition].push((index, lease, mark));
        }
        for (member, part) in self.members.iter().zip(parts) {
            let marks: Vec<_> = part.iter().map(|(_, _, mark)| (Step::Begin, mark.clone())).collect();
            for ((index, lease, _), answer) in part.into_iter().zip(member.mark(&marks).await?) {
                begun[index] = match answer {
                    0 => Begun::Run,
                    -1 => Begun::Duplicate,
                    since => Begun::Busy(Duration::from_millis((since - 1).max(0).unsigned_abs())),
                };
                if begun[index] != Begun::Run {
                    self.hold.mark(lease, None);
                }
            }
        }
        Ok(begun)
    }

    async fn heartbeat(&self, held: &[Lease]) -> Result<Vec<Lease>> {
        for member in &self.members {
            if !*self.closed.borrow() {
                member.be_there().await?;
            }
            member.heartbeat().await?;
        }
        let mut renew: Vec<Vec<_>> = self.members.iter().map(|_| Vec::new()).collect();
        for mark in self.hold.marks() {
            renew[mark.partition].push((Step::Renew, mark));
        }
        for (member, marks) in self.members.iter().zip(&renew) {
            member.mark(marks).await?;
        }
        Ok(held.iter().filter(|lease| self.hold.get(**lease).is_none()).copied().collect())
    }

    async fn leave(&self) {
        for member in &self.members {
            member.be_gone().await;
        }
        self.give_back().await;
        drop(self.looking.lock().await); // it may be about to read; no other begins
        for member in &self.members {
            // A read that waits at the doorbell could bring something at the last moment: end it, and look.
            if member.stop_reading() {
                let mut ring = redis::cmd("XADD");
                ring.arg(&member.partition.keys.bell).arg("MAXLEN").arg(1).arg("*").arg("why").arg("leaving");
                drop(member.partition.work.run(&ring, member.partition.patience()).await);
            }
            member.quiet().await;
        }
        self.give_back().await;
        for member in &self.members {
            member.finish().await;
            member.pass_on().await;
            member.partition.leave(member);
            member.forget_consumers(Duration::from_secs(365 * 86_400), true).await;
        }
    }

    async fn give_back(&self) {
        self.hold.clear_ready();
        let left = releases(self.hold.all());
        if left.is_empty() {
            return;
        }
        if let Err(cause) = self.settle(left).await {
            log::warn!("leaving failed, deliveries return when their lease runs out: {cause}");
        }
    }
}

impl Source for GroupSource {
    fn take(&self, max: usize) -> Task<Result<Vec<Delivery>>> {
        let shared = self.0.clone();
        Box::pin(async move { shared.take(max.max(1)).await.map_err(|cause| cause.during("take")) })
    }

    fn settle(&self, settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        let shared = self.0.clone();
        Box::pin(async move {
            // Not dropped in the middle: the caller would not know what was done.
            let settled = crate::process::current().runtime.spawn(async move {
                let settled = shared.settle(settlements).await;
                shared.pass_on();
                settled
            });
            settled.await.unwrap_or_else(|_| Err(closed())).map_err(|cause| cause.during("settle"))
        })
    }

    fn begin(&self, wanted: Vec<(Lease, Text)>, keep: Duration) -> Task<Result<Vec<Begun>>> {
        let shared = self.0.clone();
        Box::pin(async move {
            let begun = crate::process::current().runtime.spawn(async move { shared.begin(wanted, keep).await });
            begun.await.unwrap_or_else(|_| Err(closed())).map_err(|cause| cause.during("begin"))
        })
    }

    fn heartbeat(&self, held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        let shared = self.0.clone();
        Box::pin(async move { shared.heartbeat(&held).await.map_err(|cause| cause.during("heartbeat")) })
    }

    fn close(&self) -> Task<()> {
        let shared = self.0.clone();
        Box::pin(async move {
            if shared.closed.send_replace(true) {
                return;
            }
            if tokio::time::timeout(LEAVING, shared.leave()).await.is_err() {
                log::warn!("leaving took too long, deliveries return when their lease runs out");
            }
        })
    }
}

impl Drop for GroupSource {
    fn drop(&mut self) {
        if self.0.closed.send_replace(true) {
            return;
        }
        let shared = self.0.clone();
        let process = crate::process::current();
        process.runtime.spawn(async move { drop(tokio::time::timeout(LEAVING, shared.leave()).await) });
    }
}
