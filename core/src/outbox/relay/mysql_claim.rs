//! Claiming in MySQL and MariaDB, which have no `RETURNING` for it. What [`super::sql`] says of windows and keys holds here.
//!
//! Three statements, each a transaction of its own, so that any driver can run them, and no lock outlives one:
//!
//! 1. [`Writer::pick`] reads without locks: the rows to claim, their events, and what time it is. It walks the index once
//!    for each of the two states: an `IN` over both would sort all that is unfinished.
//! 2. [`Writer::take`] marks them, by primary key, which locks these rows and no gaps in any isolation level. Rows that
//!    somebody has locked are left out. Rows that another relay took, failed or finished since 1 are left out as well:
//!    each of these sets a time that is later than the time of 1, or another state.
//! 3. [`Writer::taken`], only if 2 changed fewer rows than it was given: which ones? What stands behind a row of its key
//!    that was missed is given back before anybody publishes it.
//!
//! The subquery of 2 has a `LIMIT` that changes nothing, or MySQL would merge it into the UPDATE, and the order of its
//! tables is given: the other way round the UPDATE would go over the table and wait for every lock on it.

use super::sql::{Wanted, Writer};
use crate::outbox::dialect::Dialect;
use crate::outbox::statement::Statement;

impl Writer {
    /// What to claim: `seq, attempts, partition_key, event` of each row in order, one more than were wanted; then how deep in
    /// the window it stands, how many rows that holds, and the time. The first row of the window is always there; without
    /// its event, if it is not to be claimed.
    pub fn pick(&self, wanted: Wanted<'_>) -> Statement {
        let mut sql = self.sql();
        let table = self.table();
        let index = Dialect::MySql.quote(&format!("{}_unfinished", self.table.name()));
        sql.push("SELECT p.seq, CAST(t.attempts AS SIGNED), p.partition_key, CASE WHEN p.ready THEN t.event END, p.depth, p.total, CAST(UTC_TIMESTAMP(6) AS CHAR) FROM (");
        sql.push(
            "SELECT seq, partition_key, depth, total, (due AND (partition_key IS NULL OR NOT held)) AS ready FROM (",
        );
        sql.push("SELECT seq, partition_key, due, max(NOT due) OVER (PARTITION BY partition_key ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW) AS held, row_number() OVER (ORDER BY seq) AS depth, count(*) OVER () AS total FROM (");
        for (state, time, between) in [("claimed", "lease_until", " UNION ALL "), ("pending", "visible_at", "")] {
            sql.push("(SELECT seq, partition_key, ").push(time).push(" <= ").now().push(" AS due FROM ").push(&table);
            sql.push(" FORCE INDEX (").push(&index).push(") WHERE status = '").push(state).push("'");
            if wanted.floor > 0 {
                sql.push(" AND seq >= ").bind(wanted.floor);
            }
            sql.push(" ORDER BY seq LIMIT ").bind(wanted.window).push(")").push(between);
        }
        sql.push(" ORDER BY seq LIMIT ").bind(wanted.window).push(") w) v");
        sql.push(" WHERE depth = 1 OR (due AND (partition_key IS NULL OR NOT held)) ORDER BY seq LIMIT ");
        sql.bind(wanted.batch + 1).push(") p JOIN ").push(&table).push(" t ON t.seq = p.seq ORDER BY p.seq");
        sql.finish()
    }

    /// Claims what was picked at that time.
    pub fn take(&self, wanted: Wanted<'_>, seqs: &[i64], time: &str) -> Statement {
        let mut sql = self.sql();
        let table = self.table();
        sql.push("UPDATE (SELECT seq FROM ").push(&table);
        sql.push(" FORCE INDEX (PRIMARY) WHERE ");
        self.among(&mut sql, seqs);
        for (state, column, before) in [("pending", "visible_at", " AND CASE"), ("claimed", "lease_until", "")] {
            sql.push(before).push(" WHEN status = '").push(state).push("' THEN ").push(column);
            sql.push(" <= CAST(").bind(time).push(" AS DATETIME(6))");
        }
        sql.push(" ELSE false END LIMIT ").bind(seqs.len() as i64).push(self.locks());
        sql.push(") p STRAIGHT_JOIN ").push(&table).push(" t FORCE INDEX (PRIMARY) ON t.seq = p.seq");
        sql.push(" SET t.status = 'claimed', t.lease_token = ").bind(wanted.token);
        sql.push(", t.lease_until = ").now_plus(wanted.lease_ms);
        sql.finish()
    }

    /// Which of them are ours.
    pub fn taken(&self, token: &str, seqs: &[i64]) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT seq FROM ").push(&self.table()).push(" WHERE ");
        self.among(&mut sql, seqs);
        sql.push(" AND lease_token = ").bind(token).push(" AND status = 'claimed'");
        sql.finish()
    }
}
