//! The core's log, kept for Python to fetch: a Rust thread that logs never waits for the GIL.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};

use ::log::{Level, LevelFilter, Log, Metadata, Record};
use polybus_core::process::PerProcess;
use pyo3::prelude::*;

use crate::bridge::{Wake, lock};

/// Most records that wait; the oldest go first.
const CAPACITY: usize = 1000;

struct Queue {
    records: Mutex<VecDeque<(u8, String)>>,
    /// Consumers that can be asked to fetch.
    wakes: Mutex<Vec<Weak<Wake>>>,
}

static QUEUE: PerProcess<Queue> = PerProcess::new();

fn queue() -> &'static Queue {
    QUEUE.get_or_init(|| Queue { records: Mutex::default(), wakes: Mutex::default() })
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
        // Python's numbers.
        let level = match record.level() {
            Level::Error => 40,
            Level::Warn => 30,
            Level::Info => 20,
            Level::Debug => 10,
            Level::Trace => 5,
        };
        {
            let mut records = lock(&queue().records);
            if records.len() == CAPACITY {
                records.pop_front();
            }
            records.push_back((level, record.args().to_string()));
        }
        // All of them: the loop of one may never turn again.
        lock(&queue().wakes).iter().filter_map(Weak::upgrade).for_each(|wake| wake.ring());
    }

    fn flush(&self) {}
}

/// `wake` rings when there are records.
pub fn watch(wake: &Arc<Wake>) {
    let mut wakes = lock(&queue().wakes);
    wakes.retain(|wake| wake.strong_count() > 0);
    wakes.push(Arc::downgrade(wake));
}

/// Keeps records of this level of Python's `logging` and above.
#[pyfunction]
pub fn set_log_level(level: u32) {
    // A second call finds the logger in place.
    let _ = ::log::set_logger(&Logger);
    ::log::set_max_level(match level {
        0..=9 => LevelFilter::Trace,
        10..=19 => LevelFilter::Debug,
        20..=29 => LevelFilter::Info,
        30..=39 => LevelFilter::Warn,
        40..=49 => LevelFilter::Error,
        _ => LevelFilter::Off,
    });
}

/// The records that wait, as level and message, oldest first.
#[pyfunction]
pub fn take_logs() -> Vec<(u8, String)> {
    match QUEUE.get() {
        Some(queue) => lock(&queue.records).drain(..).collect(),
        None => Vec::new(),
    }
}
