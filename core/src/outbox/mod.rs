//! The outbox and the inbox: tables inside the application's own database, written in its own transaction.
//!
//! The core renders statements; the application's driver runs them, on the connection and in the transaction that the
//! application hands in. So the row and its event commit together, and the core never opens that database (for a
//! SQLite file this matters: two SQLite libraries on one file in one process lose data).
//!
//! - [`dialect`]: which database, and how its driver writes placeholders;
//! - [`statement`]: SQL text with its parameters, and the writer that keeps the two together;
//! - [`table`]: validated names, the tables' DDL, and how a missing or older table is told;
//! - [`relay`]: carries the events from the table to a bus.

pub mod dialect;
pub mod relay;
pub mod statement;
pub mod table;

pub use dialect::{Dialect, Style};
pub use statement::{Param, Sql, Statement};
pub use table::Table;
