//! A connection to MySQL or MariaDB that comes back by itself.
//!
//! Statements go out as text, one round trip each: nothing is prepared, so a proxy may stand in between, and what changes
//! from claim to claim leaves no prepared statements behind. Texts are written as hexadecimal numbers, which no setting
//! of the session reads in another way.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mysql_async::consts::ColumnType;
use mysql_async::prelude::Queryable;
use mysql_async::{Conn, Row, Value};
use tokio::sync::Mutex;

use super::mysql_server::Server;
use super::store::{Answer, Executor};
use crate::error::{Error, Result};
use crate::outbox::dialect::{Dialect, Style};
use crate::outbox::statement::{Param, Statement};
use crate::outbox::table::Table;
use crate::transport::Task;

/// A statement that takes longer is given up, with its connection: the other side may be gone without a word.
const PATIENCE: Duration = Duration::from_secs(60);
/// For a new connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How often a statement that InnoDB took back is made again before others hear of it: each is a transaction of its own.
const TRIES: u32 = 10;
/// Deadlock, and a row that changed under a snapshot (MariaDB).
const TAKEN_BACK: [u16; 2] = [1213, 1020];
/// A lock was not given within the session's `innodb_lock_wait_timeout`.
const LOCKED: u16 = 1205;

/// What we want of a session: every statement commits, sees what is committed, locks the rows that it changes and no gaps
/// between them; nothing is cut or replaced in silence. Times are compared in UTC by the statements themselves.
const WISHES: [&str; 2] = [
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION autocommit = 1, time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES', innodb_lock_wait_timeout = 5, \
     lock_wait_timeout = 30, wait_timeout = 28800",
];

/// One connection. Made when it is needed, and again when it was lost.
pub(super) struct MySql {
    server: Server,
    table: Table,
    connection: Mutex<Option<Conn>>,
    connections: AtomicU64,
}

impl MySql {
    pub fn executor(server: Server, table: Table) -> Arc<Handle> {
        Arc::new(Handle(Arc::new(Self { server, table, connection: Mutex::default(), connections: AtomicU64::new(0) })))
    }

    async fn connect(&self) -> Result<Conn> {
        let opened = async {
            let mut connection = self.server.open().await?;
            for wish in WISHES {
                connection.query_drop(wish).await?;
            }
            Ok(connection)
        };
        // The whole of it: a server that accepts and then says nothing is as good as none.
        let connection = match tokio::time::timeout(CONNECT, opened).await {
            Ok(opened) => opened.map_err(|cause| self.server.explain(cause, None))?,
            Err(_) => return Err(self.silent(CONNECT)),
        };
        self.connections.fetch_add(1, Ordering::Relaxed);
        Ok(connection)
    }

    fn silent(&self, patience: Duration) -> Error {
        Error::connection_failed(format!("the database {} did not answer within {patience:?}", self.server.name()))
    }

    /// Whoever asks first has the connection first. It is put back when all is well: a caller that goes away in the
    /// middle leaves none that waits for an answer.
    async fn run(&self, statement: Statement) -> Result<Answer> {
        let text = literal(&statement);
        let mut place = self.connection.lock().await;
        let mut tries = 0;
        loop {
            let mut connection = match place.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            let Ok(answered) = tokio::time::timeout(PATIENCE, send(&mut connection, &text)).await else {
                return Err(self.silent(PATIENCE));
            };
            match answered {
                Ok(answer) => {
                    *place = Some(connection);
                    return Ok(answer);
                }
                Err(cause) if repeats(&cause, tries) => {
                    *place = Some(connection);
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(2 << tries).mul_f64(fastrand::f64())).await;
                }
                // Whatever else it is, a new connection is the better one.
                Err(cause) => return Err(self.server.explain(cause, Some(&self.table))),
            }
        }
    }
}

fn repeats(cause: &mysql_async::Error, tries: u32) -> bool {
    match cause {
        mysql_async::Error::Server(told) if TAKEN_BACK.contains(&told.code) => tries < TRIES,
        mysql_async::Error::Server(told) if told.code == LOCKED => tries < 1,
        _ => false,
    }
}

/// The statement with its values in it.
fn literal(statement: &Statement) -> String {
    let mut text = String::with_capacity(statement.sql.len() + 64);
    // The text itself holds no other question marks: see `Sql::push`.
    let mut parts = statement.sql.split('?');
    text.push_str(parts.next().unwrap_or_default());
    for (part, param) in parts.zip(&statement.params) {
        // Writing into a String cannot fail.
        let _ = match param {
            Param::Null => write!(text, "NULL"),
            Param::Integer(number) => write!(text, "{number}"),
            Param::Text(value) => {
                text.push_str("_utf8mb4 x'");
                let digits = value.bytes().try_for_each(|byte| write!(text, "{byte:02x}"));
                digits.and_then(|()| write!(text, "'"))
            }
        };
        text.push_str(part);
    }
    text
}

async fn send(connection: &mut Conn, text: &str) -> Result<Answer, mysql_async::Error> {
    let mut result = connection.query_iter(text).await?;
    let affected = result.affected_rows();
    let rows = result.collect::<Row>().await?;
    Ok(Answer { affected, rows: rows.into_iter().map(cells).collect() })
}

fn cells(row: Row) -> Vec<Param> {
    let columns = row.columns();
    let cell = |(value, column): (Value, &mysql_async::Column)| {
        let number = matches!(
            column.column_type(),
            ColumnType::MYSQL_TYPE_LONGLONG
                | ColumnType::MYSQL_TYPE_LONG
                | ColumnType::MYSQL_TYPE_INT24
                | ColumnType::MYSQL_TYPE_SHORT
                | ColumnType::MYSQL_TYPE_TINY
        );
        match value {
            Value::NULL => Param::Null,
            Value::Int(number) => number.into(),
            Value::Bytes(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                match text.parse::<i64>() {
                    Ok(value) if number => value.into(),
                    _ => Param::Text(text.into_owned()),
                }
            }
            other => Param::Text(other.as_sql(true)),
        }
    };
    row.unwrap().into_iter().zip(columns.iter()).map(cell).collect()
}

/// What the relay holds of a connection.
pub(super) struct Handle(Arc<MySql>);

impl Executor for Handle {
    fn run(&self, statement: Statement) -> Task<Result<Answer>> {
        let connection = self.0.clone();
        Box::pin(async move { connection.run(statement).await })
    }

    fn dialect(&self) -> Dialect {
        Dialect::MySql
    }

    fn style(&self) -> Style {
        Style::Question
    }

    fn connection(&self) -> u64 {
        self.0.connections.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_so_that_nothing_ends_them() {
        let params = vec!["a'\\?ü".into(), Param::Null, Param::Integer(-7)];
        let statement = Statement { sql: "SELECT ?, ?, ? FROM `t`".into(), params };
        assert_eq!(literal(&statement), "SELECT _utf8mb4 x'61275c3fc3bc', NULL, -7 FROM `t`");
    }
}
