//! The tables, and opening a file that holds them.
//!
//! * `polybus_meta`: `boot_id`; `head` ([`super::publish::head`]).
//! * `polybus_buses`: the logical buses of the file.
//! * `polybus_events`: the log. `seq` is the position; SQLite has one writer at a time, so a commit with a larger `seq`
//!   never becomes visible before one with a smaller, and a plain cursor misses nothing. Positions are never used
//!   again ([`super::publish::head`]) and have no gaps, except where retention removed the oldest.
//! * `polybus_delayed`: published with a delay; moved into the log when due.
//! * `polybus_groups`: durable groups. Everything at or before `cursor` was taken by somebody or does not match.
//!   At or before `began` nothing was for the group; 0 when an older polybus made it.
//! * `polybus_deliveries`: what was taken and is not finished. With an owner: leased. Without: waiting until `due_at`.
//!   `event` is a copy of its own where the log's may be gone, or shall not expire: replays of dead letters, replays of
//!   events with an expiry, and what the user's limits removed.
//!   In an ordered group `lane` is the partition key; see [`super::lane`].
//! * `polybus_owners`: one row for each member that holds leases; a heartbeat is one update here, however many
//!   deliveries it covers. `lease_until` is boot time, so a reboot voids it (`boot_id` in `polybus_meta`).
//! * `polybus_dead`: dead letters.
//! * `polybus_mail`: replies to requests, until somebody fetches them or their time is over. `polybus_responders`: who
//!   answers requests, and until when that is believed. Both in boot time.
//! * `polybus_marks`: keys of idempotent subscriptions. Without `until`: being handled by the delivery `seq` under `token`, as
//!   long as that is leased. With it: handled, and remembered until then.
//! * `polybus_published`: idempotency keys of what was published, and the first event under each.
//!
//! Times are milliseconds, wall clock unless said otherwise.

use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};

use super::{clock, fault, file};
use crate::error::{Error, Result};

/// Marks a file as ours: "pbus".
const APPLICATION_ID: i32 = 0x7062_7573;
/// Raised with every change of the tables.
const VERSION: i32 = 1;
/// Older versions of SQLite can damage a database when a writer and a checkpoint meet (the WAL-reset bug).
const MIN_SQLITE: i32 = 3_051_003;

const TABLES: &str = "
CREATE TABLE polybus_meta(key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
CREATE TABLE polybus_buses(id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE polybus_events(seq INTEGER PRIMARY KEY, bus INTEGER NOT NULL,
  published_at INTEGER NOT NULL, expires_at INTEGER, type TEXT NOT NULL, event BLOB NOT NULL);
CREATE TABLE polybus_delayed(id INTEGER PRIMARY KEY, bus INTEGER NOT NULL, due_at INTEGER NOT NULL,
  expires_at INTEGER, type TEXT NOT NULL, event BLOB NOT NULL);
CREATE INDEX polybus_delayed_due ON polybus_delayed(bus, due_at);
CREATE TABLE polybus_groups(id INTEGER PRIMARY KEY AUTOINCREMENT, bus INTEGER NOT NULL, name TEXT NOT NULL,
  subscription TEXT NOT NULL, service TEXT NOT NULL, pattern TEXT NOT NULL, cursor INTEGER NOT NULL,
  expired INTEGER NOT NULL DEFAULT 0, created_at INTEGER NOT NULL, last_seen INTEGER NOT NULL, UNIQUE(bus, name));
CREATE TABLE polybus_deliveries(group_id INTEGER NOT NULL, seq INTEGER NOT NULL, owner INTEGER, token INTEGER NOT NULL,
  attempt INTEGER NOT NULL, due_at INTEGER NOT NULL DEFAULT 0, first_failed_at INTEGER, error TEXT,
  replayed_from INTEGER, type TEXT, event BLOB, PRIMARY KEY(group_id, seq)) WITHOUT ROWID;
CREATE INDEX polybus_deliveries_due ON polybus_deliveries(group_id, due_at) WHERE owner IS NULL;
CREATE TABLE polybus_owners(id INTEGER PRIMARY KEY, group_id INTEGER NOT NULL, instance TEXT NOT NULL,
  lease_until INTEGER NOT NULL);
CREATE INDEX polybus_owners_group ON polybus_owners(group_id);
CREATE TABLE polybus_dead(id INTEGER PRIMARY KEY AUTOINCREMENT, bus INTEGER NOT NULL, group_id INTEGER NOT NULL,
  seq INTEGER NOT NULL, type TEXT, event BLOB NOT NULL, error_kind TEXT NOT NULL, error_message TEXT NOT NULL,
  error_stack TEXT NOT NULL, attempts INTEGER NOT NULL, first_failed_at INTEGER NOT NULL,
  last_failed_at INTEGER NOT NULL, subscription TEXT NOT NULL, reason TEXT NOT NULL, replayed_from INTEGER);
CREATE INDEX polybus_dead_group ON polybus_dead(group_id);
";

/// Columns that came later: table, name, declaration. An older polybus does not name them and goes on beside us.
const ADDITIONS: [(&str, &str, &str); 4] = [
    ("polybus_groups", "ordered", "INTEGER NOT NULL DEFAULT 0"),
    ("polybus_groups", "began", "INTEGER NOT NULL DEFAULT 0"),
    ("polybus_deliveries", "lane", "TEXT"),
    ("polybus_dead", "lane", "TEXT"),
];

/// Tables that came later, for a file that has it not: versions that do not know it leave it alone.
const LATER: &str = "
CREATE TABLE IF NOT EXISTS polybus_mail(id INTEGER PRIMARY KEY, mailbox TEXT NOT NULL, letter BLOB NOT NULL,
  expires_at INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS polybus_mail_box ON polybus_mail(mailbox);
CREATE INDEX IF NOT EXISTS polybus_mail_expiry ON polybus_mail(expires_at);
CREATE TABLE IF NOT EXISTS polybus_responders(id INTEGER PRIMARY KEY, group_id INTEGER NOT NULL,
  alive_until INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS polybus_marks(group_id INTEGER NOT NULL, key TEXT NOT NULL, seq INTEGER NOT NULL,
  token INTEGER NOT NULL, since INTEGER NOT NULL, until INTEGER, PRIMARY KEY(group_id, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS polybus_marks_until ON polybus_marks(until) WHERE until IS NOT NULL;
CREATE TABLE IF NOT EXISTS polybus_published(bus INTEGER NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, seq INTEGER,
  until INTEGER NOT NULL, PRIMARY KEY(bus, key)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS polybus_published_until ON polybus_published(until);
";
/// How many tables and indexes of ours [`LATER`] makes.
const LATER_COUNT: i32 = 8;

/// Refuses a SQLite that may damage the file.
pub(super) fn check_library() -> Result<()> {
    if rusqlite::version_number() >= MIN_SQLITE {
        return Ok(());
    }
    Err(Error::invalid_config(format!(
        "polybus was built with SQLite {}, which can damage a shared file; build it with 3.51.3 or newer",
        rusqlite::version()
    )))
}

/// A connection to the file at `path`, which exists.
pub(super) fn connect(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(64);
    // The file may have been written by somebody else: do not run functions its schema names.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    Ok(connection)
}

/// Settings of one connection, once the file is known to be ours.
pub(super) fn tune(connection: &Connection) -> Result<()> {
    connection.execute_batch(
        "PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -8000;
         PRAGMA journal_size_limit = 16777216; PRAGMA synchronous = NORMAL;",
    )?;
    Ok(())
}

/// `synchronous`: with `full` each commit reaches the disk.
pub(super) fn set_full(connection: &Connection, full: bool) -> Result<()> {
    connection.pragma_update(None, "synchronous", if full { "FULL" } else { "NORMAL" })?;
    Ok(())
}

/// Checks that the file is ours, or new; makes the tables; voids the leases of an earlier boot. A file that is not
/// ours, or damaged, or of another version, is `InvalidConfig` and stays as it is. Hold the write lock.
pub(super) fn prepare(connection: &Connection, path: &Path) -> Result<()> {
    // Closing the last connection to a foreign file would otherwise fold its log into it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let fresh = inspect(connection).map_err(|failure| failure.explain(path))?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false)?;
    if fresh {
        connection.pragma_update(None, "page_size", 4096)?;
    }
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(Error::connection_failed(format!(
            "{} cannot use a write-ahead log (journal mode is {mode}); use a local disk that supports shared memory",
            path.display()
        )));
    }
    tune(connection)?;
    let boot = clock::boot_id();
    let known: Option<String> = if fresh { None } else { meta(connection, "boot_id")? };
    let lacking = match fresh {
        true => ADDITIONS.to_vec(),
        false => lacking(connection)?,
    };
    if known.as_deref() == Some(&boot) && lacking.is_empty() && has_later(connection)? {
        return Ok(());
    }
    let tx = Transaction::new_unchecked(connection, TransactionBehavior::Immediate)?;
    if fresh {
        tx.execute_batch(TABLES)?;
        tx.pragma_update(None, "application_id", APPLICATION_ID)?;
        tx.pragma_update(None, "user_version", VERSION)?;
    }
    for (table, column, declaration) in lacking {
        tx.execute(&format!("ALTER TABLE {table} ADD COLUMN {column} {declaration}"), [])?;
    }
    tx.execute_batch(LATER)?;
    if known.as_deref() != Some(&boot) {
        tx.execute("INSERT OR REPLACE INTO polybus_meta(key, value) VALUES('boot_id', ?1)", [&boot])?;
        tx.execute("UPDATE polybus_owners SET lease_until = 0", [])?;
        tx.execute_batch("DELETE FROM polybus_mail; DELETE FROM polybus_responders;")?;
    }
    tx.commit()?;
    Ok(())
}

/// The columns of [`ADDITIONS`] that the file does not have.
fn lacking(connection: &Connection) -> Result<Vec<(&'static str, &'static str, &'static str)>> {
    let mut find = connection.prepare("SELECT EXISTS(SELECT 1 FROM pragma_table_info(?1) WHERE name = ?2)")?;
    let mut lacking = Vec::new();
    for addition in ADDITIONS {
        if !find.query_row((addition.0, addition.1), |row| row.get::<_, bool>(0))? {
            lacking.push(addition);
        }
    }
    Ok(lacking)
}

fn meta(connection: &Connection, key: &str) -> Result<Option<String>> {
    use rusqlite::OptionalExtension;
    Ok(connection.query_row("SELECT value FROM polybus_meta WHERE key = ?1", [key], |row| row.get(0)).optional()?)
}

enum Unfit {
    Sql(rusqlite::Error),
    Foreign,
    Version(i32),
}

impl From<rusqlite::Error> for Unfit {
    fn from(cause: rusqlite::Error) -> Self {
        Self::Sql(cause)
    }
}

impl Unfit {
    fn explain(self, path: &Path) -> Error {
        let path = path.display();
        match self {
            Self::Sql(cause) if fault::is_damage(&cause) => Error::invalid_config(format!(
                "{path} is not an event store, or is damaged ({cause}); it was left as it is, name another file"
            ))
            .caused_by(cause),
            Self::Sql(cause) => cause.into(),
            Self::Foreign => Error::invalid_config(format!(
                "{path} is a SQLite database of another application; it was left as it is, give the event store a file of its own"
            )),
            Self::Version(found) => Error::invalid_config(format!(
                "{path} has event store version {found}, this polybus knows version {VERSION}; use the same version of polybus in all processes"
            )),
        }
    }
}

/// Whether the file is new and empty. Reads only.
fn inspect(connection: &Connection) -> Result<bool, Unfit> {
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i32>(0));
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    let application = number("PRAGMA application_id")?;
    let version = number("PRAGMA user_version")?;
    match (application, version) {
        (0, 0) if tables == 0 => Ok(true),
        (APPLICATION_ID, VERSION) => {
            // Touches a page of each table, so that a truncated or overwritten file is noticed now.
            for table in ["meta", "buses", "events", "delayed", "groups", "deliveries", "owners", "dead"] {
                connection.query_row(&format!("SELECT EXISTS(SELECT 1 FROM polybus_{table})"), [], |_| Ok(()))?;
            }
            Ok(false)
        }
        (APPLICATION_ID, found) => Err(Unfit::Version(found)),
        _ => Err(Unfit::Foreign),
    }
}

/// Opens one more connection to a store that is open already.
pub(super) fn connect_again(path: &Path) -> Result<Connection> {
    let connection = connect(path)?;
    tune(&connection)?;
    Ok(connection)
}

/// The file's mode is checked when it is made; here only that it can be reached at all.
pub(super) fn open_first(path: &Path) -> Result<Connection> {
    file::create(path)?;
    connect(path)
}

/// Whether everything of [`LATER`] is there.
fn has_later(connection: &Connection) -> Result<bool> {
    let count: i32 = connection.query_row(
        "SELECT count(*) FROM sqlite_schema WHERE name IN ('polybus_mail', 'polybus_mail_box', 'polybus_mail_expiry',
         'polybus_responders', 'polybus_marks', 'polybus_marks_until', 'polybus_published', 'polybus_published_until')",
        [],
        |row| row.get(0),
    )?;
    Ok(count == LATER_COUNT)
}
