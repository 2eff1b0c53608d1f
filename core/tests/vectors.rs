//! The golden vectors that all languages share. One function per file.

use std::path::Path;
use std::time::Duration;

use polybus_core::codec::{decode, encode};
use polybus_core::error::ErrorKind;
use polybus_core::event::EventType;
use polybus_core::pattern::{Pattern, PatternIndex};
use polybus_core::retry::{Jitter, RetryPolicy};
use serde::Deserialize;
use serde::de::DeserializeOwned;

fn read<T: DeserializeOwned>(file: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn patterns() {
    #[derive(Deserialize)]
    struct File {
        matches: Vec<Case>,
        invalid: Vec<Invalid>,
    }
    #[derive(Deserialize)]
    struct Case {
        pattern: String,
        event_type: String,
        matches: bool,
    }
    #[derive(Deserialize)]
    struct Invalid {
        pattern: String,
    }

    let file: File = read("patterns.json");
    assert!(file.matches.len() >= 120 && file.invalid.len() >= 25);
    // All patterns live in one index, so that each case also shows that the others do not disturb it.
    let mut index = PatternIndex::new();
    for (id, case) in file.matches.iter().enumerate() {
        index.insert(&Pattern::new(&case.pattern).unwrap(), id);
    }
    let mut matching = Vec::new();
    for (id, case) in file.matches.iter().enumerate() {
        EventType::new(&case.event_type).unwrap();
        let pattern = Pattern::new(&case.pattern).unwrap();
        assert_eq!(pattern.matches(&case.event_type), case.matches, "{} {}", case.pattern, case.event_type);
        index.matches(&case.event_type, &mut matching);
        assert_eq!(matching.contains(&id), case.matches, "index: {} {}", case.pattern, case.event_type);
    }
    for case in file.invalid {
        let error = Pattern::new(&case.pattern).expect_err(&case.pattern);
        assert_eq!(error.kind(), ErrorKind::InvalidPattern, "{}", case.pattern);
    }
}

#[test]
fn event_types() {
    #[derive(Deserialize)]
    struct File {
        valid: Vec<String>,
        invalid: Vec<String>,
    }

    let file: File = read("event_types.json");
    assert!(file.valid.len() >= 15 && file.invalid.len() >= 20);
    for text in &file.valid {
        assert_eq!(EventType::new(text).unwrap().as_str(), text);
        assert!(Pattern::new("*").unwrap().matches(text), "a lone * matches every event: {text}");
    }
    for text in &file.invalid {
        assert_eq!(EventType::new(text).expect_err(text).kind(), ErrorKind::InvalidEvent, "{text:?}");
    }
}

#[test]
fn retry() {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    #[derive(Deserialize)]
    struct Case {
        policy: Policy,
        attempt: u32,
        random: f64,
        delay_ms: Option<f64>,
    }
    #[derive(Deserialize)]
    struct Policy {
        max_retries: u32,
        initial_delay_ms: u64,
        max_delay_ms: u64,
        factor: f64,
        jitter: String,
    }

    let file: File = read("retry.json");
    assert!(file.cases.len() >= 30);
    for (number, Case { policy, attempt, random, delay_ms }) in file.cases.into_iter().enumerate() {
        let policy = RetryPolicy {
            max_retries: policy.max_retries,
            initial_delay: Duration::from_millis(policy.initial_delay_ms),
            max_delay: Duration::from_millis(policy.max_delay_ms),
            factor: policy.factor,
            jitter: match &*policy.jitter {
                "full" => Jitter::Full,
                "none" => Jitter::None,
                other => panic!("case {number}: jitter {other}"),
            },
        };
        let expected = delay_ms.map(|delay_ms| Duration::from_secs_f64(delay_ms / 1000.0));
        assert_eq!(policy.delay(attempt, random), expected, "case {number}");
    }
}

#[test]
fn errors() {
    #[derive(Debug, PartialEq, Deserialize)]
    struct Row {
        class: String,
        code: String,
        retryable: bool,
    }

    let known = ErrorKind::ALL.iter().map(|kind| Row {
        class: kind.class_name().into(),
        code: kind.code().into(),
        retryable: kind.is_retryable(),
    });
    assert_eq!(read::<Vec<Row>>("errors.json"), known.collect::<Vec<_>>());
}

#[test]
fn codec() {
    #[derive(Deserialize)]
    struct File {
        valid: Vec<Valid>,
        invalid: Vec<Invalid>,
    }
    #[derive(Deserialize)]
    struct Valid {
        name: String,
        wire: String,
        canonical: Option<String>,
    }
    #[derive(Deserialize)]
    struct Invalid {
        name: String,
        wire: String,
    }

    let file: File = read("codec.json");
    assert!(file.valid.len() >= 20 && file.invalid.len() >= 20);
    for Valid { name, wire, canonical } in file.valid {
        let event = decode(&wire.clone().into(), 1 << 20).unwrap_or_else(|error| panic!("{name}: {error}"));
        let encoded = String::from_utf8(encode(&event).unwrap()).unwrap();
        assert_eq!(encoded, canonical.unwrap_or(wire), "{name}");
    }
    for Invalid { name, wire } in file.invalid {
        let error = decode(&wire.into(), 1 << 20).expect_err(&name);
        assert_eq!(error.kind(), ErrorKind::InvalidEvent, "{name}");
    }
}
