//! What the tests want of a database, whichever it is.

use mysql_async::prelude::Queryable;
use polybus_conformance::maria_server::MariaServer;
use polybus_conformance::postgres_server::PostgresServer;
use polybus_core::outbox::Dialect;
use tokio_postgres::{Client, SimpleQueryMessage, Transaction};

/// A server of the test's own.
pub trait Database: Send + Sync + 'static {
    type Client: Session + 'static;
    const DIALECT: Dialect;
    /// A table with the numbers `n` from 1 to 5000.
    const NUMBERS: &'static str;
    /// Ends the sessions of relays.
    const END_SESSIONS: &'static str;

    fn start() -> Self;
    fn url(&self) -> String;
    fn url_of(&self, user: &str) -> String;
    /// Where nobody called `shop` may write, whatever was granted.
    fn read_only_url(&self) -> String;
    fn sql(&self, sql: &str) -> String;
    fn connect(&self) -> impl Future<Output = Self::Client> + Send;
    fn kill9(&mut self);
    fn stop(&mut self);
    fn restart(&mut self);
    /// The time so many seconds ago.
    fn ago(seconds: u32) -> String;
    /// So many milliseconds after `time`.
    fn after(time: &str, millis: u32) -> String;
}

/// A connection of the test.
pub trait Session: Send + Sync {
    /// Runs statements, in the transaction that was begun if any was.
    fn run(&self, sql: &str) -> impl Future<Output = ()> + Send;
    /// The first column, if it can be had.
    fn texts(&self, sql: &str) -> impl Future<Output = Option<Vec<String>>> + Send;
    /// Writes a row into the outbox.
    fn add(&self, id: &str, key: Option<&str>, text: &str) -> impl Future<Output = ()> + Send;
}

const INSERT: &str = "INSERT INTO polybus_outbox (event_id, type, event, partition_key) VALUES";

macro_rules! session_of_postgres {
    ($($kind:ty),*) => {$(
        impl Session for $kind {
            async fn run(&self, sql: &str) {
                self.batch_execute(sql).await.unwrap();
            }

            async fn texts(&self, sql: &str) -> Option<Vec<String>> {
                let rows = self.simple_query(sql).await.ok()?;
                let text = |message| match message {
                    SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
                    _ => None,
                };
                Some(rows.into_iter().filter_map(text).collect())
            }

            async fn add(&self, id: &str, key: Option<&str>, text: &str) {
                let sql = format!("{INSERT} ($1, 'order.placed', $2, $3)");
                self.execute(&sql, &[&id, &text, &key]).await.unwrap();
            }
        }
    )*};
}

session_of_postgres!(Client, Transaction<'_>);

/// A connection to MariaDB.
pub struct MariaClient(tokio::sync::Mutex<mysql_async::Conn>);

impl Session for MariaClient {
    async fn run(&self, sql: &str) {
        self.0.lock().await.query_drop(sql).await.unwrap();
    }

    async fn texts(&self, sql: &str) -> Option<Vec<String>> {
        let rows: Vec<mysql_async::Row> = self.0.lock().await.query(sql).await.ok()?;
        Some(rows.into_iter().map(|mut row| row.take::<Option<String>, _>(0).flatten().unwrap_or_default()).collect())
    }

    async fn add(&self, id: &str, key: Option<&str>, text: &str) {
        let sql = format!("{INSERT} (?, 'order.placed', ?, ?)");
        self.0.lock().await.exec_drop(sql, (id, text, key)).await.unwrap();
    }
}

impl Database for PostgresServer {
    type Client = Client;
    const DIALECT: Dialect = Dialect::Postgres;
    const NUMBERS: &'static str = "generate_series(1, 5000) n";
    const END_SESSIONS: &'static str =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'polybus relay'";

    fn start() -> Self {
        Self::start()
    }

    fn url(&self) -> String {
        self.url()
    }

    fn url_of(&self, user: &str) -> String {
        self.url_of(user)
    }

    fn read_only_url(&self) -> String {
        format!("{}?options=-c%20default_transaction_read_only%3Don", self.url_of("shop:secret"))
    }

    fn sql(&self, sql: &str) -> String {
        self.sql(sql)
    }

    async fn connect(&self) -> Client {
        self.connect().await
    }

    fn kill9(&mut self) {
        self.kill9();
    }

    fn stop(&mut self) {
        self.stop();
    }

    fn restart(&mut self) {
        self.restart();
    }

    fn ago(seconds: u32) -> String {
        format!("now() - interval '{seconds} s'")
    }

    fn after(time: &str, millis: u32) -> String {
        format!("CAST('{time}' AS timestamptz) + interval '{millis} ms'")
    }
}

impl Database for MariaServer {
    type Client = MariaClient;
    const DIALECT: Dialect = Dialect::MySql;
    const NUMBERS: &'static str = "(SELECT seq AS n FROM seq_1_to_5000) numbers";
    const END_SESSIONS: &'static str = "KILL USER relay";

    fn start() -> Self {
        Self::start()
    }

    fn url(&self) -> String {
        self.url()
    }

    fn url_of(&self, user: &str) -> String {
        self.url_of(user)
    }

    fn read_only_url(&self) -> String {
        self.sql("SET GLOBAL read_only = 1");
        self.url_of("shop:secret")
    }

    fn sql(&self, sql: &str) -> String {
        self.sql(sql)
    }

    async fn connect(&self) -> MariaClient {
        MariaClient(self.connect().await.into())
    }

    fn kill9(&mut self) {
        self.kill9();
    }

    fn stop(&mut self) {
        self.stop();
    }

    fn restart(&mut self) {
        self.restart();
    }

    fn ago(seconds: u32) -> String {
        format!("UTC_TIMESTAMP(6) - INTERVAL {seconds} SECOND")
    }

    fn after(time: &str, millis: u32) -> String {
        format!("CAST('{time}' AS DATETIME(6)) + INTERVAL {} MICROSECOND", millis * 1000)
    }
}

/// Makes a test for each database of each function that is generic over it.
macro_rules! on_each_database {
    ($($name:ident),* $(,)?) => {
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name::<polybus_conformance::postgres_server::PostgresServer>().await;
            })*
        }
        mod mariadb {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name::<polybus_conformance::maria_server::MariaServer>().await;
            })*
        }
    };
}
pub(crate) use on_each_database;
