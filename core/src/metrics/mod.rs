//! What this process did and what its groups have to do, as Prometheus sees it.
//!
//! [`families`] collects, [`render`] writes the text of a metrics endpoint, [`to_json`] the same for a registry of
//! another language. Collecting asks nobody and waits for nothing: what only the store knows is counted in the background
//! each time somebody collects, and is shown the next time.

mod ledger;

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Map, Value, json};

use self::ledger::BOUNDS;
pub(crate) use self::ledger::{Attempts, Ledger, Origin, Status, Tally};
use crate::bus::{Bus, SubscriptionStats};
use crate::subscription::{Counters, Subscription};
use crate::transport::GroupStats;

/// Metrics of one name.
pub struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: Vec<Sample>,
}

/// One number.
struct Sample {
    /// Of a histogram: `_bucket`, `_sum`, `_count`.
    suffix: &'static str,
    labels: Vec<(&'static str, String)>,
    value: f64,
}

type Counter = fn(&Counters) -> &AtomicU64;

type Number = fn(&GroupStats) -> f64;

type Labels = Vec<(&'static str, String)>;

/// Counters and gauges of a subscription: name, kind, help, where it is kept.
const OF_PROCESS: [(&str, &str, &str, Counter); 9] = [
    ("retries_total", "counter", "Retries that were scheduled.", |c| &c.retried),
    ("dead_letters_total", "counter", "Dead letters that were made.", |c| &c.dead_lettered),
    ("dropped_total", "counter", "Events dropped because dead letters are off.", |c| &c.dropped),
    ("released_total", "counter", "Deliveries handed back unfinished.", |c| &c.released),
    ("handler_timeouts_total", "counter", "Handlers that ran longer than their timeout.", |c| &c.timed_out),
    ("duplicates_total", "counter", "Deliveries absorbed because their key was handled before.", |c| &c.duplicates),
    ("leases_lost_total", "counter", "Leases that passed to another process.", |c| &c.leases_lost),
    ("in_flight", "gauge", "Handlers that run in this process now.", |c| &c.running),
    ("queue_size", "gauge", "Deliveries that wait for a free handler in this process.", |c| &c.buffered),
];

/// The same of subscriptions that have a breaker.
const OF_BREAKER: [(&str, &str, &str, Counter); 2] = [
    ("breaker_state", "gauge", "0 closed, 1 open, 2 half-open.", |c| &c.breaker_state),
    ("breaker_openings_total", "counter", "How often the breaker opened.", |c| &c.breaker_openings),
];

/// What the store knows of a group.
const OF_GROUP: [(&str, &str, Number); 6] = [
    ("group_lag", "Events of the group that nobody has taken yet.", |s| s.lag as f64),
    ("group_in_flight", "Events of the group that a process holds.", |s| s.in_flight as f64),
    ("group_retrying", "Events of the group that wait for their next attempt.", |s| s.retrying as f64),
    ("group_dead_letters", "Dead letters of the group that are kept.", |s| s.dead as f64),
    ("group_expired", "Events of the group that expired before a handler got them.", |s| s.expired as f64),
    ("group_oldest_seconds", "Age of the oldest event that the group has not finished, 0 if there is none.", |s| {
        s.oldest.unwrap_or_default().as_secs_f64()
    }),
];

/// Everything that is counted, for this bus in this process.
pub fn families(bus: &Bus) -> Vec<Family> {
    let service = bus.options().service.clone();
    let base: Labels = vec![("service", service), ("bus", bus.options().bus.clone())];
    let mut all = Vec::new();

    let mut published = Family::new("events_published_total", "counter", "Events published by this process.");
    for (origin, count) in bus.published_by_origin() {
        published.add(base.iter().cloned().chain(by(&origin)), count as f64);
    }
    all.push(published);
    let mut failed = Family::new("publish_failed_total", "counter", "Events that could not be published.");
    failed.add(base.iter().cloned(), bus.publish_counts().1 as f64);
    all.push(failed);
    let requests = bus.request_counts();
    for (name, help, counter) in [
        ("requests_total", "Requests made by this process.", &requests.requests),
        ("replies_total", "Replies sent by this process.", &requests.replies),
        ("replies_late_total", "Replies that came late or were not the first, and were dropped.", &requests.late),
    ] {
        let mut family = Family::new(name, "counter", help);
        family.add(base.iter().cloned(), counter.load(Ordering::Relaxed) as f64);
        all.push(family);
    }
    let mut absorbed =
        Family::new("publish_duplicates_total", "counter", "Publishes absorbed by their idempotency key.");
    absorbed.add(base.iter().cloned(), bus.publish_duplicates() as f64);
    all.push(absorbed);
    for (name, value) in bus.transport_counts() {
        let mut family = Family::new(name, "counter", "Of this process's hold on the store; see docs/metrics.md.");
        family.add(base.iter().cloned(), value as f64);
        all.push(family);
    }

    let subscriptions = bus.subscriptions();
    all.extend(attempts(&subscriptions, &base));
    for (name, kind, help, counter) in OF_PROCESS.into_iter().chain(OF_BREAKER) {
        let mut family = Family::new(name, kind, help);
        let guards = OF_BREAKER.iter().any(|(guard, ..)| *guard == name);
        for subscription in subscriptions.iter().filter(|subscription| !guards || subscription.breaker().is_some()) {
            let value = counter(subscription.counters()).load(Ordering::Relaxed) as f64;
            family.add(base.iter().cloned().chain(of(subscription)), value);
        }
        all.push(family);
    }
    let sampled = bus.sampled_stats();
    for (name, help, number) in OF_GROUP {
        let mut family = Family::new(name, "gauge", help);
        for SubscriptionStats { subscription, group } in &sampled {
            if let Some(group) = group {
                family.add(base.iter().cloned().chain([("group", subscription.group().to_string())]), number(group));
            }
        }
        all.push(family);
    }
    all
}

/// Attempts by how they ended, and how long their handlers took.
fn attempts(subscriptions: &[Subscription], base: &Labels) -> [Family; 2] {
    let mut processed = Family::new(
        "events_processed_total",
        "counter",
        "Attempts to handle an event, by how they ended: completed, retried, dead_lettered, dropped, released.",
    );
    let mut seconds =
        Family::new("events_processing_duration_seconds", "histogram", "How long handlers ran, by event type.");
    for subscription in subscriptions {
        let group = ("group", subscription.group().to_string());
        for (origin, attempts) in subscription.counters().attempts.entries() {
            let labels: Labels = base.iter().cloned().chain(by(&origin)).chain([group.clone()]).collect();
            for (status, count) in Status::ALL.into_iter().zip(attempts.ended) {
                if count > 0 {
                    let status = ("status", status.as_str().to_owned());
                    processed.add(labels.iter().cloned().chain([status]), count as f64);
                }
            }
            let mut count = 0;
            let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
            for (bound, bucket) in bounds.zip(attempts.buckets) {
                count += bucket;
                let labels = labels.iter().cloned().chain([("le", bound)]).collect();
                seconds.samples.push(Sample { suffix: "_bucket", labels, value: count as f64 });
            }
            let sum = attempts.busy.as_secs_f64();
            seconds.samples.push(Sample { suffix: "_sum", labels: labels.clone(), value: sum });
            seconds.samples.push(Sample { suffix: "_count", labels, value: count as f64 });
        }
    }
    [processed, seconds]
}

fn by(origin: &Origin) -> [(&'static str, String); 2] {
    [("source", origin.source.to_string()), ("type", origin.event_type.to_string())]
}

fn of(subscription: &Subscription) -> [(&'static str, String); 2] {
    [("subscription", subscription.name().to_string()), ("group", subscription.group().to_string())]
}

impl Family {
    pub(crate) fn new(name: &'static str, kind: &'static str, help: &'static str) -> Self {
        Self { name, kind, help, samples: Vec::new() }
    }

    pub(crate) fn add(&mut self, labels: impl IntoIterator<Item = (&'static str, String)>, value: f64) {
        self.samples.push(Sample { suffix: "", labels: labels.into_iter().collect(), value });
    }
}

/// The text that a metrics endpoint serves, in the format `text/plain; version=0.0.4`.
pub fn render(bus: &Bus) -> String {
    text(families(bus))
}

/// The same of any families.
pub(crate) fn text(families: Vec<Family>) -> String {
    let mut out = String::new();
    for Family { name, kind, help, samples } in families {
        let _ = writeln!(out, "# HELP polybus_{name} {help}\n# TYPE polybus_{name} {kind}");
        for Sample { suffix, labels, value } in samples {
            let labels: Vec<_> = labels.iter().map(|(label, text)| format!("{label}={}", quoted(text))).collect();
            let _ = writeln!(out, "polybus_{name}{suffix}{{{}}} {value}", labels.join(","));
        }
    }
    out
}

/// The same as a JSON array of `{name, type, help, samples: [{name, labels, value}]}`.
pub fn to_json(bus: &Bus) -> String {
    let family = |Family { name, kind, help, samples }: Family| {
        let sample = |Sample { suffix, labels, value }| {
            let labels: Map<_, _> =
                labels.into_iter().map(|(label, text)| (label.to_owned(), Value::String(text))).collect();
            json!({"name": format!("polybus_{name}{suffix}"), "labels": labels, "value": value})
        };
        let samples: Vec<_> = samples.into_iter().map(sample).collect();
        json!({"name": format!("polybus_{name}"), "type": kind, "help": help, "samples": samples})
    };
    Value::Array(families(bus).into_iter().map(family).collect()).to_string()
}

/// A label value: names may hold any printable character.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::BusOptions;

    #[test]
    fn renders_without_anything_opened() {
        let bus = Bus::new("memory://", BusOptions::new("shop")).unwrap();
        let text = render(&bus);
        assert!(text.contains("polybus_publish_failed_total{service=\"shop\",bus=\"default\"} 0\n"), "{text}");
        assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("polybus_")), "{text}");
        assert_eq!(quoted("a\"b\\"), r#""a\"b\\""#);
        assert!(!bus.is_open());
    }
}
