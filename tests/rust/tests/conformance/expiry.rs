//! Events whose time ends after a handler got them once: they expire as at first sight.
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::bus::new_event;
use polybus_core::delivery::{DeadReason, Failure, Verdict};
use polybus_core::event::Text;
use polybus_core::handler::{Job, Outcome};
use polybus_core::transport::{Outgoing, Settlement};
use polybus_core::{Bus, BusOptions, SubscribeOptions};

crate::behaviours![
    what_expires_before_its_retry_is_not_retried: ack + delayed_retry + delayed_publish + dead_letters,
    what_expires_after_it_was_given_back_is_not_handled: ack + delayed_publish + dead_letters,
    what_expires_in_a_dead_owners_hands_is_not_handled: cross_process + ack + delayed_publish + dead_letters,
];

/// Long enough for a first delivery.
const SHORT: Duration = Duration::from_secs(2);

/// One group of each kind that this transport has.
async fn kinds(bus: &Bus) -> Vec<SubscribeOptions> {
    let mut kinds = Vec::new();
    for ordered in [false, true] {
        if ordered && !bus.capabilities().await.unwrap().ordered {
            continue;
        }
        for dead_letter_expired in [false, true] {
            let name = format!("s-{ordered}-{dead_letter_expired}");
            kinds.push(SubscribeOptions { ordered, dead_letter_expired, ..SubscribeOptions::new(name) });
        }
    }
    kinds
}

/// Two events that expire, one of them with a partition key.
async fn publish_short(bus: &Bus) {
    let keyed = new_event("n", "1".into(), Some(br#"{"partitionKey":"k"}"#), 1 << 20).unwrap();
    let short = |event| Outgoing { expires_in: Some(SHORT), ..outgoing(event) };
    bus.publish(vec![short(event("n", "0")), short(keyed)]).await.unwrap();
}

/// Both have expired in that group after `attempts`, and none was handled again.
async fn both_expire(bus: &Bus, options: &SubscribeOptions, attempts: u32) {
    let group: Text = format!("test/{}", options.name).into();
    let dead = if options.dead_letter_expired { 2 } else { 0 };
    eventually("both have expired", || async {
        let stats = bus.group_stats(&group).await?;
        Ok((stats.dead, stats.expired) == (dead, 2 - dead))
    })
    .await;
    finished(bus, &group).await;
    let filter = polybus_core::dead_letter::DeadLetterFilter { group: Some(group), ..Default::default() };
    for letter in bus.dead_letters(filter, None, 9).await.unwrap() {
        assert_eq!((letter.reason, letter.attempts, letter.replayed_from), (DeadReason::Expired, attempts, None));
    }
}

async fn what_expires_before_its_retry_is_not_retried(world: World) {
    let bus = world.bus();
    let mut groups = Vec::new();
    for options in kinds(&bus).await {
        let late = |_: &Job| Outcome::RetryAfter(SHORT, Failure::new("Trouble", "later", ""));
        groups.push((options.clone(), subscribe(&bus, "n", options, late).await));
    }
    publish_short(&bus).await;
    for (options, (_, seen)) in &mut groups {
        seen.take(2).await;
        both_expire(&bus, options, 1).await;
        assert!(seen.is_empty(), "{options:?}");
    }
}

async fn what_expires_after_it_was_given_back_is_not_handled(world: World) {
    let (first, second) = (world.bus(), world.bus());
    let mut groups = Vec::new();
    for options in kinds(&first).await {
        let (_, seen) = attend(&first, "n", options.clone(), |_| std::future::pending()).await;
        groups.push((options, seen));
    }
    second.start().await.unwrap();
    publish_short(&second).await;
    for (_, seen) in &mut groups {
        seen.take(2).await;
    }
    first.close(Duration::ZERO).await;
    tokio::time::sleep(SHORT).await; // time itself is what is waited for
    for (options, _) in groups {
        let (_, seen) = subscribe(&second, "n", options.clone(), |_| Outcome::Done).await;
        both_expire(&second, &options, 0).await;
        assert!(seen.is_empty(), "{options:?}");
    }
}

/// It was given back before, and taken again.
async fn what_expires_in_a_dead_owners_hands_is_not_handled(world: World) {
    let bus = world.bus_with(BusOptions { lease: Duration::from_secs(1), ..BusOptions::new("test") });
    let dead = world.transport().await;
    let (kinds, mut sources) = (kinds(&bus).await, Vec::new());
    for options in &kinds {
        sources.push(dead.subscribe(world.spec("n", &options.name, options.ordered)).await.unwrap());
    }
    publish_short(&bus).await;
    for source in &sources {
        for verdict in [Some(Verdict::Release), None] {
            let mut leases = Vec::new();
            while leases.len() < 2 {
                leases.extend(within(source.take(2)).await.unwrap().into_iter().map(|delivery| delivery.lease));
            }
            if let Some(verdict) = verdict {
                let back = |lease| Settlement { lease, verdict: verdict.clone() };
                assert!(source.settle(leases.into_iter().map(back).collect()).await.unwrap().is_empty());
            }
        }
    }
    std::mem::forget((sources, dead)); // neither would ever leave its group
    tokio::time::sleep(SHORT).await; // time itself is what is waited for
    for options in kinds {
        let (_, seen) = subscribe(&bus, "n", options.clone(), |_| Outcome::Done).await;
        both_expire(&bus, &options, 1).await;
        assert!(seen.is_empty(), "{options:?}");
    }
}
