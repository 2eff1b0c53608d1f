//! Counts of one process as Prometheus text.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bus::Bus;
use crate::subscription::{Counters, Subscription};

/// A counter of a subscription: name, kind, help, where it is kept, and what one unit is worth.
type Row = (&'static str, &'static str, &'static str, fn(&Counters) -> &AtomicU64, f64);

const ROWS: [Row; 11] = [
    ("handled_total", "counter", "Events that a handler finished.", |c| &c.completed, 1.0),
    ("failed_total", "counter", "Attempts that failed.", |c| &c.failed, 1.0),
    ("retried_total", "counter", "Retries that were scheduled.", |c| &c.retried, 1.0),
    ("dead_lettered_total", "counter", "Dead letters that were made.", |c| &c.dead_lettered, 1.0),
    ("dropped_total", "counter", "Events dropped because dead letters are off.", |c| &c.dropped, 1.0),
    ("released_total", "counter", "Deliveries handed back unfinished.", |c| &c.released, 1.0),
    ("timed_out_total", "counter", "Handlers that ran longer than their timeout.", |c| &c.timed_out, 1.0),
    ("leases_lost_total", "counter", "Leases that passed to another process.", |c| &c.leases_lost, 1.0),
    ("handler_seconds_total", "counter", "Time that handlers took.", |c| &c.busy_micros, 1e-6),
    ("running", "gauge", "Handlers that run now.", |c| &c.running, 1.0),
    ("buffered", "gauge", "Deliveries that wait for a free handler here.", |c| &c.buffered, 1.0),
];

/// The text that a metrics endpoint serves, for this bus in this process.
pub fn render(bus: &Bus) -> String {
    let mut out = String::new();
    let labels = format!("service={:?},bus={:?}", bus.options().service, bus.options().bus);
    let (published, failed) = bus.publish_counts();
    for (name, help, value) in [
        ("published_total", "Events published by this process.", published),
        ("publish_failed_total", "Events that could not be published.", failed),
    ] {
        head(&mut out, name, "counter", help);
        let _ = writeln!(out, "polybus_{name}{{{labels}}} {value}");
    }
    for (name, value) in bus.transport_counts() {
        head(&mut out, name, "counter", "Of this process's hold on the store; see docs/redis.md.");
        let _ = writeln!(out, "polybus_{name}{{{labels}}} {value}");
    }
    let subscriptions = bus.subscriptions();
    for (name, kind, help, counter, unit) in ROWS {
        head(&mut out, name, kind, help);
        for subscription in &subscriptions {
            let value = counter(subscription.counters()).load(Ordering::Relaxed) as f64 * unit;
            let _ = writeln!(out, "polybus_{name}{{{labels},{}}} {value}", of(subscription));
        }
    }
    out
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP polybus_{name} {help}\n# TYPE polybus_{name} {kind}");
}

fn of(subscription: &Subscription) -> String {
    format!("subscription={},group={}", quoted(subscription.name()), quoted(subscription.group()))
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
        assert!(text.contains("polybus_published_total{service=\"shop\",bus=\"default\"} 0\n"), "{text}");
        assert!(text.lines().all(|line| line.starts_with('#') || line.starts_with("polybus_")), "{text}");
        assert_eq!(quoted("a\"b\\"), r#""a\"b\\""#);
    }
}
