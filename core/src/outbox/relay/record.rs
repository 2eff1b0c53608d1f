//! Claims in PostgreSQL: records of their own.
//!
//! There a change of a row is a new version of it and a new entry in every index, so claiming a thousand rows by changing
//! them costs as much as marking them. Here a claim is one more row of the table: status `claimed`, type [`TYPE`], the token
//! as its `event_id`, and as its `event` which rows and which keys it holds. The rows themselves stay `pending` until they
//! are marked. Why: docs/decisions/0024.
//!
//! 1. *Pick* rows as [`super::sql`] says, without what other claims hold, and insert the record. An advisory lock lets one
//!    relay at a time do so; who comes second gets nothing. So the numbers of claims are in the order of their commits.
//! 2. *Read* the rows. Those that were finished, failed or locked by somebody meanwhile are not ready, and hold back what
//!    follows of their key.
//! 3. [`Writer::end`] removes the record and marks its rows in one statement: no record, no mark. A record whose lease is
//!    over is removed by the next claim of whoever, and that fences its owner.
//!
//! A statement's snapshot may be older than the lock that it takes. So what takes the lock, [`Writer::turn`], and what
//! does 1 and 2, [`Writer::claim_in_turn`], are two statements of one transaction, which are sent together. An executor
//! that knows only statements has [`Writer::record`] for 1, whose picks may be held by others, and [`Writer::held`] for 2,
//! with a younger snapshot: of rows that two claims hold, those belong to the claim with the lower number, which the other
//! is certain to see.
//!
//! Removed records stay in their index as long as old snapshots do, so claims look for them no further back than the oldest
//! that was alive (`oldest`): an older one cannot appear any more.

use super::sql::{Wanted, Writer};
use super::store::Verdict;
use crate::outbox::statement::{Sql, Statement};

/// The type of a claim's row. No event's type can end with a separator.
pub(super) const TYPE: &str = "polybus.claim.";

/// Names the advisory locks of claims, in their upper half; the lower half is the table.
const LOCK: i64 = 0x706f_6c79;

impl Writer {
    /// Whether it is our turn to claim, and how many rows came back from claims that are made by row; one row. Also removes
    /// records whose lease is over. `oldest`: no living record has a lower number.
    pub fn turn(&self, oldest: i64) -> Statement {
        let mut sql = self.sql();
        self.with_turn(&mut sql, oldest);
        sql.push(" SELECT CASE WHEN ok THEN CAST(1 AS BIGINT) ELSE 0 END, (SELECT count(*) FROM back) FROM turn");
        sql.finish()
    }

    /// Claims rows after [`Writer::turn`] in the same transaction. Each as [`Writer::held`] has it and two NULL, in any order;
    /// and one row with numbers of what it saw: rows in the window, of these picked, NULL, NULL, how deep the last of them
    /// stands, and the lowest number of a living record.
    pub fn claim_in_turn(&self, wanted: Wanted<'_>, oldest: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("WITH turn AS MATERIALIZED (SELECT current_setting('polybus.turn', true) = 'true' AS ok)");
        self.with_pick(&mut sql, wanted, oldest, ", attempts, event, xmax <> CAST('0' AS xid) AS touched");
        self.with_locked(&mut sql, "pick");
        sql.push(" SELECT seq, CAST(attempts AS BIGINT), partition_key, CASE WHEN NOT touched OR seq IN (SELECT seq FROM locked) THEN event END, CAST(NULL AS BIGINT), CAST(NULL AS BIGINT) FROM pick");
        sql.push(" UNION ALL SELECT rows, (SELECT count(*) FROM pick), NULL, NULL, depth, (SELECT coalesce(min(seq), (SELECT seq FROM made)) FROM live) FROM seen");
        sql.finish()
    }

    /// Picks rows and records them, in one statement. One row: as [`Writer::turn`]; rows in the window, of these picked, and
    /// how deep the last of them stands.
    pub fn record(&self, wanted: Wanted<'_>, oldest: i64) -> Statement {
        let mut sql = self.sql();
        self.with_turn(&mut sql, oldest);
        self.with_pick(&mut sql, wanted, oldest, "");
        sql.push(" SELECT CASE WHEN ok THEN CAST(1 AS BIGINT) ELSE 0 END, (SELECT count(*) FROM back), rows, (SELECT count(*) FROM pick), depth FROM turn, seen");
        sql.finish()
    }

    /// Takes the turn until the transaction ends, and clears away claims whose lease is over.
    fn with_turn(&self, sql: &mut Sql, oldest: i64) {
        sql.push("WITH turn AS MATERIALIZED (SELECT set_config('polybus.turn', CAST(pg_try_advisory_xact_lock(CAST(")
            .bind(LOCK << 32)
            .push(" AS BIGINT) + CAST(CAST(CAST(CAST(")
            .bind(self.table())
            .push(" AS TEXT) AS regclass) AS oid) AS BIGINT)) AS TEXT), true) = 'true' AS ok)");
        sql.push(", gone AS (DELETE FROM ").push(&self.table());
        claims(sql, "=", oldest).push("<= now() RETURNING seq)");
        // As wire.md has it, and a relay of another make does it.
        sql.push(", back AS (UPDATE ").push(&self.table());
        sql.push(" SET status = 'pending', lease_token = NULL, lease_until = NULL");
        claims(sql, "<>", oldest).push("<= now() RETURNING seq)");
    }

    /// Picks rows, with more columns if there are any, and inserts the record.
    fn with_pick(&self, sql: &mut Sql, wanted: Wanted<'_>, oldest: i64, columns: &str) {
        let table = self.table();
        sql.push(", live AS MATERIALIZED (SELECT seq, CAST(event AS jsonb) AS holds FROM ").push(&table);
        claims(sql, "=", oldest);
        sql.push("> now()), taken AS MATERIALIZED (SELECT CAST(r AS BIGINT) AS seq FROM live, LATERAL jsonb_array_elements_text(holds -> 'rows') AS r)");
        sql.push(", win AS MATERIALIZED (SELECT seq, partition_key, visible_at <= now() AS due").push(columns);
        sql.push(" FROM ").push(&table).push(" WHERE status = 'pending' AND seq >= ").bind(wanted.floor);
        sql.push(" AND seq NOT IN (SELECT seq FROM taken) AND (SELECT ok FROM turn) ORDER BY seq LIMIT ")
            .bind(wanted.window);
        sql.push("), held AS (SELECT partition_key, min(seq) AS first FROM (SELECT partition_key, seq FROM win WHERE NOT due AND partition_key IS NOT NULL UNION ALL SELECT k, CAST(-1 AS BIGINT) FROM live, LATERAL jsonb_array_elements_text(holds -> 'keys') AS k) h GROUP BY partition_key)");
        sql.push(", pick AS MATERIALIZED (SELECT w.* FROM win w LEFT JOIN held h ON h.partition_key = w.partition_key WHERE w.due AND (h.first IS NULL OR w.seq < h.first) ORDER BY w.seq LIMIT ");
        sql.bind(wanted.batch).push(")");
        sql.push(", made AS (INSERT INTO ").push(&table).push(" (event_id, type, event, status, lease_until) SELECT ");
        sql.bind(wanted.token).push(", '").push(TYPE).push("', CAST(json_build_object('rows', json_agg(seq ORDER BY seq), 'keys', coalesce(json_agg(DISTINCT partition_key) FILTER (WHERE partition_key IS NOT NULL), CAST('[]' AS json))) AS TEXT), 'claimed', ");
        sql.now_plus(wanted.lease_ms).push(" FROM pick HAVING count(*) > 0 RETURNING seq)");
        sql.push(", seen AS (SELECT count(*) AS rows, count(*) FILTER (WHERE seq <= (SELECT max(seq) FROM pick)) AS depth FROM win)");
    }

    /// `locked`: those of `rows` that somebody has locked, or had, and that are free. Only these are worth the price of trying.
    fn with_locked(&self, sql: &mut Sql, rows: &str) {
        sql.push(", locked AS MATERIALIZED (SELECT seq FROM ").push(&self.table());
        sql.push(" WHERE seq = ANY(ARRAY(SELECT seq FROM ").push(rows);
        sql.push(" WHERE touched)) AND status = 'pending' FOR UPDATE SKIP LOCKED)");
    }

    /// The rows of a record: `seq, attempts, partition_key, event`, in order; without the event if it is not ready. And in
    /// each row the lowest number of a living record: of those that come before ours none is hidden from this snapshot.
    pub fn held(&self, token: &str, oldest: i64) -> Statement {
        let mut sql = self.sql();
        let table = self.table();
        sql.push("WITH own AS MATERIALIZED (SELECT seq, CAST(event AS jsonb) AS holds FROM ").push(&table);
        of(&mut sql, token).push(")");
        sql.push(", prior AS MATERIALIZED (SELECT seq, CAST(event AS jsonb) AS holds FROM ").push(&table);
        sql.push(" WHERE status = 'claimed' AND type = '").push(TYPE).push("' AND seq >= ").bind(oldest);
        sql.push(" AND seq < (SELECT seq FROM own))");
        sql.push(", taken AS MATERIALIZED (SELECT CAST(r AS BIGINT) AS seq FROM prior, LATERAL jsonb_array_elements_text(holds -> 'rows') AS r)");
        sql.push(
            ", lanes AS MATERIALIZED (SELECT k FROM prior, LATERAL jsonb_array_elements_text(holds -> 'keys') AS k)",
        );
        sql.push(", rows AS MATERIALIZED (SELECT seq, attempts, partition_key, event, status = 'pending' AND visible_at <= now() AS due, xmax <> CAST('0' AS xid) AS touched FROM ").push(&table);
        sql.push(" WHERE seq = ANY(ARRAY(SELECT CAST(r AS BIGINT) FROM own, LATERAL jsonb_array_elements_text(holds -> 'rows') AS r)))");
        self.with_locked(&mut sql, "rows");
        sql.push(" SELECT seq, CAST(attempts AS BIGINT), partition_key, CASE WHEN due AND seq NOT IN (SELECT seq FROM taken) AND (partition_key IS NULL OR partition_key NOT IN (SELECT k FROM lanes)) AND (NOT touched OR seq IN (SELECT seq FROM locked)) THEN event END, (SELECT coalesce(min(seq), (SELECT seq FROM own)) FROM prior) FROM rows ORDER BY seq");
        sql.finish()
    }

    /// Ends a claim: these rows are delivered, these failed, and the others are pending as before. One row: whether the
    /// claim was still ours, and how many were marked as delivered and as failed.
    pub fn end(&self, token: &str, delivered: &[i64], failed: &[Verdict]) -> Statement {
        let mut sql = self.sql();
        let table = self.table();
        sql.push("WITH own AS (DELETE FROM ").push(&table);
        of(&mut sql, token).push(" RETURNING seq), done AS (UPDATE ").push(&table);
        sql.push(" SET status = 'delivered', delivered_at = now() WHERE ");
        self.among(&mut sql, delivered);
        sql.push(" AND status = 'pending' AND EXISTS (SELECT 1 FROM own) RETURNING seq), failed AS (UPDATE ")
            .push(&table);
        sql.push(" t SET status = f.status, attempts = t.attempts + 1, visible_at = now() + f.wait * INTERVAL '1 millisecond', last_error = f.error FROM json_to_recordset(CAST(");
        sql.bind(verdicts(failed)).push(" AS json)) AS f(seq BIGINT, status TEXT, wait BIGINT, error TEXT)");
        sql.push(" WHERE t.seq = f.seq AND t.status = 'pending' AND EXISTS (SELECT 1 FROM own) RETURNING t.seq)");
        sql.push(" SELECT (SELECT count(*) FROM own), (SELECT count(*) FROM done), (SELECT count(*) FROM failed)");
        sql.finish()
    }

    /// How many rows are claimed, as an expression.
    pub fn held_by_records(&self) -> String {
        let table = self.table();
        format!(
            "(SELECT CAST(coalesce(sum(json_array_length(CAST(event AS json) -> 'rows')), 0) AS BIGINT) FROM {table} WHERE status = 'claimed' AND type = '{TYPE}')"
        )
    }

    /// How many of these rows are marked as delivered, by whomever.
    pub fn marked(&self, delivered: &[i64]) -> Statement {
        let mut sql = self.sql();
        sql.push("SELECT count(*) FROM ").push(&self.table()).push(" WHERE ");
        self.among(&mut sql, delivered);
        sql.push(" AND status = 'delivered'");
        sql.finish()
    }

    /// Holds a claim for another lease.
    pub fn renew(&self, token: &str, lease_ms: i64) -> Statement {
        let mut sql = self.sql();
        sql.push("UPDATE ").push(&self.table()).push(" SET lease_until = ").now_plus(lease_ms);
        of(&mut sql, token);
        sql.finish()
    }
}

/// Of one record. Not by its status: the index of claims may be full of those that are gone.
fn of<'a>(sql: &'a mut Sql, token: &str) -> &'a mut Sql {
    sql.push(" WHERE event_id = ").bind(token).push(" AND type = '").push(TYPE).push("'")
}

/// Of claims in our turn, records (`=`) or rows (`<>`), up to the comparison of their lease.
fn claims<'a>(sql: &'a mut Sql, kind: &str, oldest: i64) -> &'a mut Sql {
    sql.push(" WHERE status = 'claimed' AND type ").push(kind).push(" '").push(TYPE).push("' AND seq >= ");
    sql.bind(oldest).push(" AND (SELECT ok FROM turn) AND lease_until ")
}

fn verdicts(failed: &[Verdict]) -> String {
    let rows = failed.iter().map(|verdict| {
        let wait = verdict.retry.map_or(0, |wait| i64::try_from(wait.as_millis()).unwrap_or(i64::MAX / 2));
        let status = if verdict.retry.is_some() { "pending" } else { "dead" };
        serde_json::json!({"seq": verdict.seq, "status": status, "wait": wait, "error": verdict.error})
    });
    serde_json::Value::from_iter(rows).to_string()
}
