//! Any event survives the wire; any bytes are either an event or an error, never a panic.
#![allow(clippy::unwrap_used, reason = "tests")]

use polybus_core::codec::{check_payload, decode, encode};
use polybus_core::event::{Aggregate, Meta};
use polybus_core::retry::{Jitter, RetryPolicy};
use polybus_core::{Event, EventType};
use proptest::prelude::*;
use std::time::Duration;

fn text() -> impl Strategy<Value = Option<std::sync::Arc<str>>> {
    proptest::option::of(".{0,20}".prop_map(Into::into))
}

fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|value| value.to_string()),
        any::<i64>().prop_map(|value| value.to_string()),
        "-?[1-9][0-9]{0,40}(\\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?",
        ".{0,20}".prop_map(|text| serde_json::to_string(&text).unwrap()),
    ];
    leaf.prop_recursive(6, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(|items| format!("[{}]", items.join(" , "))),
            prop::collection::vec((".{0,8}", inner), 0..5).prop_map(|members| {
                let members =
                    members.iter().map(|(name, value)| format!("{}:{value}", serde_json::to_string(name).unwrap()));
                format!("{{{}}}", members.collect::<Vec<_>>().join(","))
            }),
        ]
    })
}

prop_compose! {
    fn meta()(
        source in text(), correlation_id in text(), causation_id in text(), partition_key in text(), user_id in text(),
        schema_version in proptest::option::of(any::<u32>()), kind in ".{0,9}", id in ".{1,9}",
        headers in prop::collection::vec((".{1,9}", ".{0,9}"), 0..4),
    ) -> Meta {
        Meta {
            id: id.as_str().into(), timestamp: "2026-11-21T08:00:00.123Z".into(), source, schema_version,
            correlation_id, causation_id, partition_key, user_id,
            aggregate: Some(Aggregate { kind: kind.into(), id: id.into() }),
            headers: headers.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            ..Meta::default()
        }
    }
}

proptest! {
    #[test]
    fn an_event_survives_the_wire(payload in json(), meta in meta()) {
        prop_assume!(check_payload(payload.as_bytes(), 1 << 20).is_ok());
        let event = Event::new(EventType::new("a.b").unwrap(), payload.clone().into(), meta.clone());
        let wire = bytes::Bytes::from(encode(&event).unwrap());
        let back = decode(&wire, 1 << 20).unwrap();
        prop_assert_eq!(&back.payload[..], payload.as_bytes());
        prop_assert_eq!(format!("{:?}", &back.meta), format!("{meta:?}"));
        prop_assert_eq!(&encode(&back).unwrap()[..], &wire[..]);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = decode(&bytes.into(), 200);
    }

    #[test]
    fn a_cut_or_changed_event_is_no_surprise(payload in json(), meta in meta(), cut in 0_usize..400, byte in any::<u8>()) {
        let event = Event::new(EventType::new("a.b").unwrap(), payload.into(), meta);
        let mut wire = encode(&event).unwrap();
        let at = cut % wire.len();
        wire[at] = byte;
        let _ = decode(&wire.clone().into(), 1 << 20);
        wire.truncate(at);
        prop_assert!(decode(&wire.into(), 1 << 20).is_err());
    }

    #[test]
    fn depth_is_exact(depth in 1_usize..130) {
        let nested = format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        prop_assert_eq!(check_payload(nested.as_bytes(), 1 << 20).is_ok(), depth <= 64);
    }

    #[test]
    fn a_delay_is_bounded_and_grows(
        initial in 0_u64..100_000, max in 0_u64..100_000, factor in 1.0_f64..50.0, retries in 0_u32..200, attempt in 1_u32..300, random in 0.0_f64..1.0,
    ) {
        let policy = RetryPolicy {
            max_retries: retries, initial_delay: Duration::from_millis(initial), max_delay: Duration::from_millis(max), factor, jitter: Jitter::None,
        };
        let full = RetryPolicy { jitter: Jitter::Full, ..policy.clone() };
        match policy.delay(attempt, random) {
            None => prop_assert!(attempt > retries),
            Some(delay) => {
                prop_assert!(attempt <= retries && delay <= policy.max_delay);
                prop_assert!(full.delay(attempt, random).unwrap() <= delay);
                if let Some(next) = policy.delay(attempt + 1, random) {
                    prop_assert!(next >= delay);
                }
            }
        }
    }
}
