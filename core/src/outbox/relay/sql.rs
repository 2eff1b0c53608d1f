//! The relay's statements.
//!
//! All of them walk the unfinished rows in order of `seq`, over one partial index. Claiming looks at a **window**, the
//! first so many unfinished rows, and decides everything inside it:
//!
//! - `due`: it may be claimed now: it is visible, and nobody has it, or whoever claimed it let the lease run out;
//! - `held`: the keys of rows that are not due, because somebody has them or they wait for a retry. Nothing of such a key
//!   that comes later is taken;
//! - `pick`: the first due rows that no `held` row stands before.
//!
//! So the order of a key needs no lock that outlives the statement and no index of its own: a row that stands earlier is
//! unfinished in our snapshot and in the window, and either ours, or it holds its key back. What another relay finishes
//! after our snapshot holds a key back for one round more than needed.
//!
//! What a claim is differs: in PostgreSQL a record ([`super::record`]), elsewhere a mark on each row.
//!
//! The text holds no `%`, `?` and `:`, as [`Sql::push`] wants, and numbers travel as lists in one parameter, or in the text
//! where the dialect has no lists: any driver can run it.

use super::store::Verdict;
use crate::outbox::dialect::{Dialect, Style};
use crate::outbox::statement::{Sql, Statement};
use crate::outbox::table::Table;

/// What the statements are about.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    pub table: Table,
    pub dialect: Dialect,
    pub style: Style,
}

/// What to claim.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// Nothing unfinished has a lower `seq`.
    pub floor: i64,
    /// How many unfinished rows to look at.
    pub window: i64,
    pub batch: i64,
    pub lease_ms: i64,
    pub token: &'a str,
}

impl Writer {
    pub(super) fn sql(&self) -> Sql {
        Sql::new(self.dialect, self.style)
    }

    pub(super) fn table(&self) -> String {
        self.table.quoted(self.dialect)
    }

    /// Where the dialect locks rows; the others have one writer at a time.
    pub(super) fn locks(&self) -> &'static str {
        match self.dialect {
            Dialect::Sqlite => "",
            Dialect::Postgres | Dialect::MySql => " FOR UPDATE SKIP LOCKED",
        }
    }

    /// `seq` is one of these.
    pub(super) fn among(&self, sql: &mut Sql, seqs: &[i64]) {
        let list = seqs.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        match self.dialect {
            Dialect::Postgres => {
                sql.push("seq = ANY(CAST(string_to_array(").bind(list).push(", ',') AS BIGINT[]))");
            }
            Dialect::Sqlite => {
                sql.push("seq IN (SELECT value FROM json_each(").bind(format!("[{list}]")).push("))");
            }
            Dialect::MySql => {
                sql.push("seq IN (").push(&list).push(")");
            }
        }
    }

    /// Claims rows and answers with `seq, attempts, partition_key, event` of each, in any order. SQLite only, which has one
    /// writer at a time: nobody can be faster. Elsewhere it takes more than one statement: [`super::record`],
    /// [`super::mysql_claim`].
    pub fn claim(&self, wanted: Wanted<'_>) -> Statement {
        let mut sql = self.sql();
        sql.push("WITH win AS (SELECT seq, partition_key, CASE WHEN status = 'pending' THEN visible_at <= ");
        sql.now().push(" ELSE lease_until <= ").now().push(" END AS due FROM ").push(&self.table());
        sql.push(" WHERE status IN ('pending', 'claimed') AND seq >= ").bind(wanted.floor);
        sql.push(" ORDER BY seq LIMIT ").bind(wanted.window);
        sql.push("), held AS (SELECT partition_key, min(seq) AS first FROM win WHERE NOT due AND partition_key IS NOT NULL GROUP BY partition_key)");
        sql.push(", pick AS (SELECT w.seq AS seq FROM win w LEFT JOIN held h ON h.partition_key = w.partition_key WHERE w.due AND (h.first IS NULL OR w.seq < h.first) ORDER BY w.seq LIMIT ");
        sql.bind(wanted.batch).push(") UPDATE ").push(&self.table()).push(" SET status = 'claimed', lease_token = ");
        sql.bind(wanted.token).push(", lease_until = ").now_plus(wanted.lease_ms);
        sql.push(" WHERE seq IN (SELECT seq FROM pick) RETURNING seq, attempts, partition_key, event");
        sql.finish()
    }

    /// What its user lacks of the rights that relaying takes, as a list or NULL, and who that is. PostgreSQL only. Rights
    /// on columns count: whether they are enough is seen when they are used.
    pub fn lacking(&self) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT string_agg(r, ', '), CAST(current_user AS TEXT) FROM (SELECT CAST(CAST(");
        sql.bind(self.table()).push(" AS TEXT) AS regclass) AS t) o, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS r WHERE NOT CASE r WHEN 'DELETE' THEN has_table_privilege(t, r) ELSE has_any_column_privilege(t, r) END");
        sql.finish()
    }

    /// How many unfinished rows there are, counted up to `window`.
    pub fn open(&self, floor: i64, window: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT count(*) FROM (SELECT 1 FROM ").push(&self.table());
        sql.push(" WHERE status IN ('pending', 'claimed') AND seq >= ")
            .bind(floor)
            .push(" LIMIT ")
            .bind(window)
            .push(") w");
        sql.finish()
    }

    /// Ends our claim on these rows: they are delivered. `again`: a first try got no answer, and may have worked.
    pub fn delivered(&self, token: &str, seqs: &[i64], again: bool) -> Statement {
        let mut sql = self.sql();
        sql.push("UPDATE ").push(&self.table()).push(" SET status = 'delivered', delivered_at = ").now();
        // The token stays, so that a second try finds what the first did.
        sql.push(", lease_until = NULL WHERE ");
        self.among(&mut sql, seqs);
        sql.push(" AND lease_token = ").bind(token);
        sql.push(if again { " AND status IN ('claimed', 'delivered')" } else { " AND status = 'claimed'" });
        sql.finish()
    }

    /// Ends our claim on these rows: they are pending as before, no attempt is counted.
    pub fn give_back(&self, token: &str, seqs: &[i64]) -> Statement {
        let mut sql = self.sql();
        sql.push("UPDATE ").push(&self.table());
        sql.push(" SET status = 'pending', lease_token = NULL, lease_until = NULL WHERE ");
        self.among(&mut sql, seqs);
        sql.push(" AND lease_token = ").bind(token).push(" AND status = 'claimed'");
        sql.finish()
    }

    /// Ends our claim on one row that was not published: an attempt more, and another one later, or none.
    pub fn failed(&self, token: &str, verdict: &Verdict) -> Statement {
        let mut sql = self.sql();
        let status = if verdict.retry.is_some() { "pending" } else { "dead" };
        let wait = verdict.retry.map_or(0, |wait| i64::try_from(wait.as_millis()).unwrap_or(i64::MAX / 2));
        sql.push("UPDATE ").push(&self.table()).push(" SET status = ").bind(status);
        sql.push(", attempts = attempts + 1, lease_token = NULL, lease_until = NULL, visible_at = ").now_plus(wait);
        sql.push(", last_error = ").bind(verdict.error.as_str());
        sql.push(" WHERE seq = ").bind(verdict.seq);
        sql.push(" AND lease_token = ").bind(token).push(" AND status = 'claimed'");
        sql.finish()
    }

    /// Holds our claim on these rows for another lease.
    pub fn extend(&self, token: &str, seqs: &[i64], lease_ms: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("UPDATE ").push(&self.table()).push(" SET lease_until = ").now_plus(lease_ms).push(" WHERE ");
        self.among(&mut sql, seqs);
        sql.push(" AND lease_token = ").bind(token).push(" AND status = 'claimed'");
        sql.finish()
    }

    /// Rows by state: unfinished, of those claimed, of those waiting for a retry; dead; age in milliseconds of the
    /// oldest that is unfinished.
    pub fn stats(&self) -> Statement {
        let mut sql = self.sql();
        let table = self.table();
        let (claimed, unfinished) = match self.dialect {
            Dialect::Postgres => (self.held_by_records(), "'pending'"),
            Dialect::Sqlite | Dialect::MySql => {
                ("count(CASE WHEN status = 'claimed' THEN 1 END)".into(), "'pending', 'claimed'")
            }
        };
        sql.push("SELECT count(*), ").push(&claimed);
        sql.push(", count(CASE WHEN status = 'pending' AND visible_at > ");
        sql.now().push(" THEN 1 END), (SELECT count(*) FROM ").push(&table).push(" WHERE status = 'dead'), ");
        self.millis(&mut sql, "min(created_at)", true);
        sql.push(" FROM ").push(&table).push(&format!(" WHERE status IN ({unfinished})"));
        sql.finish()
    }

    /// A time as milliseconds since 1970, or since then until now.
    fn millis(&self, sql: &mut Sql, time: &str, age: bool) {
        match (self.dialect, age) {
            (Dialect::Postgres, true) => {
                sql.push("CAST(EXTRACT(EPOCH FROM (now() - ").push(time).push(")) * 1000 AS BIGINT)");
            }
            (Dialect::Postgres, false) => {
                sql.push("CAST(EXTRACT(EPOCH FROM ").push(time).push(") * 1000 AS BIGINT)");
            }
            (Dialect::Sqlite, true) => {
                sql.now().push(" - ").push(time);
            }
            (Dialect::Sqlite, false) => {
                sql.push(time);
            }
            (Dialect::MySql, true) => {
                sql.push("TIMESTAMPDIFF(MICROSECOND, ").push(time).push(", UTC_TIMESTAMP(6)) DIV 1000");
            }
            (Dialect::MySql, false) => {
                sql.push("TIMESTAMPDIFF(MICROSECOND, '1970-01-01', ").push(time).push(") DIV 1000");
            }
        }
    }

    /// Dead rows in order: `seq, event_id, type, event, partition_key, attempts, last_error`, when they were made, and
    /// when they died.
    pub fn dead(&self, after: i64, limit: i64) -> Statement {
        let mut sql = self.sql();
        let integer = if self.dialect == Dialect::MySql { "SIGNED" } else { "BIGINT" };
        sql.push("SELECT seq, event_id, type, event, partition_key, CAST(attempts AS ").push(integer);
        sql.push("), last_error, ");
        self.millis(&mut sql, "created_at", false);
        sql.push(", ");
        self.millis(&mut sql, "visible_at", false);
        sql.push(" FROM ").push(&self.table()).push(" WHERE status = 'dead' AND seq > ").bind(after);
        sql.push(" ORDER BY seq LIMIT ").bind(limit);
        sql.finish()
    }

    /// Makes dead rows pending again, attempts from 1: that of one event, or the first so many. They take new places at
    /// the end, because nothing unfinished may appear behind what relays have proven to be finished.
    pub fn replay(&self, event_id: Option<&str>, limit: i64) -> Statement {
        let mut sql = self.sql();
        let place = if self.dialect == Dialect::Postgres { ", seq = DEFAULT" } else { "" };
        sql.push("UPDATE ").push(&self.table());
        sql.push(" SET status = 'pending', attempts = 0, last_error = NULL, visible_at = ").now().push(place);
        self.dead_ones(&mut sql, event_id, limit);
        sql.finish()
    }

    /// Removes dead rows likewise.
    pub fn purge_dead(&self, event_id: Option<&str>, limit: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("DELETE FROM ").push(&self.table());
        self.dead_ones(&mut sql, event_id, limit);
        sql.finish()
    }

    fn dead_ones(&self, sql: &mut Sql, event_id: Option<&str>, limit: i64) {
        match event_id {
            Some(id) => {
                sql.push(" WHERE status = 'dead' AND event_id = ").bind(id);
            }
            None if self.dialect == Dialect::MySql => {
                sql.push(" WHERE status = 'dead' ORDER BY seq LIMIT ").bind(limit);
            }
            None => {
                sql.push(" WHERE status = 'dead' AND seq IN (SELECT seq FROM ").push(&self.table());
                sql.push(" WHERE status = 'dead' ORDER BY seq LIMIT ").bind(limit).push(self.locks()).push(")");
            }
        }
    }

    /// Of the `page` rows after `after`: the last `seq`, how many there are, and how many of them were made before.
    pub fn page(&self, after: i64, page: i64, older_than_ms: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT coalesce(max(seq), 0), count(*), count(CASE WHEN created_at < ").now_plus(-older_than_ms);
        sql.push(" THEN 1 END) FROM (SELECT seq, created_at FROM ").push(&self.table());
        sql.push(" WHERE seq > ").bind(after).push(" ORDER BY seq LIMIT ").bind(page).push(") p");
        sql.finish()
    }

    /// Removes what was delivered before, in this range of `seq`.
    pub fn purge(&self, after: i64, last: i64, older_than_ms: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("DELETE FROM ").push(&self.table()).push(" WHERE seq > ").bind(after).push(" AND seq <= ").bind(last);
        sql.push(" AND status = 'delivered' AND delivered_at < ").now_plus(-older_than_ms);
        sql.finish()
    }

    /// The highest `seq` that is visible, and who may be inserting at this moment. See [`super::floor`].
    pub fn horizon(&self) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT coalesce((SELECT max(seq) FROM ").push(&self.table());
        sql.push("), 0), (SELECT string_agg(virtualtransaction, ',') FROM pg_locks WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid() AND relation = CAST(CAST(");
        sql.bind(self.table()).push(
            " AS TEXT) AS regclass) AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))",
        );
        sql.finish()
    }

    /// How many of these transactions are not over.
    pub fn running(&self, transactions: &str) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT count(*) FROM pg_locks WHERE virtualtransaction = ANY(string_to_array(");
        sql.bind(transactions).push(", ','))");
        sql.finish()
    }

    /// The first unfinished `seq` from `floor` to `below`, or `below`. PostgreSQL only.
    pub fn first(&self, floor: i64, below: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT coalesce((SELECT seq FROM ").push(&self.table());
        sql.push(" WHERE status = 'pending' AND seq >= ").bind(floor).push(" AND seq < ").bind(below);
        sql.push(" ORDER BY seq LIMIT 1), ").bind(below).push(")");
        sql.finish()
    }
}

/// Tells relays that listen, on whatever machine, that there is something to do. For after a commit: within the
/// transaction it would make all committing writers of the database wait for each other. PostgreSQL only.
pub fn wake(table: &Table, style: Style) -> Statement {
    let mut sql = Sql::new(Dialect::Postgres, style);
    sql.push("SELECT pg_notify(").bind(table.channel()).push(", '')");
    sql.finish()
}
