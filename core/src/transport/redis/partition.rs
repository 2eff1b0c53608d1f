//! One part of a bus on the server: its keys, the connections to where they are, its clock, and the task that looks
//! after it.
//!
//! Three connections whatever the number of subscriptions: one to publish, one for everything that answers at once, one
//! that waits ([`super::doorbell`]). The keeper task looks at the partition once a second in one script for all groups:
//! time, due retries, due delayed events, changed groups. Time is the server's: this process only adds what its own boot
//! clock counted since it last asked.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use redis::Value;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::doorbell::Doorbell;
use super::fault::{Failure, strange};
use super::keys::Keys;
use super::link::{Link, Server};
use super::member::Member;
use super::publish::Publisher;
use super::retention::Limits;
use super::value::{self, Id};
use super::{retention, scripts};
use crate::error::Result;
use crate::transport::time;

/// Between two looks.
const PULSE: Duration = Duration::from_secs(1);
/// Patience with a command that answers at once.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Delayed events moved in one step.
const PROMOTE: usize = 500;
/// Between two searches for consumers of processes that ended.
const JANITOR: Duration = Duration::from_secs(300);
/// A consumer that holds nothing and was silent for so long belongs to nobody.
const ABANDONED: Duration = Duration::from_secs(3600);

pub(super) struct Partition {
    pub number: u32,
    pub keys: Keys,
    pub server: Arc<Server>,
    pub publishing: Link,
    pub publisher: Publisher,
    pub work: Link,
    pub doorbell: Doorbell,
    /// The server's clock minus our boot clock.
    offset: AtomicI64,
    /// When the next delayed event is due, by the server's clock; negative: none known.
    delayed: AtomicI64,
    /// Changes with every change of a group.
    version: AtomicI64,
    members: Mutex<Vec<Weak<Member>>>,
    epoch: Mutex<Epoch>,
    /// Groups that were made again because the server had lost them.
    pub resets: AtomicU64,
    /// The server may have lost the number of partitions.
    forgotten: AtomicBool,
    wake: Notify,
    closed: AtomicBool,
}

#[derive(Default)]
struct Epoch {
    name: String,
    reported: Option<Instant>,
}

/// What [`Partition::look`] saw.
pub(super) struct Look {
    pub last: Id,
    due: Vec<Option<i64>>,
}

impl Partition {
    pub fn new(number: u32, keys: Keys, server: Arc<Server>) -> Self {
        let link = || Link::new(server.clone(), keys.events.clone());
        Self {
            number,
            publishing: link(),
            publisher: Publisher::default(),
            work: link(),
            doorbell: Doorbell::new(link()),
            keys,
            server,
            offset: AtomicI64::new(time::wall_ms() - time::boot_ms()),
            delayed: AtomicI64::new(-1),
            version: AtomicI64::new(0),
            members: Mutex::default(),
            epoch: Mutex::default(),
            resets: AtomicU64::new(0),
            forgotten: AtomicBool::new(false),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
        }
    }

    /// The server's time of day, in milliseconds.
    pub fn now(&self) -> i64 {
        time::boot_ms() + self.offset.load(Ordering::Relaxed)
    }

    pub fn set_now(&self, now: i64) {
        self.offset.store(now - time::boot_ms(), Ordering::Relaxed);
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Until when a command of the kind that answers at once may take.
    pub fn patience(&self) -> Instant {
        Instant::now() + PATIENCE
    }

    fn members(&self) -> Vec<Arc<Member>> {
        let mut members = lock(&self.members);
        members.retain(|member| member.strong_count() > 0);
        members.iter().filter_map(Weak::upgrade).collect()
    }

    pub fn enter(&self, member: &Arc<Member>) {
        lock(&self.members).push(Arc::downgrade(member));
        self.wake.notify_one();
    }

    pub fn leave(&self, member: &Member) {
        lock(&self.members).retain(|other| !std::ptr::eq(other.as_ptr(), member));
    }

    /// Something may have come for anybody.
    pub fn ring(&self) {
        self.members().iter().for_each(|member| member.ring());
    }

    /// A delayed event of this process, or one that was seen, is due then.
    pub fn delayed_until(&self, due: i64) {
        let sooner = self
            .delayed
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |known| (known < 0 || due < known).then_some(due));
        if sooner.is_ok() {
            self.wake.notify_one();
        }
    }

    /// After a join: the server's epoch and version.
    pub fn joined(&self, name: String, version: i64, now: i64) {
        self.set_now(now);
        lock(&self.epoch).name = name;
        // One change is the join itself; more are changes that somebody else made unnoticed.
        if version > self.version.swap(version, Ordering::AcqRel) + 1 {
            self.members().iter().for_each(|member| member.doubt());
        }
    }

    /// After a group was made again: counts it, and says so once for all groups.
    pub fn reset(&self, group: &str) {
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.forgotten.store(true, Ordering::Release);
        self.wake.notify_one();
        let mut epoch = lock(&self.epoch);
        if epoch.reported.is_none_or(|at| at.elapsed() > Duration::from_secs(5)) {
            epoch.reported = Some(Instant::now());
            log::warn!(
                "stream_reset: redis lost the groups of {} (flushed, deleted, or another server took over); group {group} goes on with what is there now",
                self.keys.events
            );
        }
    }

    /// Writes the number of partitions again after a loss: whoever comes next would choose another.
    async fn remind(&self) -> Result<(), Failure> {
        let Some((key, count)) = self.keys.parts() else { return Ok(()) };
        // Not our slot: a connection for the moment.
        let link = Link::new(self.server.clone(), key.to_owned());
        let mut set = redis::cmd("HSETNX");
        link.run(set.arg(key).arg("partitions").arg(count), self.patience()).await?;
        let mut get = redis::cmd("HGET");
        let found = value::number(link.run(get.arg(key).arg("partitions"), self.patience()).await?)?;
        if found != i64::from(count) {
            log::error!(
                "after the server lost its data, another process made this bus with {found} partitions instead of {count}: give it partitions={count}, or restart this one"
            );
        }
        Ok(())
    }

    /// One look at the partition, for `members`.
    pub async fn look(&self, members: &[Arc<Member>]) -> Result<Look, Failure> {
        let mut keys: Vec<&str> = vec![&self.keys.events, &self.keys.delayed, &self.keys.meta];
        keys.extend(members.iter().flat_map(|member| member.timers()));
        let command = scripts::PULSE.call(&keys);
        let answer = self.work.script(&scripts::PULSE, &command, self.patience()).await?;
        Ok(self.note(answer)?)
    }

    /// Reads the answer of the script `pulse`.
    pub fn note(&self, answer: Value) -> Result<Look> {
        let mut facts = value::list(answer)?.into_iter();
        let mut next = || facts.next().ok_or_else(|| strange("a short look"));
        self.set_now(value::number(next()?)?);
        let last = value::id(next()?)?;
        let delayed = value::number(next()?)?;
        let epoch = value::text(next()?)?;
        let version = value::number(next()?)?;
        self.delayed.store(delayed, Ordering::Release);
        let due = facts.map(value::number).map(|due| due.map(|due| (due >= 0).then_some(due)));
        let due = due.collect::<Result<Vec<_>>>()?;
        let known = lock(&self.epoch).name.clone();
        if self.version.swap(version, Ordering::AcqRel) != version || (!known.is_empty() && known != epoch) {
            self.members().iter().for_each(|member| member.doubt());
        }
        Ok(Look { last, due })
    }

    async fn pulse(&self) -> Result<(), Failure> {
        let members = self.members();
        let look = self.look(&members).await?;
        for (member, due) in members.iter().zip(look.due) {
            member.pulse(look.last, due);
        }
        Ok(())
    }

    async fn promote(&self) -> Result<(), Failure> {
        let keys = &self.keys;
        let mut command = scripts::PROMOTE.call(&[&keys.events, &keys.delayed, &keys.delayed_data]);
        command.arg(PROMOTE);
        let answer = self.work.script(&scripts::PROMOTE, &command, self.patience()).await?;
        let mut facts = value::list(answer)?.into_iter().map(value::number);
        self.set_now(facts.next().transpose()?.unwrap_or_default());
        self.delayed.store(facts.next().transpose()?.unwrap_or(-1), Ordering::Release);
        Ok(())
    }

    /// Looks after the partition until it is closed.
    pub async fn keep(self: Arc<Self>, limits: Limits) {
        let mut pulse_at = Instant::now();
        let mut sweep_at = Instant::now() + limits.every();
        let mut janitor_at = Instant::now() + JANITOR.mul_f64(fastrand::f64());
        while !self.is_closed() {
            let now = Instant::now();
            let delayed = self.delayed.load(Ordering::Acquire);
            let due = (delayed >= 0).then(|| now + Duration::from_millis((delayed - self.now()).max(0).unsigned_abs()));
            let watched = !self.members().is_empty();
            let sweeps = watched || limits.are_hard();
            let step = if self.forgotten.swap(false, Ordering::AcqRel) {
                self.remind().await.inspect_err(|_| self.forgotten.store(true, Ordering::Release))
            } else if due.is_some_and(|due| due <= now) {
                self.promote().await
            } else if watched && pulse_at <= now {
                pulse_at = now + PULSE.mul_f64(0.8 + 0.4 * fastrand::f64());
                self.pulse().await
            } else if sweeps && sweep_at <= now {
                let more = retention::sweep(&self, &limits).await;
                sweep_at = now + if matches!(more, Ok(true)) { Duration::ZERO } else { limits.every() };
                more.map(drop)
            } else if watched && janitor_at <= now {
                janitor_at = now + JANITOR;
                for member in self.members() {
                    member.forget_consumers(ABANDONED, false).await;
                }
                Ok(())
            } else {
                let next = if watched { Some(pulse_at.min(janitor_at)) } else { None };
                let next = [next, sweeps.then_some(sweep_at), due].into_iter().flatten().min();
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = async { match next { Some(at) => tokio::time::sleep_until(at).await, None => std::future::pending().await } } => {}
                }
                Ok(())
            };
            if let Err(failure) = step {
                log::debug!("looking after {} failed: {}", self.keys.events, failure.error);
                // The link waits before it connects again; this is for a server that refuses the command itself.
                tokio::time::sleep(Duration::from_millis(100 + fastrand::u64(..400))).await;
            }
        }
    }

    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake.notify_one();
        self.doorbell.close();
        self.publisher.close();
        self.publishing.cut();
        self.work.cut();
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
