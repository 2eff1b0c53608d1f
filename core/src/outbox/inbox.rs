//! The inbox: an event takes effect once for each consumer, because its mark commits with the effects.
//!
//! The primary key makes it true. Of two transactions that mark the same event at once the second waits in the database
//! until the first ends: after a commit it finds the mark, after a rollback it is the first.

use std::time::Duration;

use super::dialect::{Dialect, Style};
use super::statement::{Sql, Statement};
use super::store::check;
use super::table::{MAX_ID, Table};
use crate::error::{Error, Result};

/// Renders statements for one inbox table.
#[derive(Debug, Clone)]
pub struct Inbox {
    table: Table,
}

/// A statement, and how to learn how many rows it changed.
#[derive(Debug, Clone)]
pub struct Change {
    /// Changes rows. Where `confirm` is none, it returns a row for each.
    pub statement: Statement,
    /// To be run next on the same connection: returns the number of rows that were changed. MySQL only, which has no
    /// `RETURNING`. What drivers count is not always that: some ask for matched rows instead.
    pub confirm: Option<Statement>,
}

impl Inbox {
    /// `InvalidConfig` for a table that is not a name.
    pub fn new(table: &str) -> Result<Self> {
        Ok(Self { table: Table::parse(table)? })
    }

    /// The table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Marks the event as handled by `consumer`. One row changed: this is the first time. None: it was marked before.
    pub fn mark(&self, dialect: Dialect, style: Style, consumer: &str, event_id: &str) -> Result<Change> {
        if consumer.is_empty() {
            return Err(Error::invalid_config(
                "consumer is empty: name who handles the event, like consumer=\"billing\"",
            ));
        }
        check("consumer", consumer, MAX_ID)?;
        check("id", event_id, MAX_ID)?;
        let mut sql = Sql::new(dialect, style);
        // IGNORE hides nothing here: both values fit, and the table has no other column.
        sql.push(if dialect == Dialect::MySql { "INSERT IGNORE INTO " } else { "INSERT INTO " });
        sql.push(&self.table.quoted(dialect)).push(" (consumer, event_id) VALUES (");
        sql.bind(consumer).push(", ").bind(event_id).push(")");
        if dialect != Dialect::MySql {
            sql.push(" ON CONFLICT DO NOTHING RETURNING event_id");
        }
        Ok(changed(sql))
    }

    /// Takes a mark back, for effects that failed in a transaction that goes on.
    pub fn unmark(&self, dialect: Dialect, style: Style, consumer: &str, event_id: &str) -> Statement {
        let mut sql = Sql::new(dialect, style);
        sql.push("DELETE FROM ").push(&self.table.quoted(dialect)).push(" WHERE consumer = ").bind(consumer);
        sql.push(" AND event_id = ").bind(event_id);
        sql.finish()
    }

    /// Deletes at most `limit` marks that are older than `age` by the database's clock.
    ///
    /// Keep them for longer than an event can still be delivered again, replays of dead letters included: what arrives
    /// after its mark is gone takes effect a second time.
    pub fn purge(&self, dialect: Dialect, style: Style, age: Duration, limit: u32) -> Result<Change> {
        let age = i64::try_from(age.as_millis())
            .ok()
            .filter(|age| *age <= MAX_AGE)
            .ok_or_else(|| Error::invalid_config("the age is longer than a thousand years"))?;
        let (table, limit) = (self.table.quoted(dialect), i64::from(limit.max(1)));
        let mut sql = Sql::new(dialect, style);
        sql.push("DELETE FROM ").push(&table);
        if dialect == Dialect::MySql {
            sql.push(" WHERE processed_at < ").now_plus(-age).push(" ORDER BY processed_at LIMIT ").bind(limit);
        } else {
            sql.push(" WHERE (consumer, event_id) IN (SELECT consumer, event_id FROM ").push(&table);
            sql.push(" WHERE processed_at < ").now_plus(-age).push(" ORDER BY processed_at LIMIT ").bind(limit);
            sql.push(") RETURNING event_id");
        }
        Ok(changed(sql))
    }
}

const MAX_AGE: i64 = 1000 * 366 * 86_400_000;

fn changed(sql: Sql) -> Change {
    let count = || Statement { sql: "SELECT ROW_COUNT()".to_owned(), params: Vec::new() };
    let confirm = (sql.dialect() == Dialect::MySql).then(count);
    Change { statement: sql.finish(), confirm }
}
