//! Which files are accepted, and that the others stay as they are.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use polybus_core::delivery::Verdict;
use polybus_core::transport::{Begun, Durability, GroupSpec, Outgoing, Settings, Start, connect};
use polybus_core::{Error, ErrorKind};

use crate::support::*;

async fn refusal(path: &Path) -> Error {
    match connect(&url(path), settings()).await {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(cause) => cause,
    }
}

/// The file is refused with `kind` and not one byte of the directory changes, side files of ours apart.
async fn refused_untouched(path: &Path, kind: ErrorKind, word: &str) {
    let before = std::fs::read(path).unwrap();
    let cause = refusal(path).await;
    assert_eq!(cause.kind(), kind, "{cause}");
    assert!(cause.to_string().contains(word), "{cause}");
    assert_eq!(std::fs::read(path).unwrap(), before);
}

#[tokio::test]
async fn a_new_file_is_private() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..1).await;
    for entry in std::fs::read_dir(place.directory.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    bus.close().await;
    assert!(!place.path.with_extension("db-wal").exists(), "closing folds the log into the file");
}

#[tokio::test]
async fn other_peoples_files_are_left_alone() {
    let place = place();
    std::fs::write(&place.path, "this is a diary, not a database, and it is quite long".repeat(100)).unwrap();
    refused_untouched(&place.path, ErrorKind::InvalidConfig, "not an event store").await;

    let app = place.directory.path().join("app.db");
    let foreign = rusqlite::Connection::open(&app).unwrap();
    foreign
        .execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE users(name); INSERT INTO users VALUES('ada')")
        .unwrap();
    drop(foreign);
    refused_untouched(&app, ErrorKind::InvalidConfig, "another application").await;
}

#[tokio::test]
async fn another_version_is_left_alone() {
    let place = place();
    open(&place.path).await.close().await;
    let file = rusqlite::Connection::open(&place.path).unwrap();
    file.pragma_update(None, "user_version", 99).unwrap();
    drop(file);
    refused_untouched(&place.path, ErrorKind::InvalidConfig, "version 99").await;
}

#[tokio::test]
async fn a_damaged_file_is_left_alone() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..500).await;
    bus.close().await;
    let mut bytes = std::fs::read(&place.path).unwrap();
    bytes[100..4096].fill(0x5a); // the root of the schema, after the file's header
    std::fs::write(&place.path, &bytes).unwrap();
    refused_untouched(&place.path, ErrorKind::InvalidConfig, "damaged").await;
    bytes.truncate(4096);
    std::fs::write(&place.path, &bytes).unwrap();
    refused_untouched(&place.path, ErrorKind::InvalidConfig, "damaged").await;
}

#[tokio::test]
async fn links_and_directories_are_refused() {
    let place = place();
    open(&place.path).await.close().await;
    let soft = place.directory.path().join("soft.db");
    std::os::unix::fs::symlink(&place.path, &soft).unwrap();
    assert!(refusal(&soft).await.to_string().contains("symbolic link"));
    let hard = place.directory.path().join("hard.db");
    std::fs::hard_link(&place.path, &hard).unwrap();
    assert!(refusal(&place.path).await.to_string().contains("hard links"));
    let directory = place.directory.path().join("sub");
    std::fs::create_dir(&directory).unwrap();
    assert_eq!(refusal(&directory).await.kind(), ErrorKind::InvalidConfig);
}

#[tokio::test]
async fn two_names_of_one_directory_are_one_store() {
    let place = place();
    let linked = place.directory.path().join("linked");
    std::os::unix::fs::symlink(place.directory.path(), &linked).unwrap();
    let (one, two) = (open(&place.path).await, open(&linked.join("events.db")).await);
    let source = one.subscribe(spec("g")).await.unwrap();
    publish(&two, 3..4).await;
    assert_eq!(numbers(&take(&source, 1).await), [3]);
    one.close().await;
    two.close().await;
}

#[tokio::test]
async fn a_missing_directory_says_what_to_do() {
    let place = place();
    let cause = refusal(&place.directory.path().join("no/such/events.db")).await;
    assert_eq!(cause.kind(), ErrorKind::ConnectionFailed);
    assert!(cause.to_string().contains("create it first"), "{cause}");
}

/// As another user than root, whom permissions do not stop: in a child that gives its rights up.
#[test]
fn a_directory_without_permission_says_what_to_do() {
    if let Some((role, path)) = role() {
        assert_eq!(role, "nobody");
        if unsafe { libc::getuid() } == 0 {
            assert_eq!(unsafe { libc::setuid(65534) }, 0);
        }
        let cause = tokio::runtime::Runtime::new().unwrap().block_on(refusal(&path));
        println!("refused {} {cause}", cause.kind().code());
        return;
    }
    let place = place();
    std::fs::set_permissions(place.directory.path(), PermissionsExt::from_mode(0o555)).unwrap();
    let child = child("files::a_directory_without_permission_says_what_to_do", "nobody", &place.path);
    let said = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    assert!(said.contains("refused connection_failed") && said.contains("permission"), "{said}");
}

#[tokio::test]
async fn a_file_that_is_replaced_is_noticed() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..1).await;
    std::fs::rename(&place.path, place.directory.path().join("moved.db")).unwrap();
    std::fs::write(&place.path, "").unwrap();
    let heard = first_failure(&bus).await;
    assert_eq!(heard.kind(), ErrorKind::ConnectionFailed);
    assert!(heard.to_string().contains("replaced"), "{heard}");
}

/// What a second library does to our file, without one: it maps the shared memory once more.
#[tokio::test]
async fn a_second_library_on_our_file_is_noticed() {
    let place = place();
    let bus = open(&place.path).await;
    // Two more of our own connections, which share their mapping.
    bus.guarantees().await.unwrap();
    let source = bus.subscribe(spec("g")).await.unwrap();
    publish(&bus, 0..100).await;
    let shm = std::fs::File::open(place.path.with_extension("db-shm")).unwrap();
    let mapped = unsafe {
        use std::os::fd::AsRawFd;
        libc::mmap(std::ptr::null_mut(), 32768, libc::PROT_READ, libc::MAP_SHARED, shm.as_raw_fd(), 0)
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    std::mem::forget(shm); // closing it would drop the locks of our own library
    let heard = first_failure(&bus).await;
    assert_eq!(heard.kind(), ErrorKind::InvalidConfig);
    assert!(heard.to_string().contains("second SQLite library"), "{heard}");
    unsafe { libc::munmap(mapped, 32768) };
    publish(&bus, 1..2).await; // it goes on once the cause is gone
    drop(source);
    bus.close().await;
}

#[tokio::test]
async fn guarantees_are_read_from_the_live_store() {
    let place = place();
    let normal = open(&place.path).await;
    let told = normal.guarantees().await.unwrap();
    assert_eq!((told.transport, told.durability, told.warnings.len()), ("sqlite", "process", 1));
    // The stricter of two buses on one file wins.
    let full = open_with(&place.path, Settings { durability: Durability::Full, ..settings() }).await;
    assert_eq!(normal.guarantees().await.unwrap().durability, "disk");
    assert!(full.guarantees().await.unwrap().details.contains(&("journal_mode", "wal".to_owned())));
    normal.close().await;
    full.close().await;
}

#[tokio::test]
async fn a_bus_that_is_dropped_without_close_loses_nothing() {
    let place = place();
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("g")).await.unwrap();
    publish(&bus, 0..10).await;
    drop(source);
    drop(bus);
    let bus = open(&place.path).await;
    let source = bus.subscribe(spec("g")).await.unwrap();
    assert_eq!(take_all(&source, 10).await.len(), 10);
    bus.close().await;
}

/// A file of an earlier polybus gets the columns that came later, and what is in it stays.
#[tokio::test]
async fn an_older_file_gets_the_new_columns() {
    let place = place();
    let bus = open(&place.path).await;
    bus.subscribe(spec("one")).await.unwrap();
    publish(&bus, 0..3).await;
    bus.close().await;
    let file = rusqlite::Connection::open(&place.path).unwrap();
    let older =
        ["polybus_groups DROP COLUMN ordered", "polybus_deliveries DROP COLUMN lane", "polybus_dead DROP COLUMN lane"];
    for change in older {
        file.execute_batch(&format!("ALTER TABLE {change}")).unwrap();
    }
    drop(file);
    let bus = open(&place.path).await;
    let one = bus.subscribe(spec("one")).await.unwrap();
    assert_eq!(numbers(&take_all(&one, 3).await), [0, 1, 2]);
    let two = bus.subscribe(GroupSpec { ordered: true, ..spec("two") }).await.unwrap();
    publish(&bus, 3..4).await;
    assert_eq!(numbers(&take_all(&two, 1).await), [3]);
    bus.close().await;
}

/// As a version wrote it that knew no marks: the tables are made, and what is in the others stays.
#[tokio::test]
async fn a_file_of_an_older_version_gets_the_later_tables() {
    let place = place();
    let bus = open(&place.path).await;
    publish(&bus, 0..3).await;
    bus.close().await;
    let file = rusqlite::Connection::open(&place.path).unwrap();
    file.execute_batch("DROP TABLE polybus_marks; DROP TABLE polybus_published;").unwrap();
    drop(file);
    let bus = open(&place.path).await;
    let source = bus.subscribe(GroupSpec { start: Start::Beginning, ..spec("one") }).await.unwrap();
    let taken = take_all(&source, 3).await;
    let wanted = taken.iter().map(|delivery| (delivery.lease, "same".into())).collect();
    let begun = source.begin(wanted, PATIENCE).await.unwrap();
    assert!(matches!(begun[..], [Begun::Run, Begun::Busy(_), Begun::Busy(_)]), "{begun:?}");
    settle(&source, &taken[..1], Verdict::Ack).await;
    let begun = source.begin(vec![(taken[1].lease, "same".into())], PATIENCE).await.unwrap();
    assert_eq!(begun, [Begun::Duplicate]);
}

/// What need not be remembered any more is removed, of groups and of what was published.
#[tokio::test]
async fn forgotten_keys_leave_the_file() {
    let place = place();
    let window = Some(Duration::from_millis(1));
    let bus = open_with(&place.path, Settings { idempotency_window: window, ..settings() }).await;
    let source = bus.subscribe(spec("one")).await.unwrap();
    let meta = br#"{"idempotencyKey":"k"}"#;
    let event = polybus_core::bus::new_event(TYPE, "1".into(), Some(meta), 100).unwrap();
    bus.publish(vec![Outgoing { event, delay: None, expires_in: None }], PATIENCE).await.unwrap();
    let taken = take_all(&source, 1).await;
    let mark = vec![(taken[0].lease, "k".into())];
    assert_eq!(source.begin(mark, Duration::from_millis(1)).await.unwrap(), [Begun::Run]);
    settle(&source, &taken, Verdict::Ack).await;
    let file = rusqlite::Connection::open(&place.path).unwrap();
    let left = || {
        let count = "SELECT (SELECT count(*) FROM polybus_marks) + (SELECT count(*) FROM polybus_published)";
        file.query_row(count, [], |row| row.get::<_, i64>(0)).unwrap()
    };
    let gone = async {
        while left() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.expect("the file forgets");
}
