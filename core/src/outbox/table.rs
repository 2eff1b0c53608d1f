//! The tables: names, DDL, and how one that is missing or of another version is told.
//!
//! | column | what |
//! |---|---|
//! | `seq` | order of insertion; not of commit, so never a cursor |
//! | `event_id` | unique: a second row of the same event is absorbed |
//! | `type` | the event's type, for people and dashboards |
//! | `event` | the wire form of [`crate::codec`], as text: a JSON type would change numbers and refuse `\u0000` |
//! | `partition_key`, `dedupe_key` | the lane; what makes a second event the same one |
//! | `status` | `pending` → `claimed` → `delivered` or `dead`; in PostgreSQL a row stays `pending` while a claim, which is a row of its own there, holds it |
//! | `attempts`, `visible_at`, `lease_token`, `lease_until`, `last_error`, `delivered_at` | the relay's |
//! | `created_at` | the database's time of the insert |
//!
//! The version of a table is the set of its columns: [`Table::outbox_check`] asks for all of them and for no row.

use super::dialect::{Dialect, Style};
use super::statement::{Sql, Statement};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Excerpt;

/// The outbox's name unless another is given.
pub const OUTBOX: &str = "polybus_outbox";
/// The inbox's name unless another is given.
pub const INBOX: &str = "polybus_inbox";

/// Every column of the outbox that this version reads or writes.
pub const OUTBOX_COLUMNS: &str = "seq, event_id, type, event, partition_key, dedupe_key, status, attempts, visible_at, \
                                  lease_token, lease_until, last_error, created_at, delivered_at";
/// Every column of the inbox.
pub const INBOX_COLUMNS: &str = "consumer, event_id, processed_at";

/// What storing events takes on the outbox.
pub const OUTBOX_RIGHTS: &str = "SELECT, INSERT";
/// What marking events takes on the inbox, and purging it.
pub const INBOX_RIGHTS: &str = "SELECT, INSERT, DELETE";
/// What a relay takes on the outbox.
pub const RELAY_RIGHTS: &str = "SELECT, INSERT, UPDATE, DELETE";

/// Longest `event_id`, `consumer` and inbox id, in bytes.
pub const MAX_ID: usize = 255;
/// Longest `partition_key` and `dedupe_key`, in bytes: what the indexes of all dialects hold.
pub const MAX_KEY: usize = 512;

/// PostgreSQL cuts names at 63 bytes, and indexes are named after their table.
const MAX_NAME: usize = 48;

/// A validated table name, with its schema if one was given.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    schema: Option<String>,
    name: String,
}

impl Table {
    /// `table` or `schema.table`, each of letters, digits and `_`, not starting with a digit, of at most 48 bytes.
    /// Anything else is `InvalidConfig`. Case is kept: names are quoted in statements.
    pub fn parse(text: &str) -> Result<Self> {
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema), name),
            None => (None, text),
        };
        let valid = |name: &str| {
            name.len() <= MAX_NAME
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
                && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
        };
        if !valid(name) || !schema.is_none_or(valid) {
            return Err(Error::invalid_config(format!(
                "table {:?} is not a name; give table or schema.table, each of at most {MAX_NAME} letters, digits and _",
                Excerpt(text)
            )));
        }
        Ok(Self { schema: schema.map(str::to_owned), name: name.to_owned() })
    }

    /// The name without its schema.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The schema, if one was given.
    pub fn schema(&self) -> Option<&str> {
        self.schema.as_deref()
    }

    /// The name as it was given.
    pub fn full(&self) -> String {
        self.schema.as_ref().map_or_else(|| self.name.clone(), |schema| format!("{schema}.{}", self.name))
    }

    /// The name quoted for statements.
    pub fn quoted(&self, dialect: Dialect) -> String {
        let name = dialect.quote(&self.name);
        match &self.schema {
            Some(schema) => format!("{}.{name}", dialect.quote(schema)),
            None => name,
        }
    }

    /// Where PostgreSQL's NOTIFY tells that there are new rows. Without the schema: it would be too long for a channel, and
    /// waking the relay of a namesake does no harm.
    pub fn channel(&self) -> &str {
        &self.name
    }

    /// Statements that make the outbox where it is missing, to be run in order. Run twice, they change nothing.
    pub fn outbox_ddl(&self, dialect: Dialect) -> Vec<String> {
        let table = self.quoted(dialect);
        let check = "CHECK (status IN ('pending', 'claimed', 'delivered', 'dead'))";
        match dialect {
            // The two full indexes get a second entry for each row soon after the first, when it is marked.
            Dialect::Postgres => vec![
                format!(
                    "CREATE TABLE IF NOT EXISTS {table} (
  seq BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY WITH (fillfactor = 50),
  event_id TEXT NOT NULL UNIQUE WITH (fillfactor = 50),
  type TEXT NOT NULL,
  event TEXT NOT NULL,
  partition_key TEXT,
  dedupe_key TEXT,
  status TEXT NOT NULL DEFAULT 'pending' {check},
  attempts INTEGER NOT NULL DEFAULT 0,
  visible_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  lease_token TEXT,
  lease_until TIMESTAMPTZ,
  last_error TEXT,
  created_at TIMESTAMPTZ NOT NULL DEFAULT now(),
  delivered_at TIMESTAMPTZ
)"
                ),
                self.dedupe_index(dialect),
                self.index(dialect, "unfinished", "seq", Some("status = 'pending'")),
                self.index(dialect, "claims", "seq", Some("status = 'claimed'")),
                self.index(dialect, "dead", "seq", Some(DEAD)),
            ],
            Dialect::Sqlite => vec![
                format!(
                    "CREATE TABLE IF NOT EXISTS {table} (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id TEXT NOT NULL UNIQUE,
  type TEXT NOT NULL,
  event TEXT NOT NULL,
  partition_key TEXT,
  dedupe_key TEXT,
  status TEXT NOT NULL DEFAULT 'pending' {check},
  attempts INTEGER NOT NULL DEFAULT 0,
  visible_at INTEGER NOT NULL DEFAULT ({now}),
  lease_token TEXT,
  lease_until INTEGER,
  last_error TEXT,
  created_at INTEGER NOT NULL DEFAULT ({now}),
  delivered_at INTEGER
)",
                    now = dialect.now()
                ),
                self.dedupe_index(dialect),
                self.index(dialect, "unfinished", "seq", Some(UNFINISHED)),
                self.index(dialect, "dead", "seq", Some(DEAD)),
            ],
            // Indexes stand inside: MySQL knows no CREATE INDEX IF NOT EXISTS, and no partial ones. A unique index
            // takes any number of NULLs. dedupe_key is binary, because every collation that both MySQL and MariaDB
            // know takes "a" and "a " for the same.
            Dialect::MySql => vec![format!(
                "CREATE TABLE IF NOT EXISTS {table} (
  seq BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
  event_id VARCHAR({MAX_ID}) NOT NULL,
  type VARCHAR({MAX_ID}) NOT NULL,
  event LONGTEXT NOT NULL,
  partition_key VARCHAR({MAX_KEY}) NULL,
  dedupe_key VARBINARY({MAX_KEY}) NULL,
  status VARCHAR(16) NOT NULL DEFAULT 'pending' {check},
  attempts INT NOT NULL DEFAULT 0,
  visible_at DATETIME(6) NOT NULL DEFAULT ({now}),
  lease_token VARCHAR({MAX_ID}) NULL,
  lease_until DATETIME(6) NULL,
  last_error TEXT NULL,
  created_at DATETIME(6) NOT NULL DEFAULT ({now}),
  delivered_at DATETIME(6) NULL,
  UNIQUE KEY {event_id} (event_id),
  UNIQUE KEY {dedupe} (dedupe_key),
  KEY {unfinished} (status, seq)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin",
                now = dialect.now(),
                event_id = self.index_name(dialect, "event_id"),
                dedupe = self.index_name(dialect, "dedupe"),
                unfinished = self.index_name(dialect, "unfinished"),
            )],
        }
    }

    /// Statements that make the inbox where it is missing. Run twice, they change nothing.
    pub fn inbox_ddl(&self, dialect: Dialect) -> Vec<String> {
        let table = self.quoted(dialect);
        let now = dialect.now();
        match dialect {
            Dialect::Postgres => vec![
                format!(
                    "CREATE TABLE IF NOT EXISTS {table} (
  consumer TEXT NOT NULL,
  event_id TEXT NOT NULL,
  processed_at TIMESTAMPTZ NOT NULL DEFAULT {now},
  PRIMARY KEY (consumer, event_id)
)"
                ),
                self.index(dialect, "age", "processed_at", None),
            ],
            Dialect::Sqlite => vec![
                format!(
                    "CREATE TABLE IF NOT EXISTS {table} (
  consumer TEXT NOT NULL,
  event_id TEXT NOT NULL,
  processed_at INTEGER NOT NULL DEFAULT ({now}),
  PRIMARY KEY (consumer, event_id)
) WITHOUT ROWID"
                ),
                self.index(dialect, "age", "processed_at", None),
            ],
            Dialect::MySql => vec![format!(
                "CREATE TABLE IF NOT EXISTS {table} (
  consumer VARCHAR({MAX_ID}) NOT NULL,
  event_id VARCHAR({MAX_ID}) NOT NULL,
  processed_at DATETIME(6) NOT NULL DEFAULT ({now}),
  PRIMARY KEY (consumer, event_id),
  KEY {age} (processed_at)
) ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 COLLATE=utf8mb4_bin",
                age = self.index_name(dialect, "age"),
            )],
        }
    }

    /// Asks for every column of the outbox and for no row. It fails if and only if the table is missing, of another
    /// version, or not readable.
    pub fn outbox_check(&self, dialect: Dialect, style: Style) -> Statement {
        self.check(dialect, style, OUTBOX_COLUMNS)
    }

    /// The same for the inbox.
    pub fn inbox_check(&self, dialect: Dialect, style: Style) -> Statement {
        self.check(dialect, style, INBOX_COLUMNS)
    }

    /// What to raise when the check failed, or when a statement failed for want of the table or of a column.
    pub fn missing(&self, dialect: Dialect, whose: &str) -> Error {
        let full = self.full();
        Error::invalid_config(format!(
            "the table {full} is missing in this database, or of another version; run what `polybus outbox ddl --dialect {0}` \
             prints, or the statements of {whose}.ddl(\"{0}\")",
            dialect.name()
        ))
    }

    /// What to raise when the database refused a statement because its user lacks a right. `rights`: what the statement
    /// needs on the table.
    pub fn denied(&self, dialect: Dialect, rights: &str) -> Error {
        let message = match dialect {
            Dialect::Sqlite => format!(
                "the file with the table {} takes no writes on this connection; check the rights on the file and its folder, \
                 and whether it is opened read-only",
                self.full()
            ),
            Dialect::Postgres | Dialect::MySql => format!(
                "the user of this connection lacks a right on the table {}, on which it needs {rights}; run: {}",
                self.full(),
                self.grant(dialect, rights, None)
            ),
        };
        Error::new(ErrorKind::AuthFailed, message)
    }

    /// What to raise when the database, or the transaction, takes no writes.
    pub fn read_only(&self) -> Error {
        Error::connection_failed(format!(
            "the database takes no writes into the table {} here: it is a replica, or it, the user or the transaction is \
             set to read only; connect to the primary, and try again after a failover",
            self.full()
        ))
    }

    /// The statements that give `rights` on the table.
    pub fn grant(&self, dialect: Dialect, rights: &str, user: Option<&str>) -> String {
        let quoted = |user: &str| match dialect {
            Dialect::MySql => format!("'{}'", user.replace('\'', "''")),
            Dialect::Postgres | Dialect::Sqlite => format!("\"{}\"", user.replace('"', "\"\"")),
        };
        let user = user.map_or_else(|| "the_user".to_owned(), quoted);
        let table = format!("GRANT {rights} ON {} TO {user}", self.quoted(dialect));
        match &self.schema {
            Some(schema) if dialect == Dialect::Postgres => {
                format!("GRANT USAGE ON SCHEMA {} TO {user}; {table}", dialect.quote(schema))
            }
            _ => table,
        }
    }

    fn check(&self, dialect: Dialect, style: Style, columns: &str) -> Statement {
        let mut sql = Sql::new(dialect, style);
        sql.push("SELECT ").push(columns).push(" FROM ").push(&self.quoted(dialect)).push(" WHERE 1 = 0");
        sql.finish()
    }

    fn dedupe_index(&self, dialect: Dialect) -> String {
        let index = self.index(dialect, "dedupe", "dedupe_key", Some("dedupe_key IS NOT NULL"));
        index.replacen("CREATE INDEX", "CREATE UNIQUE INDEX", 1)
    }

    /// An index is in its table's schema: PostgreSQL wants the schema before the table, SQLite before the index.
    fn index(&self, dialect: Dialect, suffix: &str, columns: &str, filter: Option<&str>) -> String {
        let (mut name, mut table) = (self.index_name(dialect, suffix), self.quoted(dialect));
        if let (Dialect::Sqlite, Some(schema)) = (dialect, &self.schema) {
            name = format!("{}.{name}", dialect.quote(schema));
            table = dialect.quote(&self.name);
        }
        let filter = filter.map_or(String::new(), |filter| format!(" WHERE {filter}"));
        format!("CREATE INDEX IF NOT EXISTS {name} ON {table} ({columns}){filter}")
    }

    fn index_name(&self, dialect: Dialect, suffix: &str) -> String {
        dialect.quote(&format!("{}_{suffix}", self.name))
    }
}

/// Rows that a relay still has to look at. It walks them in order of `seq`, and needs no other index: those of one key
/// stand on the same way (`relay/sql.rs`), and every index more is paid for by each row three times.
const UNFINISHED: &str = "status IN ('pending', 'claimed')";
/// Rows for people to look at. A row that is delivered never enters this index.
const DEAD: &str = "status = 'dead'";
