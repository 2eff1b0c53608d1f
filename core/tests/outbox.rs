//! The outbox's statements on a real SQLite, and their text for the others. Their drivers and servers are tested from
//! Python and TypeScript.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

use polybus_core::ErrorKind;
use polybus_core::event::{Event, EventType, Meta};
use polybus_core::outbox::{Dialect, Entry, Inbox, Insert, Outbox, OutboxOptions, Param, Statement, Style, Table};
use rusqlite::Connection;
use rusqlite::types::Value;
use std::time::{Duration, SystemTime};

fn event(change: impl FnOnce(&mut Meta)) -> Event {
    let mut meta = Meta::new(SystemTime::now());
    change(&mut meta);
    Event::new(EventType::new("order.placed").unwrap(), r#"{"total":9007199254740993,"nul":"\u0000"}"#.into(), meta)
}

fn outbox() -> Outbox {
    Outbox::new(&OutboxOptions { service: Some("shop".into()), ..OutboxOptions::default() }).unwrap()
}

fn database() -> Connection {
    let db = Connection::open_in_memory().unwrap();
    // Twice: the second run must change nothing.
    for _ in 0..2 {
        db.execute_batch(&outbox().table().outbox_ddl(Dialect::Sqlite).join(";\n")).unwrap();
        db.execute_batch(&inbox().table().inbox_ddl(Dialect::Sqlite).join(";\n")).unwrap();
    }
    db
}

fn inbox() -> Inbox {
    Inbox::new("polybus_inbox").unwrap()
}

fn run(db: &Connection, statement: &Statement) -> rusqlite::Result<Vec<Value>> {
    let params = statement.params.iter().map(|param| match param {
        Param::Null => Value::Null,
        Param::Integer(number) => Value::Integer(*number),
        Param::Text(text) => Value::Text(text.clone()),
    });
    let mut prepared = db.prepare(&statement.sql)?;
    let rows = prepared.query_map(rusqlite::params_from_iter(params), |row| row.get(0))?;
    rows.collect()
}

fn store(db: &Connection, insert: &Insert) -> Vec<bool> {
    let rows = run(db, &insert.statement).unwrap();
    let ids = rows.iter().map(|id| match id {
        Value::Text(id) => id.as_str(),
        other => panic!("{other:?}"),
    });
    insert.stored(ids)
}

fn sqlite(events: Vec<Entry>) -> Insert {
    let mut inserts = outbox().insert(Dialect::Sqlite, Style::Question, events).unwrap();
    assert_eq!(inserts.len(), 1, "one statement");
    inserts.remove(0)
}

#[test]
fn what_is_there_is_absorbed() {
    let db = database();
    let (first, second) = (event(|_| ()), event(|meta| meta.idempotency_key = Some("k".into())));
    let same_key = event(|meta| meta.idempotency_key = Some("k".into()));
    let events = [&first, &second, &first, &same_key].map(|event| Entry::from(event.clone()));
    assert_eq!(store(&db, &sqlite(events.to_vec())), [true, true, false, false]);
    assert_eq!(store(&db, &sqlite(vec![second.clone().into(), event(|_| ()).into()])), [false, true]);
    let other_key = Entry { event: event(|_| ()), dedupe_key: Some("k".into()) };
    assert_eq!(store(&db, &sqlite(vec![other_key])), [false]);
    let empty = || Entry { event: event(|_| ()), dedupe_key: Some("".into()) };
    assert_eq!(store(&db, &sqlite(vec![empty(), empty()])), [true, true], "an empty key is none");
}

#[test]
fn a_row_is_the_event_and_is_pending() {
    let db = database();
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as i64;
    let event = event(|meta| meta.partition_key = Some("o-1".into()));
    store(&db, &sqlite(vec![event.clone().into()]));
    let (wire, key, status, attempts, visible, created): (String, String, String, i64, i64, i64) = db
        .query_row(
            "SELECT event, partition_key, status, attempts, visible_at, created_at FROM polybus_outbox",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?, row.get(5)?)),
        )
        .unwrap();
    let read = polybus_core::codec::decode(&wire.into(), 1 << 20).unwrap();
    assert_eq!((&read.payload, &read.meta.id), (&event.payload, &event.meta.id));
    assert_eq!(read.meta.source.as_deref(), Some("shop"));
    assert!(read.meta.instance_id.is_some(), "as if it had been published here");
    assert_eq!((&*key, &*status, attempts), ("o-1", "pending", 0));
    let after = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as i64;
    // The database rounds to a millisecond.
    assert!((before - 1..=after + 1).contains(&visible) && visible == created, "{before} {visible} {created} {after}");
}

#[test]
fn what_cannot_be_stored_is_refused_before_anything_is() {
    let refused = |event: Event| {
        let error = outbox().insert(Dialect::Postgres, Style::Dollar, vec![self::event(|_| ()).into(), event.into()]);
        error.unwrap_err().kind()
    };
    let large =
        Event::new(EventType::new("a").unwrap(), vec![b'1'; (1 << 20) + 1].into(), Meta::new(SystemTime::now()));
    assert_eq!(refused(large), ErrorKind::PayloadTooLarge);
    assert_eq!(
        refused(event(|meta| meta.headers = vec![("h".into(), "x".repeat(70_000).into())])),
        ErrorKind::PayloadTooLarge
    );
    assert_eq!(refused(event(|meta| meta.partition_key = Some("x".repeat(513).into()))), ErrorKind::InvalidEvent);
    assert_eq!(refused(event(|meta| meta.idempotency_key = Some("a\0b".into()))), ErrorKind::InvalidEvent);
    assert_eq!(refused(event(|meta| meta.id = "x".repeat(256).into())), ErrorKind::InvalidEvent);
}

#[test]
fn many_rows_are_cut_into_statements() {
    let counts = |events: Vec<Entry>| {
        let inserts = outbox().insert(Dialect::Postgres, Style::Dollar, events).unwrap();
        inserts.iter().map(|insert| insert.statement.params.len() / 5).collect::<Vec<_>>()
    };
    assert_eq!(counts((0..2001).map(|_| event(|_| ()).into()).collect()), [1000, 1000, 1]);
    let large = || Event::new(EventType::new("a").unwrap(), vec![b'1'; 1 << 20].into(), Meta::new(SystemTime::now()));
    assert_eq!(counts((0..10).map(|_| large().into()).collect()), [7, 3]);
    assert_eq!(counts(Vec::new()), [0_usize; 0]);
}

#[test]
fn placeholders_are_the_drivers() {
    let text = |dialect, style| {
        let inserts = outbox().insert(dialect, style, vec![event(|_| ()).into(), event(|_| ()).into()]).unwrap();
        inserts[0].statement.sql.clone()
    };
    assert_eq!(
        text(Dialect::Postgres, Style::Dollar),
        "INSERT INTO \"polybus_outbox\" (event_id, type, event, partition_key, dedupe_key) VALUES ($1, $2, $3, $4, $5), \
         ($6, $7, $8, $9, $10) ON CONFLICT DO NOTHING RETURNING event_id"
    );
    assert!(text(Dialect::Sqlite, Style::Question).contains("VALUES (?, ?, ?, ?, ?), (?, ?, ?, ?, ?) ON CONFLICT"));
    assert!(text(Dialect::Postgres, Style::Named).contains("(:p1, :p2, :p3, :p4, :p5), (:p6, "));
    let mysql = text(Dialect::MySql, Style::Percent);
    assert!(mysql.starts_with("INSERT INTO `polybus_outbox` (") && !mysql.contains("IGNORE"), "{mysql}");
    assert!(mysql.contains("VALUES (%s, %s, %s, %s, %s, %s), (%s, "), "{mysql}");
}

#[test]
fn names_are_validated_and_quoted() {
    assert_eq!(Table::parse("app.Outbox").unwrap().quoted(Dialect::Postgres), "\"app\".\"Outbox\"");
    assert_eq!(Table::parse("app.Outbox").unwrap().quoted(Dialect::MySql), "`app`.`Outbox`");
    for bad in ["", "a.b.c", ".a", "a.", "1a", "a b", "a\"b", "a`b", "a;drop", "tábla", &"a".repeat(49)] {
        assert_eq!(Table::parse(bad).unwrap_err().kind(), ErrorKind::InvalidConfig, "{bad}");
    }
    let ddl = Table::parse("app.box").unwrap().outbox_ddl(Dialect::Sqlite);
    assert!(ddl[1].contains("INDEX IF NOT EXISTS \"app\".\"box_dedupe\" ON \"box\""), "{}", ddl[1]);
    assert_eq!(Dialect::parse("mariadb").unwrap(), Dialect::MySql);
    assert!(Dialect::parse("postgre").unwrap_err().message().contains("did you mean \"postgres\"?"));
    assert_eq!(Style::parse("%d").unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn a_table_of_another_version_is_told() {
    let db = database();
    let check = outbox().table().outbox_check(Dialect::Sqlite, Style::Question);
    assert_eq!(run(&db, &check).unwrap(), []);
    db.execute_batch("ALTER TABLE polybus_outbox DROP COLUMN last_error").unwrap();
    assert!(run(&db, &check).is_err());
    let error = outbox().table().missing(Dialect::Sqlite, "Outbox");
    assert!(error.message().contains("Outbox.ddl(\"sqlite\")"), "{error}");
}

#[test]
fn an_event_is_marked_once_for_each_consumer() {
    let db = database();
    let first = |consumer: &str, id: &str| {
        let mark = inbox().mark(Dialect::Sqlite, Style::Question, consumer, id).unwrap();
        run(&db, &mark.statement).unwrap().len() == 1
    };
    assert!(first("billing", "e-1") && !first("billing", "e-1") && first("mail", "e-1") && first("billing", "e-2"));
    run(&db, &inbox().unmark(Dialect::Sqlite, Style::Question, "billing", "e-1")).unwrap();
    assert!(first("billing", "e-1") && !first("mail", "e-1"));
    assert_eq!(inbox().mark(Dialect::Sqlite, Style::Question, "", "e").unwrap_err().kind(), ErrorKind::InvalidConfig);
}

#[test]
fn old_marks_are_purged_in_batches() {
    let db = database();
    for id in 0..5 {
        let mark = inbox().mark(Dialect::Sqlite, Style::Question, "billing", &id.to_string()).unwrap();
        run(&db, &mark.statement).unwrap();
    }
    db.execute_batch("UPDATE polybus_inbox SET processed_at = processed_at - 3600000 WHERE event_id <> '4'").unwrap();
    let purge = |limit| {
        let purge = inbox().purge(Dialect::Sqlite, Style::Question, Duration::from_secs(1800), limit).unwrap();
        run(&db, &purge.statement).unwrap().len()
    };
    assert_eq!([purge(3), purge(3), purge(3)], [3, 1, 0]);
}
