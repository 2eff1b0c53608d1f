//! A relay whose statements the application runs: here on SQLite.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use polybus_core::codec;
use polybus_core::outbox::relay::host::{Desk, Question, Reply};
use polybus_core::outbox::relay::{Answer, Decision, Relay, RelayOptions};
use polybus_core::outbox::{Dialect, Param, Statement, Style, Table};
use polybus_core::{Error, Result};
use rusqlite::types::{ToSqlOutput, Value};

use crate::ground::{Memo, event, number, working};

struct Sqlite(Mutex<rusqlite::Connection>);

impl Sqlite {
    fn new() -> Self {
        let connection = rusqlite::Connection::open_in_memory().unwrap();
        let table = Table::parse("polybus_outbox").unwrap();
        connection.execute_batch(&table.outbox_ddl(Dialect::Sqlite).join(";")).unwrap();
        Self(Mutex::new(connection))
    }

    fn insert(&self, number: usize, key: Option<&str>) {
        let event = event(number, key);
        let wire = String::from_utf8(codec::encode(&event).unwrap()).unwrap();
        let sql = "INSERT INTO polybus_outbox (event_id, type, event, partition_key) VALUES (?, 'order.placed', ?, ?)";
        self.0.lock().unwrap().execute(sql, (&*event.meta.id, wire, key)).unwrap();
    }

    fn run(&self, statement: &Statement) -> Result<Answer> {
        let connection = self.0.lock().unwrap();
        let params = statement.params.iter().map(|param| match param {
            Param::Null => ToSqlOutput::Owned(Value::Null),
            Param::Integer(number) => ToSqlOutput::Owned(Value::Integer(*number)),
            Param::Text(text) => ToSqlOutput::Owned(Value::Text(text.clone())),
        });
        let wrong = |cause: rusqlite::Error| Error::invalid_config(format!("{cause} in {}", statement.sql));
        let mut prepared = connection.prepare(&statement.sql).map_err(wrong)?;
        let columns = prepared.column_count();
        let mut rows = prepared.query(rusqlite::params_from_iter(params)).map_err(wrong)?;
        let mut answer = Answer::default();
        while let Some(row) = rows.next().map_err(wrong)? {
            let cell = |index| match row.get::<_, Value>(index).unwrap() {
                // As node-postgres gives large ones; SQLite's own drivers, which give numbers, are tested in their languages.
                Value::Integer(number) if index == 0 => Param::Text(number.to_string()),
                Value::Integer(number) => Param::Integer(number),
                Value::Text(text) => Param::Text(text),
                _ => Param::Null,
            };
            answer.rows.push((0..columns).map(cell).collect());
        }
        drop(rows);
        drop(prepared);
        answer.affected = connection.changes();
        Ok(answer)
    }
}

#[tokio::test]
async fn an_outbox_in_sqlite_is_relayed_by_whoever_may_open_it() {
    let (database, bus, desk) = (Arc::new(Sqlite::new()), Memo::new(), Desk::new());
    let executor = desk.executor(Dialect::Sqlite, Style::Question);
    let options = RelayOptions { batch: 10, ..RelayOptions::default() };
    let relay = Relay::through(executor, bus.clone(), options).unwrap().with_policy(desk.policy(Default::default()));
    let clerk = tokio::spawn({
        let (database, desk) = (database.clone(), desk.clone());
        async move {
            while let Some((id, question)) = desk.next().await {
                let reply = match question {
                    Question::Run(statement) => database.run(&statement).map_or_else(Reply::Failed, Reply::Ran),
                    Question::Decide(failed) if failed.attempts == 3 => Reply::Decided(Decision::DeadLetter),
                    Question::Decide(_) => Reply::Decided(Decision::Retry(Duration::ZERO)),
                    Question::End => return,
                };
                desk.answer(id, reply);
            }
        }
    });
    bus.refuse(|event| (number(event) == 4).then(|| Error::invalid_event("not four")));
    for number in 0..25 {
        database.insert(number, Some(["a", "b"][number % 2]));
    }
    relay.check().await.unwrap();
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 7); // 4, 6 and 8 wait
    working(std::slice::from_ref(&relay), async {
        while relay.stats().await.unwrap().pending > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let keys = bus.by_key();
    assert!(keys["a"].is_sorted() && keys["b"].is_sorted() && bus.took().len() == 24, "{keys:?}");
    let dead = relay.dead_letters(0, 10).await.unwrap();
    assert_eq!((dead.len(), dead[0].attempts), (1, 3));
    bus.refuse(|_| None);
    assert_eq!(relay.replay(Some(&dead[0].event_id)).await.unwrap(), 1);
    assert_eq!(relay.relay_batch().await.unwrap().relayed, 1);
    assert_eq!(relay.purge(Duration::from_secs(1)).await.unwrap(), 0);
    database.0.lock().unwrap().execute("UPDATE polybus_outbox SET created_at = 1, delivered_at = 1", ()).unwrap();
    assert_eq!(relay.purge(Duration::from_secs(1)).await.unwrap(), 25);
    desk.dismiss();
    clerk.await.unwrap();
}
