//! What the core logs, kept until an event loop of another language fetches it: a thread of the core never waits for
//! that language. Bounded: the oldest records go first.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::process::PerProcess;

/// Most records that wait.
const CAPACITY: usize = 1000;

/// Asked to come and fetch; answers whether it will.
type Fetcher = Arc<dyn Fn() -> bool + Send + Sync>;

struct Queue {
    records: Mutex<VecDeque<(Level, String)>>,
    /// The first that answers yes is enough.
    fetchers: Mutex<Vec<Fetcher>>,
}

static QUEUE: PerProcess<Queue> = PerProcess::new();

fn queue() -> &'static Queue {
    QUEUE.get_or_init(|| Queue { records: Mutex::default(), fetchers: Mutex::default() })
}

/// Keeps records of `level` and above from now on. `fetcher` is called from any thread when there are records; it must
/// return at once, and false when it cannot fetch any more: then it is dropped, and the next one is asked.
pub fn watch(level: LevelFilter, fetcher: impl Fn() -> bool + Send + Sync + 'static) {
    lock(&queue().fetchers).push(Arc::new(fetcher));
    // Fails when there is a logger already: ours, or that of a program in Rust, which is then left alone.
    let _ = log::set_logger(&Logger);
    set_level(level);
}

/// Keeps records of `level` and above from now on.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// The records that wait, oldest first.
pub fn take() -> Vec<(Level, String)> {
    QUEUE.get().map(|queue| lock(&queue.records).drain(..).collect()).unwrap_or_default()
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("polybus")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        {
            let mut records = lock(&queue().records);
            if records.len() == CAPACITY {
                records.pop_front();
            }
            records.push_back((record.level(), record.args().to_string()));
        }
        // Called without the lock: what a fetcher drops may log.
        while let Some(fetcher) = first()
            && !fetcher()
        {
            lock(&queue().fetchers).retain(|other| !Arc::ptr_eq(other, &fetcher));
        }
    }

    fn flush(&self) {}
}

fn first() -> Option<Fetcher> {
    lock(&queue().fetchers).first().cloned()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn keeps_records_until_they_are_fetched_and_forgets_who_left() {
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = asked.clone();
        watch(LevelFilter::Warn, || false);
        watch(LevelFilter::Warn, move || counted.fetch_add(1, Ordering::SeqCst) < usize::MAX);
        for number in 0..CAPACITY + 5 {
            log::warn!(target: "polybus_test", "record {number}");
        }
        log::info!(target: "polybus_test", "not kept");
        log::error!(target: "someone_else", "not ours");
        let ours: Vec<_> = take().into_iter().filter(|(_, text)| text.starts_with("record")).collect();
        assert_eq!(ours.last(), Some(&(Level::Warn, format!("record {}", CAPACITY + 4))));
        assert!(ours.len() > CAPACITY - 20, "the oldest go first, and tests beside this one log too");
        assert!(asked.load(Ordering::SeqCst) >= CAPACITY);
    }
}
