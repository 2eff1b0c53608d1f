//! The relay's loop: claim, publish, end the claim.
//!
//! Ending one claim and making the next go to the database together, so it never waits for us between the two. In a
//! backlog PostgreSQL works even while we publish: it ends the claim before, and makes the one after.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::listen::Listener;
use super::publish::{Published, publish};
use super::report::RelayBatch;
use super::store::{Claim, Store};
use super::{Desk, Live, Relay, Source};
use crate::error::{Error, ErrorKind, Result};

/// The first pause after rows were found, and the one between tries to mark them.
const SHORT: Duration = Duration::from_millis(2);
/// How often the floor is moved.
const ADVANCE: Duration = Duration::from_millis(100);
/// The shortest lease that leaves time to claim rows before those in front of them are published.
const ROOMY: Duration = Duration::from_secs(1);
/// Bounds of the pause while the database or the bus is away.
const AWAY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

impl Relay {
    /// Relays what one claim gives, and says what became of it; nothing is a batch of no rows. `ConnectionFailed` and the
    /// like when the claim cannot be made.
    pub async fn relay_batch(&self) -> Result<RelayBatch> {
        let live = self.live();
        let store = &live.store;
        let mut hasty = SHORT;
        let claim = loop {
            let claimed = self.claim(live, store).await;
            live.counters.looked(claimed.as_ref().err());
            let claim = claimed.map_err(|error| error.during("relay"))?;
            if !claim.again || hasty >= AWAY.0 {
                break claim;
            }
            tokio::time::sleep(hurried(&mut hasty)).await;
        };
        if claim.rows.is_empty() {
            return Ok(RelayBatch::default());
        }
        let published = self.publish(store, claim, Instant::now()).await;
        let batch = self.settle(store, published).await;
        live.counters.batch(&batch);
        if let Err(error) = store.advance().await {
            log::debug!("the floor of the outbox was not moved: {error}");
        }
        Ok(batch)
    }

    /// Works until [`Relay::stop`]; rows that are under way then are finished. The database and the bus may be away for
    /// any time: it waits, longer and longer up to 10 s, and goes on.
    ///
    /// Fails at once when the table is missing or of another version, or when the database refuses the user.
    pub async fn run(&self) -> Result<()> {
        let live = self.live();
        let stop = live.stop.subscribe();
        self.begin(live, &stop).await?;
        let _listener = match &self.0.source {
            Source::Server { url, listen: Some(server) } => {
                let useless = self.0.options.listen_url.is_none() && url.is_pooled();
                if useless {
                    log::warn!(
                        "the relay polls: {} is a pool of connections (PgBouncer), and passes no notifications on; give \
                         listen_url, the URL of the database itself, to relay without that delay",
                        url.name()
                    );
                }
                (!useless).then(|| Listener::new((**server).clone(), self.0.table.channel(), live.wake.clone()))
            }
            _ => None,
        };
        let workers = live.workers.iter().map(|desk| self.work(live, desk, stop.clone()));
        futures_util::future::join_all(workers).await;
        Ok(())
    }

    /// Ends every [`Relay::run`] of this process when its rows are finished.
    pub fn stop(&self) {
        self.live().stop.send_modify(|times| *times += 1);
    }

    /// Waits for the database, and looks at the table for the first time.
    async fn begin(&self, live: &Live, stop: &watch::Receiver<u64>) -> Result<()> {
        let mut pause = AWAY.0;
        loop {
            let checked = live.store.rehearse().await;
            let news = live.counters.looked(checked.as_ref().err());
            match checked {
                Ok(()) => return Ok(()),
                Err(error) if !error.is_retryable() => return Err(error.during("relay")),
                Err(error) if news => log::warn!("the relay waits for its database: {error}"),
                Err(_) => {}
            }
            if stop.has_changed().unwrap_or(true) {
                return Ok(());
            }
            rest(jittered(&mut pause), stop, std::future::pending()).await;
        }
    }

    async fn work(&self, live: &Live, Desk { store, marks }: &Desk, stop: watch::Receiver<u64>) {
        let _counted = Counted::new(&live.counters.workers);
        let (mut away, mut idle, mut hasty) = (AWAY.0, SHORT, SHORT);
        let mut moved = Instant::now();
        // What is claimed, and since when; what was published while that was done, and where its claim is to be ended.
        let (mut next, mut before) = (None::<(Result<Claim>, Instant)>, None);
        loop {
            if stop.has_changed().unwrap_or(true) {
                if let Some((published, desk)) = before {
                    live.counters.batch(&self.settle(desk, published).await);
                }
                if let Some((Ok(claim), _)) = next {
                    self.give_back(store, claim).await;
                }
                return;
            }
            let (claimed, since) = match next.take() {
                // The bus took its time with those before: others may be faster.
                Some((Ok(claim), since)) if since.elapsed() > self.0.options.lease / 3 => {
                    self.give_back(store, claim).await;
                    continue;
                }
                Some(claimed) => claimed,
                None => (self.claim(live, store).await, Instant::now()),
            };
            let news = live.counters.looked(claimed.as_ref().err());
            let claim = match claimed {
                Ok(claim) => claim,
                Err(error) => {
                    if news {
                        log::warn!("the relay cannot claim rows, and waits: {error}");
                    }
                    rest(jittered(&mut away), &stop, std::future::pending()).await;
                    continue;
                }
            };
            if news {
                log::info!("the relay has its database again");
            }
            if claim.rows.is_empty() {
                let pause = if claim.again {
                    // Another worker, or another relay, has what there is: that is no reason to fall asleep.
                    hurried(&mut hasty)
                } else {
                    hasty = SHORT;
                    let pause = idle;
                    idle = idle.mul_f64(1.5).min(self.0.options.poll_interval.max(SHORT));
                    pause
                };
                rest(pause, &stop, live.wake.notified()).await;
            } else {
                (idle, hasty) = (SHORT, SHORT);
                let looks_ahead = self.looks_ahead(store, &claim) && moved.elapsed() < ADVANCE;
                // The next claim must see that these keys are free again, so it follows in the same session.
                let keyed = claim.rows.iter().any(|row| row.key.is_some());
                let desk = if keyed { store } else { marks };
                // Polled in this order; the last takes the thread for a while.
                let ((), ahead, published) = tokio::join!(
                    async {
                        if let Some((published, desk)) = before.take() {
                            live.counters.batch(&self.settle(desk, published).await);
                        }
                    },
                    async {
                        let claimed = if looks_ahead { self.claim(live, store).await } else { return None };
                        Some((claimed, Instant::now()))
                    },
                    async {
                        if looks_ahead {
                            tokio::task::yield_now().await;
                        }
                        self.publish(store, claim, since).await
                    },
                );
                let outage = published.outage.clone();
                if outage.is_none()
                    && let Some((Ok(claim), _)) = &ahead
                    && !claim.rows.is_empty()
                {
                    (before, next, away) = (Some((published, desk)), ahead, AWAY.0);
                    continue;
                }
                let settled = self.settle(store, published);
                if let Some(error) = outage {
                    live.counters.batch(&settled.await);
                    if let Some((Ok(claim), _)) = ahead {
                        self.give_back(store, claim).await;
                    }
                    if away == AWAY.0 {
                        log::warn!("the bus takes no events, and the relay waits: {error}");
                    }
                    rest(jittered(&mut away), &stop, std::future::pending()).await;
                    continue;
                }
                // Polled in this order, so the database sees them in this order.
                let (batch, claimed) = tokio::join!(settled, self.claim(live, store));
                live.counters.batch(&batch);
                next = Some((claimed, Instant::now()));
            }
            away = AWAY.0;
            if moved.elapsed() >= ADVANCE {
                moved = Instant::now();
                if let Err(error) = store.advance().await {
                    log::debug!("the floor of the outbox was not moved: {error}");
                }
            }
        }
    }

    async fn claim(&self, live: &Live, store: &Store) -> Result<Claim> {
        let _one = live.claiming.lock().await;
        let claim = store.claim(self.0.options.batch, self.0.options.lease).await?;
        if !claim.rows.is_empty() {
            self.probe("claimed");
        }
        Ok(claim)
    }

    /// Whether to make the next claim while this one is published: when it is full, so that there is likely more.
    fn looks_ahead(&self, store: &Store, claim: &Claim) -> bool {
        let full = claim.rows.len() == self.0.options.batch;
        full && store.claims_are_records() && self.0.options.lease >= ROOMY
    }

    async fn give_back(&self, store: &Store, claim: Claim) {
        let seqs: Vec<_> = claim.rows.iter().map(|row| row.seq).collect();
        if !seqs.is_empty()
            && let Err(error) = store.give_back(&claim.token, &seqs).await
        {
            stay_claimed(seqs.len(), &error);
        }
    }

    /// Publishes a claim, ours since then, and keeps its lease meanwhile.
    async fn publish(&self, store: &Store, claim: Claim, since: Instant) -> Published {
        let Claim { token, rows, .. } = claim;
        let seqs: Vec<_> = rows.iter().map(|row| row.seq).collect();
        let lease = self.0.options.lease;
        let leased = Mutex::new(since);
        let work = publish(rows, &*self.0.bus, &*self.0.policy);
        let heartbeat = async {
            loop {
                tokio::time::sleep(lease / 3).await;
                let now = Instant::now();
                match store.extend(&token, &seqs, lease).await {
                    Ok(()) => *leased.lock().unwrap_or_else(PoisonError::into_inner) = now,
                    Err(error) => log::debug!("the lease of {} rows was not extended: {error}", seqs.len()),
                }
            }
        };
        let mut published = tokio::select! {
            biased;
            published = work => published,
            never = heartbeat => never,
        };
        published.attempted = seqs.len() as u64;
        published.leased_until = Some(leased.into_inner().unwrap_or_else(PoisonError::into_inner) + lease);
        published.token = token;
        self.probe("published");
        published
    }

    /// Ends a claim as its publish ended. While the database does not answer it tries again, as long as the lease
    /// certainly lasts: what is not marked is published twice.
    async fn settle(&self, store: &Store, done: Published) -> RelayBatch {
        let mut batch = RelayBatch {
            attempted: done.attempted,
            publish_failed: done.refused,
            malformed: done.malformed,
            dead_lettered: done.dead,
            outage: done.outage.as_ref().map(ToString::to_string),
            ..RelayBatch::default()
        };
        if store.claims_are_records() {
            self.settle_record(store, &done, &mut batch).await;
        } else {
            self.settle_rows(store, &done, &mut batch).await;
        }
        self.probe("settled");
        batch
    }

    async fn settle_record(&self, store: &Store, done: &Published, batch: &mut RelayBatch) {
        let Published { token, delivered, failed, back, .. } = done;
        let until = done.leased_until.unwrap_or_else(Instant::now);
        let ended = persist(until, |again| store.end(token, delivered, failed, again)).await;
        match ended {
            Ok(Some(ours)) => {
                (batch.relayed, batch.returned) = (ours, back.len() as u64);
                batch.ownership_mismatches = (delivered.len() as u64).saturating_sub(ours);
            }
            Ok(None) => batch.ownership_mismatches = done.attempted,
            Err(error) if delivered.is_empty() => stay_claimed(back.len() + failed.len(), &error),
            Err(error) => not_marked(batch, delivered.len(), &error),
        }
    }

    async fn settle_rows(&self, store: &Store, done: &Published, batch: &mut RelayBatch) {
        let Published { token, delivered, failed, back, .. } = done;
        let until = done.leased_until.unwrap_or_else(Instant::now);
        let marked = async {
            if delivered.is_empty() {
                Ok(0)
            } else {
                persist(until, |again| store.delivered(token, delivered, again)).await
            }
        };
        let returned =
            async { if back.is_empty() { Ok(0) } else { persist(until, |_| store.give_back(token, back)).await } };
        let failed = failed.iter().map(|verdict| persist(until, move |_| store.failed(token, verdict)));
        // Polled in this order, so the database sees them in this order.
        let (marked, returned, failed) = tokio::join!(marked, returned, futures_util::future::join_all(failed));
        match marked {
            Ok(ours) => {
                batch.relayed = ours;
                batch.ownership_mismatches += (delivered.len() as u64).saturating_sub(ours);
            }
            Err(error) => not_marked(batch, delivered.len(), &error),
        }
        match returned {
            Ok(ours) => {
                batch.returned = ours;
                batch.ownership_mismatches += (back.len() as u64).saturating_sub(ours);
            }
            Err(error) => stay_claimed(back.len(), &error),
        }
        for outcome in failed {
            match outcome {
                Ok(ours) => batch.ownership_mismatches += 1_u64.saturating_sub(ours),
                Err(error) => stay_claimed(1, &error),
            }
        }
    }
}

fn not_marked(batch: &mut RelayBatch, rows: usize, error: &Error) {
    batch.ack_failed = rows as u64;
    log::error!("{rows} events were published and not marked, and will be again: {error}");
}

fn stay_claimed(rows: usize, error: &Error) {
    log::warn!("{rows} rows of the outbox stay claimed until their lease is over: {error}");
}

/// Calls `statement` until it has an answer, or the lease is over.
async fn persist<F, T>(until: Instant, statement: impl Fn(bool) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut pause = SHORT;
    let mut again = false;
    loop {
        match statement(again).await {
            Err(error) if error.kind() == ErrorKind::ConnectionFailed && Instant::now() + pause < until => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
                again = true;
            }
            answered => return answered,
        }
    }
}

/// Waits, until it is time to stop at most. Leaves that to be seen by whoever asks next.
async fn rest(pause: Duration, stop: &watch::Receiver<u64>, woken: impl Future<Output = ()>) {
    let mut stopped = stop.clone();
    tokio::select! {
        () = tokio::time::sleep(pause) => {}
        () = woken => {}
        _ = stopped.changed() => {}
    }
}

/// Between a half and one and a half of `pause`, which grows.
fn jittered(pause: &mut Duration) -> Duration {
    let now = pause.mul_f64(0.5 + fastrand::f64());
    *pause = (*pause * 2).min(AWAY.1);
    now
}

/// The pause before a claim is made again. It grows, because whoever has the turn to claim may stand still with it.
fn hurried(hasty: &mut Duration) -> Duration {
    let now = hasty.mul_f64(0.5 + fastrand::f64());
    *hasty = hasty.mul_f64(1.2).min(AWAY.0);
    now
}

/// A worker that runs.
struct Counted<'a>(&'a AtomicU64);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
