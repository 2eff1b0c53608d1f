//! The clocks of [`crate::transport::time`], and which boot of the machine the boot clock belongs to.

pub(super) use crate::transport::time::{boot_ms, from_ms, millis, to_ms, wall_ms};

/// Names the current boot of the machine; empty where the system does not tell.
pub(super) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}
