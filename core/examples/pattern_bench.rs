//! Measures [`PatternIndex`] with 100,000 live patterns and prints one JSON object.
//!
//! `cargo run --release --example pattern_bench`
//!
//! The mix is one that services have: 40 % exact, 25 % `a.b.*`, 15 % `*.b.verb`, 15 % `a.b.**`, 5 % `a.**.verb`.
//! Four of five event types match something. Each figure is the median of the rounds, in nanoseconds per operation.

use std::hint::black_box;
use std::time::Instant;

use polybus_core::pattern::{Pattern, PatternIndex};

const PATTERNS: usize = 100_000;
const TYPES: usize = 20_000;
/// How many event types are in use at a time; with all of them, most of the index falls out of the processor's caches.
const USUAL_TYPES: usize = 1_000;
const ROUNDS: usize = 1_001;
/// Few, so that a round is shorter than a time slice and the median is not one that another process interrupted.
const PER_ROUND: usize = 500;
const VERBS: [&str; 8] = ["created", "updated", "deleted", "paid", "failed", "sent", "read", "expired"];

fn pattern(i: usize, random: &mut fastrand::Rng) -> String {
    let (a, b, verb) = (format!("service{}", i / 100), format!("thing{i}"), random.choice(VERBS).unwrap_or("read"));
    match random.u32(..100) {
        0..40 => format!("{a}.{b}.{verb}"),
        40..65 => format!("{a}.{b}.*"),
        65..80 => format!("*.{b}.{verb}"),
        80..95 => format!("{a}.{b}.**"),
        _ => format!("{a}.**.{verb}"),
    }
}

/// A type that `pattern` matches.
fn matched_by(pattern: &str) -> String {
    pattern.replace("**", "part.sub").replace('*', "part")
}

fn median(mut rounds: Vec<f64>) -> f64 {
    rounds.sort_by(f64::total_cmp);
    (rounds[rounds.len() / 2] * 10.0).round() / 10.0
}

fn nanos_each(count: usize, work: impl FnOnce()) -> f64 {
    let started = Instant::now();
    work();
    started.elapsed().as_nanos() as f64 / count as f64
}

fn main() -> polybus_core::Result<()> {
    let mut random = fastrand::Rng::with_seed(7);
    let texts: Vec<String> = (0..PATTERNS).map(|i| pattern(i, &mut random)).collect();
    let mut index = PatternIndex::new();
    for (id, text) in texts.iter().enumerate() {
        index.insert(&Pattern::new(text)?, id as u64);
    }
    let types: Vec<String> = (0..TYPES)
        .map(|i| match i % 5 {
            0 => format!("nobody.listens{i}.here"),
            _ => matched_by(&texts[random.usize(..PATTERNS)]),
        })
        .collect();

    let (mut matching, mut found, mut hit) = (Vec::new(), 0, 0);
    for event_type in &types {
        index.matches(event_type, &mut matching);
        found += matching.len();
        hit += usize::from(!matching.is_empty());
    }
    let mut match_ns = |types: &[String]| {
        let mut types = types.iter().cycle();
        let rounds = (0..ROUNDS).map(|_| {
            nanos_each(PER_ROUND, || {
                for event_type in types.by_ref().take(PER_ROUND) {
                    index.matches(black_box(event_type), &mut matching);
                    black_box(&matching);
                }
            })
        });
        median(rounds.collect())
    };
    let (usual, cold) = (match_ns(&types[..USUAL_TYPES]), match_ns(&types));

    // Compiling the pattern is part of subscribing.
    let changes: Vec<String> = (0..TYPES).map(|i| pattern(PATTERNS + i, &mut random)).collect();
    let mut changes = changes.iter().cycle();
    let rounds = (0..ROUNDS).map(|_| {
        nanos_each(PER_ROUND, || {
            for text in changes.by_ref().take(PER_ROUND) {
                if let Ok(pattern) = Pattern::new(black_box(text)) {
                    index.insert(&pattern, u64::MAX);
                    black_box(index.remove(&pattern, u64::MAX));
                }
            }
        })
    });
    let subscribe_unsubscribe_ns = median(rounds.collect());

    println!(
        "{{\"patterns\":{PATTERNS},\"match_ns\":{usual},\"subscribe_unsubscribe_ns\":{subscribe_unsubscribe_ns},\
         \"match_cold_ns\":{cold},\"types_hit\":{},\"ids_per_type\":{}}}",
        hit as f64 / TYPES as f64,
        found as f64 / TYPES as f64
    );
    Ok(())
}
