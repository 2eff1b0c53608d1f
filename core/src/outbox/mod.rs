//! The outbox and the inbox: tables inside the application's own database, written in its own transaction.
//!
//! The core renders statements; the application's driver runs them, on the connection and in the transaction that the
//! application hands in. So the row and its event commit together, and the core never opens that database (for a
//! SQLite file this matters: two SQLite libraries on one file in one process lose data).
//!
//! - [`dialect`]: which database, and how its driver writes placeholders;
//! - [`statement`]: SQL text with its parameters, and the writer that keeps the two together;
//! - [`table`]: validated names, the tables' DDL, and how a missing or older table is told;
//! - [`store`]: events become rows, those that are there already are absorbed;
//! - [`inbox`]: an event takes effect once for each consumer;
//! - [`relay`]: carries the events from the table to a bus.

pub mod dialect;
pub mod inbox;
pub mod relay;
pub mod statement;
pub mod store;
pub mod table;

pub use dialect::{Dialect, Style};
pub use inbox::{Change, Inbox};
pub use statement::{Param, Sql, Statement};
pub use store::{Entry, Insert, Outbox, OutboxOptions, Row};
pub use table::Table;
