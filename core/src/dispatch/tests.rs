//! Leases that are lost while a batch runs: no real store loses one on request.

use std::sync::Mutex;
use std::time::SystemTime;

use tokio::sync::Notify;

use super::*;
use crate::event::Meta;
use crate::handler::{Job, from_batch_fn};

/// Gives three deliveries, tells which leases are lost, and remembers what was settled.
#[derive(Default)]
struct Store {
    given: Mutex<bool>,
    lost: Mutex<Vec<i64>>,
    settled: Mutex<Vec<Settlement>>,
}

impl Source for Store {
    fn take(&self, _: usize) -> Task<Result<Vec<Delivery>>> {
        if std::mem::replace(&mut *self.given.lock().unwrap(), true) {
            return Box::pin(std::future::pending());
        }
        let delivery = |position| Delivery {
            body: crate::delivery::Body::Event(Event::new(
                crate::EventType::new("n").unwrap(),
                "1".into(),
                Meta::new(SystemTime::now()),
            )),
            lease: Lease { position, token: 1 },
            attempt: 1,
            redelivered: false,
            received_at: SystemTime::now(),
            first_failed_at: None,
            expired: false,
        };
        Box::pin(std::future::ready(Ok((1..=3).map(delivery).collect())))
    }

    fn settle(&self, settlements: Vec<Settlement>) -> Task<Result<Vec<Lease>>> {
        self.settled.lock().unwrap().extend(settlements);
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn heartbeat(&self, held: Vec<Lease>) -> Task<Result<Vec<Lease>>> {
        let lost = self.lost.lock().unwrap();
        let lost = held.into_iter().filter(|lease| lost.contains(&lease.position)).collect();
        Box::pin(std::future::ready(Ok(lost)))
    }

    fn close(&self) -> Task<()> {
        Box::pin(std::future::ready(()))
    }
}

/// Tells when it goes.
struct Told(Arc<Notify>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[tokio::test]
async fn a_batch_goes_on_for_the_events_that_are_still_ours() {
    for all in [false, true] {
        let store = Arc::new(Store::default());
        let [entered, leave, gone]: [Arc<Notify>; 3] = Default::default();
        let (inside, until, told) = (entered.clone(), leave.clone(), gone.clone());
        let handler = from_batch_fn(move |jobs: Vec<Job>| {
            let (inside, until, told) = (inside.clone(), until.clone(), Told(told.clone()));
            async move {
                let _told = told;
                inside.notify_one();
                until.notified().await;
                jobs.iter().map(|job| (job.id, Outcome::Done)).collect()
            }
        });
        let (wish, wishes) = watch::channel(Wish::Run);
        let counters = Arc::new(Counters::default());
        let dispatcher = Dispatcher {
            source: store.clone(),
            handler,
            rules: Rules {
                label: "test".into(),
                concurrency: 1,
                prefetch: 0,
                retry: RetryPolicy::default(),
                timeout: None,
                dead_letter: true,
                broadcast: false,
                lease: Duration::from_millis(20),
                breaker: None,
                once: None,
                batch: Some(BatchOptions { size: 3, wait: Duration::from_secs(3600) }),
            },
            clock: Clock::default(),
            faults: None,
            counters: counters.clone(),
            wish: wishes,
        };
        let running = tokio::spawn(dispatcher.run());
        entered.notified().await;
        *store.lost.lock().unwrap() = if all { vec![1, 2, 3] } else { vec![2] };
        let lost = if all { 3 } else { 1 };
        while counters.leases_lost.load(Ordering::Relaxed) < lost {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if all {
            gone.notified().await; // it was cancelled: nobody lets it leave
        } else {
            leave.notify_one();
        }
        wish.send_replace(Wish::Drain(tokio::time::Instant::now() + Duration::from_secs(30)));
        running.await.unwrap();
        let settled = store.settled.lock().unwrap();
        let mut acked: Vec<_> = settled.iter().map(|s| (s.lease.position, s.verdict == Verdict::Ack)).collect();
        acked.sort_unstable();
        assert_eq!(acked, if all { vec![] } else { vec![(1, true), (3, true)] });
    }
}
