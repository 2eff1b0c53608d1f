//! The SQLite transport on real files: what the conformance suite cannot know about.

#![allow(clippy::unwrap_used)]

mod deliveries;
mod files;
mod keeping;
mod processes;
mod requests;
mod support;
mod trouble;
