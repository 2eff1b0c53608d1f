//! Entries that this version did not write.

use std::process::{Command, Stdio};

use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::codec;
use polybus_core::dead_letter::{DeadLetter, DeadLetterFilter};
use polybus_core::delivery::DeadReason;
use polybus_core::handler::Outcome;

use super::*;

fn wire(payload: &str) -> String {
    String::from_utf8(codec::encode(&event("order.created", payload)).unwrap()).unwrap()
}

fn add(server: &RedisServer, fields: &[&str]) {
    server.cli(&[&["XADD", EVENTS, "*"], fields].concat());
}

#[tokio::test]
async fn unknown_fields_and_members_are_passed_on() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let later = wire("1").replacen('{', r#"{"colour":"blue","#, 1).replacen(r#""meta":{"#, r#""meta":{"mood":[1],"#, 1);
    add(&server, &["z", "new", "e", &later, "t", "order.created", "zz", ""]);
    let job = seen.next().await;
    assert_eq!(payload(&job), "1");
    let passed_on = String::from_utf8(codec::encode(&job.event).unwrap()).unwrap();
    assert!(passed_on.contains(r#""colour":"blue""#) && passed_on.contains(r#""mood":[1]"#), "{passed_on}");
    finished(&bus, MAIL).await;
    assert_eq!(bus.dead_count(DeadLetterFilter::default()).await.unwrap(), 0);
}

/// Without a type in the entry, the event's own is good enough.
#[tokio::test]
async fn an_entry_without_a_type_is_delivered() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    add(&server, &["e", &wire("1")]);
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, MAIL).await;
}

/// The dead letter that comes of an entry, while the events after it are handled.
async fn dead_at_first_sight(fields: &[&str]) -> DeadLetter {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (mail, mut seen) = subscribe(&bus, "order.*", one_by_one("mail"), |_| Outcome::Done).await;
    publish(&bus, "order.created", "0").await;
    add(&server, fields);
    publish(&bus, "order.created", "1").await;
    for number in 0..2 {
        assert_eq!(payload(&seen.next().await), number.to_string());
    }
    finished(&bus, MAIL).await;
    assert_eq!((mail.counters().failed.load(Relaxed), mail.counters().retried.load(Relaxed)), (0, 0));
    let mut letters = bus.dead_letters(DeadLetterFilter::default(), None, 10).await.unwrap();
    assert_eq!(letters.len(), 1);
    let letter = letters.remove(0);
    assert_eq!((letter.reason, letter.attempts, &*letter.group), (DeadReason::Undecodable, 1, MAIL));
    letter
}

#[tokio::test]
async fn bad_json() {
    let letter = dead_at_first_sight(&["t", "order.created", "e", r#"{"type": "order."#]).await;
    assert!(&letter.raw[..] == br#"{"type": "order."#.as_slice() && letter.event.is_none());
}

#[tokio::test]
async fn no_event_at_all() {
    let letter = dead_at_first_sight(&["t", "order.created", "what", "ever", "z", "1"]).await;
    let raw = String::from_utf8_lossy(&letter.raw);
    assert!(raw.contains("what=ever") && raw.contains("z=1"), "{raw}");
}

#[tokio::test]
async fn an_unknown_codec() {
    let letter = dead_at_first_sight(&["t", "order.created", "c", "zip", "e", "PK.."]).await;
    assert_eq!(&letter.raw[..], b"PK..");
    assert!(letter.error.message.contains("\"zip\""), "{}", letter.error.message);
}

/// Read together with an event that takes all the room, which is given back through a store that knows no codecs.
#[tokio::test]
async fn an_unknown_codec_beyond_the_room() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut seen) = subscribe(&bus, "order.*", one_by_one("mail"), |_| Outcome::Done).await;
    let noise = (0..200).map(|number| outgoing(event("stock.changed", &number.to_string()))).collect();
    bus.publish(noise).await.unwrap(); // from now on it reads many at once
    finished(&bus, MAIL).await;
    let script = "redis.call('XADD', KEYS[1], '*', 't', 'order.created', 'e', ARGV[1])
        return redis.call('XADD', KEYS[1], '*', 't', 'order.created', 'c', 'zip', 'e', ARGV[1])";
    server.cli(&["EVAL", script, "1", EVENTS, &wire("1")]);
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, MAIL).await;
    assert!(seen.is_empty());
    let letters = bus.dead_letters(DeadLetterFilter::default(), None, 10).await.unwrap();
    assert_eq!(letters.iter().map(|letter| letter.reason).collect::<Vec<_>>(), [DeadReason::Undecodable]);
}

#[tokio::test]
async fn bytes_that_are_no_text() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let (_mail, mut seen) = subscribe(&bus, "*", one_by_one("mail"), |_| Outcome::Done).await;
    let script = r"redis.call('XADD', KEYS[1], '*', 't', '\255', 'e', '\0\255\254')";
    let mut cli = Command::new("redis-cli");
    cli.args(["-p", &server.port().to_string(), "-e", "EVAL", script, "1", EVENTS]).stdin(Stdio::null());
    assert!(cli.output().unwrap().status.success());
    publish(&bus, "order.created", "1").await;
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, MAIL).await;
    let letters = bus.dead_letters(DeadLetterFilter::default(), None, 10).await.unwrap();
    assert_eq!(letters.iter().map(|letter| &letter.raw[..]).collect::<Vec<_>>(), [b"\0\xff\xfe"]);
}
