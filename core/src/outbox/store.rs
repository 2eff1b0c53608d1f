//! Events become rows of the outbox: many in one statement, those that are there already absorbed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use super::dialect::{Dialect, Style};
use super::relay;
use super::statement::{Sql, Statement};
use super::table::{MAX_ID, MAX_KEY, OUTBOX, Table};
use crate::codec;
use crate::error::{Error, Result};
use crate::event::{Event, Text};
use crate::process;

/// Most rows in one statement: databases limit how many parameters one has.
pub const MAX_ROWS: usize = 1000;
/// Bytes of events after which a further one goes into the next statement: servers limit how large one may be.
const MAX_BYTES: usize = 8 << 20;

/// Between two wakes, in milliseconds: a relay that was woken reads the table until it is empty, so more is work for nothing.
const GAP: i64 = 10;

/// Options of an outbox.
#[derive(Debug, Clone)]
pub struct OutboxOptions {
    /// `table` or `schema.table`. Default [`OUTBOX`].
    pub table: String,
    /// Name of the service: `source` of events that have none. Default none: the relay's service becomes the source.
    pub service: Option<String>,
    /// Largest payload in bytes. Default 1 MiB, as on a bus.
    pub max_payload_bytes: usize,
}

impl Default for OutboxOptions {
    fn default() -> Self {
        Self { table: OUTBOX.into(), service: None, max_payload_bytes: codec::DEFAULT_MAX_PAYLOAD }
    }
}

/// What to store: an event and, if it is not the event's idempotency key, what makes another event the same one.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The event.
    pub event: Event,
    /// Default the event's idempotency key. An empty one is none.
    pub dedupe_key: Option<Text>,
}

impl From<Event> for Entry {
    fn from(event: Event) -> Self {
        Self { dedupe_key: event.meta.idempotency_key.clone(), event }
    }
}

/// Renders inserts into one outbox table.
#[derive(Debug, Clone)]
pub struct Outbox {
    table: Table,
    source: Option<Text>,
    limit: usize,
    /// When relays may be woken again.
    quiet_until: Arc<AtomicI64>,
}

/// One statement that stores events, and how to learn which of them were absorbed.
#[derive(Debug, Clone)]
pub struct Insert {
    /// Stores the events that are new. Where `confirm` is none, it returns the ids of those as rows.
    pub statement: Statement,
    /// To be run next on the same connection: returns the ids of the events that were stored. MySQL only, which has no
    /// `RETURNING`.
    pub confirm: Option<Statement>,
    ids: Vec<Text>,
}

impl Insert {
    /// The ids of the events, in the order given.
    pub fn ids(&self) -> &[Text] {
        &self.ids
    }

    /// Whether each event was stored (`true`) or absorbed, in the order given, by the ids that the database returned.
    pub fn stored<'a>(&self, returned: impl IntoIterator<Item = &'a str>) -> Vec<bool> {
        let mut left: HashMap<&str, usize> = HashMap::new();
        for id in returned {
            *left.entry(id).or_default() += 1;
        }
        // An event that was given twice is returned once.
        let take = |id: &Text| left.get_mut(&**id).is_some_and(|count| std::mem::take(count) > 0);
        self.ids.iter().map(take).collect()
    }
}

impl Outbox {
    /// `InvalidConfig` for a table that is not a name.
    pub fn new(options: &OutboxOptions) -> Result<Self> {
        let source = options.service.as_deref().filter(|service| !service.is_empty()).map(Text::from);
        let (table, quiet_until) = (Table::parse(&options.table)?, Arc::new(AtomicI64::new(i64::MIN)));
        Ok(Self { table, source, limit: options.max_payload_bytes, quiet_until })
    }

    /// The table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// What tells relays that listen, on whatever machine, that rows were committed. None if they were told a moment ago,
    /// by `now`, in milliseconds of a clock that only goes forward. PostgreSQL only; run it after the commit: within the
    /// transaction it would make all committing writers of the database wait for each other.
    pub fn wake(&self, style: Style, now: i64) -> Option<Statement> {
        let due = |until: i64| (now >= until).then_some(now.saturating_add(GAP));
        self.quiet_until.fetch_update(Ordering::Relaxed, Ordering::Relaxed, due).ok()?;
        Some(relay::wake(&self.table, style))
    }

    /// Statements that store `entries`: one for up to 1,000 events of together 8 MiB.
    ///
    /// `PayloadTooLarge` and `InvalidEvent` (a key that is too long for an index) before anything is rendered: all
    /// events are stored, or none.
    pub fn insert(&self, dialect: Dialect, style: Style, entries: Vec<Entry>) -> Result<Vec<Insert>> {
        let rows = entries.into_iter().map(|entry| self.row(entry)).collect::<Result<Vec<_>>>()?;
        let mut inserts = Vec::new();
        let mut rest = &rows[..];
        while !rest.is_empty() {
            let mut bytes = 0;
            let fits = |row: &&Row| {
                let fits = bytes == 0 || bytes + row.event.len() <= MAX_BYTES;
                bytes += row.event.len();
                fits
            };
            let count = rest.iter().take(MAX_ROWS).take_while(fits).count();
            let (now, later) = rest.split_at(count);
            inserts.push(self.render(dialect, style, now));
            rest = later;
        }
        Ok(inserts)
    }

    /// The text that stores one [`Row`] and returns nothing: whether it changed a row says whether the event was stored.
    /// For hosts that keep the text, and ask for no more than the values of each event. None for MySQL, where the number
    /// of changed rows says nothing.
    pub fn one(&self, dialect: Dialect, style: Style) -> Option<String> {
        if dialect == Dialect::MySql {
            return None;
        }
        let mut sql = self.begin(dialect, style, false);
        sql.push("(").bind_all(ROW).push(") ON CONFLICT DO NOTHING");
        Some(sql.finish().sql)
    }

    /// What [`Outbox::one`] stores. Errors as those of [`Outbox::insert`].
    pub fn row(&self, entry: Entry) -> Result<Row> {
        let Entry { mut event, dedupe_key } = entry;
        if event.payload.len() > self.limit {
            codec::check_payload(&event.payload, self.limit)?;
        }
        // As a publish does: afterwards the relay's process would seem to be where the event came from.
        let lacks_source = event.meta.source.is_none() && self.source.is_some();
        if lacks_source || event.meta.instance_id.is_none() {
            let instance = process::current().instance_id.clone();
            let source = self.source.clone();
            let meta = event.meta_mut();
            meta.instance_id.get_or_insert(instance);
            meta.source = meta.source.take().or(source);
        }
        let dedupe_key = dedupe_key.filter(|key| !key.is_empty());
        check("id", &event.meta.id, MAX_ID)?;
        if let Some(key) = event.meta.lane() {
            check("partition key", key, MAX_KEY)?;
        }
        if let Some(key) = &dedupe_key {
            check("dedupe key", key, MAX_KEY)?;
        }
        let wire = String::from_utf8(codec::encode(&event)?)
            .map_err(|cause| Error::invalid_event("the event is not UTF-8 text").caused_by(cause))?;
        Ok(Row { meta: event, event: wire, dedupe_key })
    }

    /// An insert as far as its values.
    fn begin(&self, dialect: Dialect, style: Style, marked: bool) -> Sql {
        let mut sql = Sql::new(dialect, style);
        sql.push("INSERT INTO ").push(&self.table.quoted(dialect));
        sql.push(" (event_id, type, event, partition_key, dedupe_key");
        sql.push(if marked { ", lease_token) VALUES " } else { ") VALUES " });
        sql
    }

    fn render(&self, dialect: Dialect, style: Style, rows: &[Row]) -> Insert {
        // Where the statement cannot return what it stored, it leaves a mark in a column that only a claimed row uses.
        let token = (dialect == Dialect::MySql).then(|| uuid::Uuid::now_v7().simple().to_string());
        let mut sql = self.begin(dialect, style, token.is_some());
        for (index, row) in rows.iter().enumerate() {
            sql.push(if index == 0 { "(" } else { ", (" });
            sql.bind_all(row.values());
            if let Some(token) = &token {
                sql.push(", ").bind(&**token);
            }
            sql.push(")");
        }
        // INSERT IGNORE would turn every error into a warning, not only a key that is there.
        sql.push(match dialect {
            Dialect::MySql => " ON DUPLICATE KEY UPDATE seq = seq",
            Dialect::Postgres | Dialect::Sqlite => " ON CONFLICT DO NOTHING RETURNING event_id",
        });
        let confirm = token.map(|token| {
            let mut sql = Sql::new(dialect, style);
            sql.push("SELECT event_id FROM ").push(&self.table.quoted(dialect)).push(" WHERE event_id IN (");
            sql.bind_all(rows.iter().map(|row| &*row.meta.meta.id)).push(") AND lease_token = ").bind(token);
            sql.finish()
        });
        let ids = rows.iter().map(|row| row.meta.meta.id.clone()).collect();
        Insert { statement: sql.finish(), confirm, ids }
    }
}

/// An event as a row.
#[derive(Debug)]
pub struct Row {
    meta: Event,
    event: String,
    dedupe_key: Option<Text>,
}

/// So many values has a [`Row`].
const ROW: [Option<&str>; 5] = [None; 5];

impl Row {
    /// Values of the placeholders of [`Outbox::one`]: event_id, type, event, partition_key, dedupe_key.
    pub fn values(&self) -> [Option<&str>; 5] {
        let lane = self.meta.meta.lane().map(|key| &**key);
        let event_type = self.meta.event_type.as_str();
        [Some(&self.meta.meta.id), Some(event_type), Some(&self.event), lane, self.dedupe_key.as_deref()]
    }
}

/// Text that every dialect can index. Longer text would be refused by one database and cut by another.
pub(super) fn check(what: &str, text: &str, most: usize) -> Result<()> {
    if text.len() > most {
        return Err(Error::invalid_event(format!(
            "the {what} has {} bytes; the tables hold {most}: give a shorter one, or a hash of it",
            text.len()
        )));
    }
    if text.contains('\0') {
        return Err(Error::invalid_event(format!("the {what} holds a NUL character, which databases refuse in text")));
    }
    Ok(())
}
