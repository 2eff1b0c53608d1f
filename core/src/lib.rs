//! The core of polybus: one event bus for Python and TypeScript services.
//!
//! An event walks one way through these modules, and each imports only those named before it.

pub mod error;
pub mod event;
pub mod process;
pub mod pattern;
pub mod codec;
pub mod retry;
pub mod delivery;
pub mod dead_letter;
pub mod transport;
pub mod handler;

pub use error::{Error, ErrorKind, Result};
