//! What only Redis can do wrong: servers that stop, restart, hang or lie, and the network before them. What every
//! transport must do is in `../conformance`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod cluster;
mod durability;
mod full;
mod once;
mod outages;
mod pubsub;
mod refused;
mod secure;
mod sentinel;
mod stage;
mod traps;
mod support;
