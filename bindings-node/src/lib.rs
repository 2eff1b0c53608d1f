//! What TypeScript calls in the core; `bindings-node/native/index.d.ts` is generated from here.
//!
//! `bridge` is where one JavaScript environment meets the core, `bus` holds the bound methods, `event` the wire forms
//! that cross, `options` and `error` the conversions, `watch` lets the event loop read answers itself. No policy, no
//! retry and no pattern is decided here.

mod bridge;
mod bus;
mod error;
mod event;
mod history;
mod options;
mod outbox;
mod receipts;
mod relay;
mod watch;

use napi_derive::napi;

/// Events are made and dropped by the hundred, on different threads: the system's allocator spends a tenth of a delivery on
/// that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The version of the Rust core under this package.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Runs the command `polybus` with these arguments, the program's name first. Returns its exit code when it has ended.
#[napi]
pub fn cli(args: Vec<String>) -> i32 {
    polybus_core::cli::run(args)
}
