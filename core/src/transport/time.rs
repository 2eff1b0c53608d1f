//! The two clocks of the stores, in milliseconds.
//!
//! Due times, expiry and retention are promises about the calendar and use the wall clock. Leases are promises about
//! elapsed time, so they use the kernel's boot clock, which every process of the machine shares and which no
//! administrator can set back; it means nothing after a reboot, nor on another machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Wall clock, milliseconds since 1970.
pub(super) fn wall_ms() -> i64 {
    to_ms(SystemTime::now())
}

/// `time` in milliseconds since 1970; earlier times count as 1970.
pub(super) fn to_ms(time: SystemTime) -> i64 {
    millis(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// The time `ms` milliseconds after 1970.
pub(super) fn from_ms(ms: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms.max(0).unsigned_abs())
}

/// `duration` in milliseconds, at most a few million years, so that adding a clock to it cannot overflow.
pub(super) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX).min(i64::MAX / 4)
}

/// Milliseconds since the machine booted, suspend included.
#[cfg(target_os = "linux")]
pub(super) fn boot_ms() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec * 1000 + now.tv_nsec / 1_000_000
}

/// Milliseconds of the monotonic clock, which all processes of the machine share.
#[cfg(not(target_os = "linux"))]
pub(super) fn boot_ms() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as i64 * 1000 + now.tv_nsec as i64 / 1_000_000
}
