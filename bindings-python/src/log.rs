//! The core's log for Python: levels as numbers of `logging`, and a bridge that is asked to fetch.

use std::sync::{Arc, Once};

use ::log::{Level, LevelFilter};
use polybus_core::logs;
use pyo3::prelude::*;

use crate::bridge::Wake;

/// `wake` rings when there are records, as long as somebody has it.
pub fn watch(wake: &Arc<Wake>) {
    let wake = Arc::downgrade(wake);
    logs::watch(::log::max_level(), move || wake.upgrade().is_some_and(|wake| wake.ring()));
}

/// Keeps records of this level of Python's `logging` and above.
#[pyfunction]
pub fn set_log_level(level: u32) {
    let level = match level {
        0..=9 => LevelFilter::Trace,
        10..=19 => LevelFilter::Debug,
        20..=29 => LevelFilter::Info,
        30..=39 => LevelFilter::Warn,
        40..=49 => LevelFilter::Error,
        _ => LevelFilter::Off,
    };
    static KEPT: Once = Once::new();
    // A program without any bridge fetches after each blocking call.
    KEPT.call_once(|| logs::watch(level, || false));
    logs::set_level(level);
}

/// The records that wait, as level and message, oldest first.
#[pyfunction]
pub fn take_logs() -> Vec<(u8, String)> {
    let number = |level| match level {
        Level::Error => 40,
        Level::Warn => 30,
        Level::Info => 20,
        Level::Debug => 10,
        Level::Trace => 5,
    };
    logs::take().into_iter().map(|(level, message)| (number(level), message)).collect()
}
