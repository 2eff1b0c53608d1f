//! `docs/guarantees.md` says of each transport what its live bus says.
//!
//! `UPDATE=1 cargo test -p polybus-conformance --test guarantees` writes the table anew.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fmt::Write as _;
use std::path::Path;

use polybus_conformance::{DEADLINE, World, redis_server, transports};
use polybus_core::Bus;

const BEGIN: &str = "<!-- written by tests/rust/tests/guarantees.rs -->\n";
const END: &str = "<!-- end -->\n";

/// A capability in words. One that is new has no words yet: give it some.
fn words(capability: &str) -> &'static str {
    match capability {
        "durable" => "events survive the process",
        "cross_process" => "processes share it",
        "ack" => "groups, leases, retries; at least once",
        "delayed_retry" => "a retry waits in the store and holds no worker",
        "delayed_publish" => "`delay` and `expires_in`",
        "dead_letters" => "dead letters: list, replay, purge",
        "start_position" => "a new group starts at the beginning or at a time",
        "broadcast" => "`broadcast`: a copy for each process",
        "ordered" => "`ordered`: the events of one partition key in order",
        "request" => "`request` and `respond`",
        "idempotent" => "`idempotent`: a key is handled once",
        "publish_dedupe" => "an `idempotency_key` is published once",
        "history" => "the log can be read, and replayed into a group",
        other => panic!("say in docs/guarantees.md what {other} is: add it to {}", file!()),
    }
}

/// Names and values, as the struct has them.
fn capabilities(bus: &Bus, runtime: &tokio::runtime::Runtime) -> Vec<(String, bool)> {
    let text = format!("{:?}", runtime.block_on(bus.capabilities()).unwrap());
    let fields = text.trim_start_matches("Capabilities {").trim_end_matches('}');
    let field = |field: &str| {
        let (name, value) = field.split_once(": ").unwrap();
        (name.trim().to_owned(), value.trim() == "true")
    };
    fields.split(',').map(field).collect()
}

fn table() -> String {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut head, mut rows) = (String::from("| |"), Vec::<(String, String)>::new());
    let (mut delivery, mut durability, mut ordering) = (String::new(), String::new(), String::new());
    for transport in transports() {
        let world = World::new(&transport);
        let bus = world.bus();
        let guarantees = runtime.block_on(bus.guarantees()).unwrap();
        let _ = write!(head, " `{}` |", guarantees.transport);
        let _ = write!(delivery, " {} |", guarantees.delivery);
        let _ = write!(ordering, " {} |", guarantees.ordering);
        let depends = guarantees.transport == "redis";
        let _ = write!(durability, " {} |", if depends { "as the server is set" } else { guarantees.durability });
        for (index, (name, can)) in capabilities(&bus, &runtime).into_iter().enumerate() {
            if rows.len() == index {
                rows.push((name.clone(), String::new()));
            }
            let _ = write!(rows[index].1, " {} |", if can { "yes" } else { "no" });
        }
        runtime.block_on(bus.close(DEADLINE));
    }
    let columns = head.matches('|').count() - 1;
    let mut table = format!("{head}\n{}|\n", "|---".repeat(columns));
    let _ = write!(table, "| delivery |{delivery}\n| durability: what a confirmed publish survives |{durability}\n");
    let _ = writeln!(table, "| order of first attempts |{ordering}");
    for (name, cells) in rows {
        let _ = writeln!(table, "| {} |{cells}", words(&name));
    }
    table
}

#[test]
fn the_matrix_is_what_live_buses_say() {
    let _end = redis_server::EndShared;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/guarantees.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let table = table();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
    } else {
        assert_eq!(found, table, "docs/guarantees.md is out of date: run this test with UPDATE=1");
    }
}
