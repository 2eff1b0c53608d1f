//! The core of polybus: one event bus for Python and TypeScript services.
//!
//! An event walks one way through these modules, and each imports only those named before it:
//!
//! `error → event → pattern → codec → retry → delivery → dead_letter → outbox → history → transport → handler → dispatch → request → bus → replay → host`
//!
//! `batch`, `breaker`, `clock`, `config`, `lease`, `logs`, `metrics`, `options`, `process` and `testkit` serve them. The languages meet the core in [`host`].

mod batch;
pub mod breaker;
pub mod bus;
pub mod cli;
pub mod clock;
pub mod codec;
pub mod config;
pub mod dead_letter;
pub mod delivery;
mod dispatch;
pub mod error;
pub mod event;
pub mod handler;
pub mod history;
pub mod host;
mod lease;
pub mod logs;
pub mod metrics;
pub mod options;
pub mod outbox;
pub mod pattern;
pub mod process;
pub mod request;
mod replay;
pub mod retry;
pub mod subscription;
mod testkit;
pub mod transport;

pub use batch::BatchOptions;
pub use breaker::BreakerOptions;
pub use bus::Bus;
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, EventType, Meta};
pub use options::{BusOptions, SubscribeOptions};
pub use pattern::Pattern;
pub use replay::Replay;
pub use retry::RetryPolicy;
pub use subscription::Subscription;
