//! Reading the log, the record of each event in each group, replay into one group, limits on the log, expiry.
use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

use polybus_conformance::*;
use polybus_core::delivery::{DeadReason, Failure};
use polybus_core::handler::Outcome;
use polybus_core::history::{HistoryEntry, HistoryFilter, Record, ReplayResult, Status};
use polybus_core::options::{HistoryQuery, ReplayOptions};
use polybus_core::transport::{Outgoing, Start};
use polybus_core::{Bus, BusOptions, ErrorKind, Pattern, Replay, SubscribeOptions};

crate::behaviours![
    history_lists_in_publish_order_and_pages: history,
    history_filters_by_pattern_and_time: history,
    history_of_several_partitions_is_one: history,
    history_refuses_what_cannot_be_meant: history,
    records_tell_how_far_each_group_is: history + dead_letters,
    records_leave_out_what_a_group_does_not_follow: history,
    replay_hands_to_one_group_only: history,
    replay_leaves_alone_what_is_not_finished: history,
    replay_goes_on_after_a_position: history,
    replay_of_several_partitions_is_whole: history,
    replay_obeys_the_groups_pattern: history,
    replay_by_time_does_not_mind_an_expiry: history,
    a_replayed_event_is_retried_and_buried_as_any: history + dead_letters,
    a_dead_letter_and_the_log_are_not_replayed_twice: history + dead_letters,
    replay_refuses_what_cannot_be_meant: history,
    a_limit_on_bytes_drops_and_counts: history,
    a_limit_on_the_number_drops_and_counts: history,
    expired_ones_are_dropped_and_counted: ack + delayed_publish,
    expired_ones_can_become_dead_letters: dead_letters + delayed_publish,
    without_a_log_there_is_no_history,
];

fn query() -> HistoryQuery {
    HistoryQuery { filter: HistoryFilter::default(), after: None, limit: 100, records: false }
}

fn of(pattern: &str) -> HistoryFilter {
    HistoryFilter { pattern: Some(Pattern::new(pattern).unwrap()), ..HistoryFilter::default() }
}

fn payloads(entries: &[HistoryEntry]) -> Vec<String> {
    let text = |entry: &HistoryEntry| String::from_utf8(entry.event.as_ref().unwrap().payload.to_vec()).unwrap();
    entries.iter().map(text).collect()
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

async fn replay(bus: &Bus, options: ReplayOptions) -> ReplayResult {
    within(Replay::new(bus.clone(), options).unwrap().run(|_| ())).await.unwrap()
}

async fn pages(bus: &Bus, limit: usize) -> Vec<HistoryEntry> {
    let (mut all, mut after): (Vec<HistoryEntry>, _) = (Vec::new(), None);
    loop {
        let page = bus.history(HistoryQuery { after, limit, ..query() }).await.unwrap();
        assert!(page.len() <= limit);
        let Some(last) = page.last() else { return all };
        after = Some(last.position.clone());
        all.extend(page);
    }
}

async fn publish_many(bus: &Bus, event_type: &str, range: std::ops::Range<usize>) {
    bus.publish(range.map(|number| outgoing(event(event_type, &number.to_string()))).collect()).await.unwrap();
}

/// Makes a group that follows `pattern` and leaves it without a member.
async fn make_group(bus: &Bus, pattern: &str, name: &str) {
    subscribe(bus, pattern, SubscribeOptions::new(name), |_| Outcome::Done).await.0.drain(DEADLINE).await;
}

async fn history_lists_in_publish_order_and_pages(world: World) {
    let bus = world.bus();
    assert!(bus.history(query()).await.unwrap().is_empty());
    let began = SystemTime::now() - Duration::from_secs(5);
    let mut receipts = Vec::new();
    for number in 0..25 {
        receipts.push(publish(&bus, "n", &number.to_string()).await);
    }
    let all = pages(&bus, 10).await;
    assert_eq!(payloads(&all), numbers(0..25));
    let positions: Vec<_> = all.iter().map(|entry| Some(entry.position.clone())).collect();
    assert_eq!(positions, receipts.iter().map(|receipt| receipt.position.clone()).collect::<Vec<_>>());
    assert!(all.iter().all(|entry| entry.event.as_ref().unwrap().meta.id.len() == 36 && entry.records.is_none()));
    assert!(all.iter().all(|entry| entry.published_at > began && entry.raw.is_none()));
    // A page that ends where the log ends, and what comes later.
    publish(&bus, "n", "25").await;
    let rest = bus.history(HistoryQuery { after: positions[24].clone(), ..query() }).await.unwrap();
    assert_eq!(payloads(&rest), ["25"]);
}

async fn history_filters_by_pattern_and_time(world: World) {
    let bus = world.bus();
    publish(&bus, "order.placed", "0").await;
    publish(&bus, "user.created", "1").await;
    tokio::time::sleep(Duration::from_millis(20)).await; // time itself is what is waited for
    let middle = SystemTime::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    publish(&bus, "order.sent", "2").await;
    publish(&bus, "user.deleted", "3").await;
    for (filter, expected) in [
        (of("order.*"), vec!["0", "2"]),
        (of("user.deleted"), vec!["3"]),
        (of("nothing"), vec![]),
        (HistoryFilter { since: Some(middle), ..HistoryFilter::default() }, vec!["2", "3"]),
        (HistoryFilter { until: Some(middle), ..HistoryFilter::default() }, vec!["0", "1"]),
        (HistoryFilter { since: Some(middle), ..of("order.*") }, vec!["2"]),
        (HistoryFilter { since: Some(middle), until: Some(middle), pattern: None }, vec![]),
        (HistoryFilter { until: Some(SystemTime::UNIX_EPOCH), ..HistoryFilter::default() }, vec![]),
    ] {
        let found = bus.history(HistoryQuery { filter: filter.clone(), ..query() }).await.unwrap();
        assert_eq!(payloads(&found), expected, "{filter:?}");
    }
}

/// Without partitions the transport ignores the number.
async fn history_of_several_partitions_is_one(world: World) {
    let bus = world.bus_with(BusOptions { partitions: Some(3), ..BusOptions::new("test") });
    publish_numbers(&bus, "n", 60).await;
    let all = pages(&bus, 7).await;
    let seen: HashSet<_> = payloads(&all).into_iter().collect();
    assert_eq!((all.len(), seen.len()), (60, 60));
    assert!(all.windows(2).all(|pair| pair[0].published_at <= pair[1].published_at));
}

async fn history_refuses_what_cannot_be_meant(world: World) {
    let bus = world.bus();
    let now = SystemTime::now();
    let backwards = HistoryFilter { since: Some(now), until: Some(now - Duration::from_secs(1)), pattern: None };
    for wrong in [
        HistoryQuery { filter: backwards, ..query() },
        HistoryQuery { limit: 0, ..query() },
        HistoryQuery { after: Some("yesterday".into()), ..query() },
        HistoryQuery { after: Some("".into()), ..query() },
        HistoryQuery { after: Some("-1".into()), ..query() },
    ] {
        assert_eq!(bus.history(wrong.clone()).await.unwrap_err().kind(), ErrorKind::InvalidConfig, "{wrong:?}");
    }
    bus.close(DEADLINE).await;
    assert_eq!(bus.history(query()).await.unwrap_err().kind(), ErrorKind::BusClosed);
}

async fn without_a_log_there_is_no_history(world: World) {
    let bus = world.bus();
    let can = bus.capabilities().await.unwrap();
    if !can.history {
        assert_eq!(bus.history(query()).await.unwrap_err().kind(), ErrorKind::Unsupported);
        let mut replay = Replay::new(bus, ReplayOptions::new("test/s")).unwrap();
        assert_eq!(replay.next().await.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

async fn records(bus: &Bus, position: usize) -> HashMap<String, Record> {
    let entries = bus.history(HistoryQuery { records: true, ..query() }).await.unwrap();
    let records = entries[position].records.clone().unwrap();
    records.into_iter().map(|record| (record.group.to_string(), record)).collect()
}

async fn records_tell_how_far_each_group_is(world: World) {
    let bus = world.bus();
    make_group(&bus, "n", "away").await;
    let stuck = polybus_core::handler::from_fn(|_| std::future::pending());
    bus.subscribe("n", stuck, SubscribeOptions::new("stuck")).await.unwrap();
    let (_done, mut done) = listen(&bus, "n", "done").await;
    let later = |_: &_| Outcome::RetryAfter(Duration::from_secs(600), Failure::new("Busy", "not now", ""));
    let (_later, mut waits) = subscribe(&bus, "n", SubscribeOptions::new("later"), later).await;
    let never = |_: &_| Outcome::Rejected(Failure::new("No", "never", ""));
    let (_never, mut refused) = subscribe(&bus, "n", SubscribeOptions::new("never"), never).await;
    let before = SystemTime::now();
    publish(&bus, "n", "0").await;
    tokio::join!(done.next(), waits.next(), refused.next());
    eventually("all got as far as they get", || async {
        let found = records(&bus, 0).await;
        let status = |name: &str| found[name].status;
        Ok(status("test/done") == Status::Completed
            && status("test/stuck") == Status::Processing
            && status("test/later") == Status::Failed
            && status("test/never") == Status::Failed)
    })
    .await;
    let found = records(&bus, 0).await;
    assert_eq!(found.len(), 5);
    let away = &found["test/away"];
    assert_eq!((away.status, away.attempts, &away.error), (Status::Pending, Some(0), &None));
    assert_eq!(found["test/stuck"].attempts, Some(1));
    assert_eq!((found["test/done"].attempts, found["test/done"].completed_at), (None, None));
    let later = &found["test/later"];
    assert_eq!((later.attempts, &later.dead_letter), (Some(1), &None));
    assert!(later.retry_at.unwrap() > before + Duration::from_secs(500) && later.first_failed_at.is_some());
    // Redis does not keep the error of what is tried again.
    assert!(later.error.as_ref().is_none_or(|error| error.kind == "Busy"));
    let never = &found["test/never"];
    assert_eq!((never.attempts, never.reason, never.retry_at), (Some(1), Some(DeadReason::Rejected), None));
    assert_eq!(never.error.as_ref().unwrap().message, "never");
    assert!(never.last_failed_at.is_some());
    bus.dead_letter(never.dead_letter.as_ref().unwrap()).await.unwrap();
    bus.close(Duration::ZERO).await;
}

async fn records_leave_out_what_a_group_does_not_follow(world: World) {
    let bus = world.bus();
    publish(&bus, "n", "0").await;
    tokio::time::sleep(Duration::from_millis(5)).await; // Redis tells when a group was made to the millisecond
    make_group(&bus, "other", "other").await;
    make_group(&bus, "n", "new").await;
    subscribe(&bus, "n", SubscribeOptions { start: Start::Beginning, ..SubscribeOptions::new("old") }, |_| {
        Outcome::Done
    })
    .await
    .1
    .next()
    .await;
    finished(&bus, "test/old").await;
    publish(&bus, "n", "1").await;
    let names = |found: HashMap<String, Record>| found.into_keys().collect::<HashSet<_>>();
    assert_eq!(names(records(&bus, 0).await), HashSet::from(["test/old".to_owned()]));
    assert_eq!(names(records(&bus, 1).await), HashSet::from(["test/old".to_owned(), "test/new".to_owned()]));
}

async fn replay_hands_to_one_group_only(world: World) {
    let bus = world.bus();
    let (_one, mut one) = listen(&bus, "n", "one").await;
    let (_two, mut two) = listen(&bus, "n", "two").await;
    publish_numbers(&bus, "n", 20).await;
    let ids: Vec<_> = one.take(20).await.iter().map(|job| job.event.meta.id.clone()).collect();
    two.take(20).await;
    finished(&bus, "test/one").await;
    finished(&bus, "test/two").await;
    let result = replay(&bus, ReplayOptions::new("test/one")).await;
    assert_eq!((result.count, result.skipped, result.done), (20, 0, true));
    let again = one.take(20).await;
    assert!(again.iter().all(|job| job.attempt == 1));
    let again: HashSet<_> = again.into_iter().map(|job| job.event.meta.id.clone()).collect();
    assert_eq!(again, ids.into_iter().collect());
    finished(&bus, "test/one").await;
    // What comes last shows that nothing else came before it.
    publish(&bus, "n", "20").await;
    assert_eq!((payload(&one.next().await), payload(&two.next().await)), ("20".into(), "20".into()));
}

async fn replay_leaves_alone_what_is_not_finished(world: World) {
    let bus = world.bus();
    let later = |job: &polybus_core::handler::Job| match payload(job).as_str() {
        "0" => Outcome::RetryAfter(Duration::from_secs(600), Failure::default()),
        _ => Outcome::Done,
    };
    let options = || SubscribeOptions { concurrency: Some(1), ..SubscribeOptions::new("s") };
    let (subscription, mut seen) = subscribe(&bus, "n", options(), later).await;
    publish_many(&bus, "n", 0..5).await;
    seen.all_numbers(5).await;
    eventually("only the retry is left", || async {
        let stats = bus.group_stats("test/s").await?;
        Ok((stats.lag, stats.in_flight, stats.retrying) == (0, 0, 1))
    })
    .await;
    subscription.drain(DEADLINE).await;
    publish_many(&bus, "n", 5..8).await; // not given to the group yet
    let first = replay(&bus, ReplayOptions::new("test/s")).await;
    assert_eq!(first.count, 4, "{first:?}");
    let second = replay(&bus, ReplayOptions::new("test/s")).await;
    assert_eq!((second.count, second.done), (0, true), "they wait already: {second:?}");
    let (_s, mut seen) = subscribe(&bus, "n", options(), later).await;
    let given: Vec<_> = seen.take(7).await.iter().map(payload).collect();
    assert_eq!(given, numbers(1..8), "in the order of the log");
    eventually("only the retry is left", || async {
        let stats = bus.group_stats("test/s").await?;
        Ok((stats.lag, stats.in_flight, stats.retrying) == (0, 0, 1))
    })
    .await;
    assert!(seen.is_empty());
}

async fn replay_goes_on_after_a_position(world: World) {
    let bus = world.bus();
    let (subscription, mut seen) = listen(&bus, "n", "s").await;
    publish_many(&bus, "n", 0..1200).await;
    seen.all_numbers(1200).await;
    finished(&bus, "test/s").await;
    subscription.drain(DEADLINE).await;
    let first = replay(&bus, ReplayOptions { limit: Some(70), ..ReplayOptions::new("test/s") }).await;
    assert_eq!((first.count, first.done), (70, false));
    // In batches, and it may be left between two of them.
    let options = || ReplayOptions { after: first.position.clone(), ..ReplayOptions::new("test/s") };
    let mut left = Replay::new(bus.clone(), options()).unwrap();
    let step = within(left.next()).await.unwrap().unwrap();
    assert!(step.count > 0 && step.count < 1130 && !step.done, "{step:?}");
    let mut told = Vec::new();
    let rest = ReplayOptions { after: step.position.clone(), ..ReplayOptions::new("test/s") };
    let rest = Replay::new(bus.clone(), rest).unwrap().run(|progress| told.push(progress.clone()));
    let rest = within(rest).await.unwrap();
    assert_eq!((70 + step.count + rest.count, rest.skipped, rest.done), (1200, 0, true));
    assert!(told.windows(2).all(|pair| pair[0].count <= pair[1].count));
    assert_eq!(told.last(), Some(&rest));
    let (_s, mut seen) = listen(&bus, "n", "s").await;
    let again: HashSet<_> = seen.take(1200).await.iter().map(payload).collect();
    assert_eq!(again.len(), 1200);
    finished(&bus, "test/s").await;
    assert!(seen.is_empty());
    let nothing = ReplayOptions { after: rest.position.clone(), ..ReplayOptions::new("test/s") };
    let nothing = replay(&bus, nothing).await;
    assert_eq!((nothing.count, nothing.position, nothing.done), (0, rest.position, true));
}

async fn replay_of_several_partitions_is_whole(world: World) {
    let bus = world.bus_with(BusOptions { partitions: Some(3), ..BusOptions::new("test") });
    let (_s, mut seen) = listen(&bus, "n", "s").await;
    publish_many(&bus, "n", 0..700).await;
    seen.all_numbers(700).await;
    finished(&bus, "test/s").await;
    let mut steps = 0;
    let run = Replay::new(bus.clone(), ReplayOptions::new("test/s")).unwrap().run(|_| steps += 1);
    assert_eq!(within(run).await.unwrap().count, 700);
    assert!(steps > 1);
    seen.all_numbers(700).await;
}

async fn replay_obeys_the_groups_pattern(world: World) {
    let bus = world.bus();
    let (_s, mut seen) = listen(&bus, "order.*", "s").await;
    for (event_type, number) in
        [("order.placed", "0"), ("user.created", "1"), ("order.sent", "2"), ("order.placed", "3")]
    {
        publish(&bus, event_type, number).await;
    }
    seen.take(3).await;
    finished(&bus, "test/s").await;
    let some = |pattern: &str| ReplayOptions { filter: of(pattern), ..ReplayOptions::new("test/s") };
    assert_eq!(replay(&bus, some("nothing.*")).await.count, 0);
    assert_eq!(replay(&bus, some("user.*")).await.count, 0, "the group does not follow these");
    assert_eq!(replay(&bus, some("order.placed")).await.count, 2);
    let again: HashSet<_> = seen.take(2).await.iter().map(payload).collect();
    assert_eq!(again, HashSet::from(["0".to_owned(), "3".to_owned()]));
    finished(&bus, "test/s").await;
    assert_eq!(replay(&bus, some("*")).await.count, 3);
    seen.take(3).await;
}

async fn replay_by_time_does_not_mind_an_expiry(world: World) {
    let bus = world.bus();
    let (_s, mut seen) = listen(&bus, "n", "s").await;
    publish(&bus, "n", "0").await;
    tokio::time::sleep(Duration::from_millis(20)).await; // time itself is what is waited for
    let since = SystemTime::now();
    tokio::time::sleep(Duration::from_millis(20)).await;
    let short = Outgoing { expires_in: Some(Duration::from_secs(4)), ..outgoing(event("n", "1")) };
    bus.publish(vec![short]).await.unwrap();
    seen.take(2).await;
    finished(&bus, "test/s").await;
    tokio::time::sleep(Duration::from_millis(4100)).await; // likewise
    let filter = HistoryFilter { since: Some(since), ..HistoryFilter::default() };
    assert_eq!(replay(&bus, ReplayOptions { filter, ..ReplayOptions::new("test/s") }).await.count, 1);
    assert_eq!(payload(&seen.next().await), "1");
    finished(&bus, "test/s").await;
    assert_eq!(bus.group_stats("test/s").await.unwrap().expired, 0);
}

async fn a_replayed_event_is_retried_and_buried_as_any(world: World) {
    let bus = world.bus();
    let (subscription, mut seen) = listen(&bus, "n", "s").await;
    publish(&bus, "n", "0").await;
    let first = seen.next().await;
    finished(&bus, "test/s").await;
    subscription.drain(DEADLINE).await;
    assert_eq!(replay(&bus, ReplayOptions::new("test/s")).await.count, 1);
    let (_s, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("s"), |_| failed()).await;
    let attempts: Vec<_> = seen.take(4).await.iter().map(|job| job.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 4]);
    eventually("it is a dead letter", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    let letter = bus.dead_letters(Default::default(), None, 1).await.unwrap().remove(0);
    assert_eq!((letter.attempts, letter.event.as_ref().unwrap().meta.id.clone()), (4, first.event.meta.id.clone()));
}

async fn a_dead_letter_and_the_log_are_not_replayed_twice(world: World) {
    let bus = world.bus();
    let (subscription, mut seen) =
        subscribe(&bus, "n", SubscribeOptions::new("s"), |_| Outcome::Rejected(Failure::default())).await;
    publish(&bus, "n", "0").await;
    seen.next().await;
    eventually("it is a dead letter", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    subscription.drain(DEADLINE).await;
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    let log = replay(&bus, ReplayOptions::new("test/s")).await;
    assert_eq!((log.count, log.skipped), (0, 1));
    assert_eq!(records(&bus, 0).await["test/s"].status, Status::Pending);
}

async fn replay_refuses_what_cannot_be_meant(world: World) {
    let bus = world.bus();
    make_group(&bus, "n", "mail").await;
    let now = SystemTime::now();
    let backwards = HistoryFilter { since: Some(now), until: Some(now - Duration::from_secs(1)), pattern: None };
    let options = || ReplayOptions::new("test/mail");
    for wrong in [ReplayOptions { limit: Some(0), ..options() }, ReplayOptions { filter: backwards, ..options() }] {
        assert_eq!(Replay::new(bus.clone(), wrong).err().unwrap().kind(), ErrorKind::InvalidConfig);
    }
    let next = |options| {
        let bus = bus.clone();
        async move { within(Replay::new(bus, options).unwrap().next()).await.unwrap_err() }
    };
    let wrong = next(ReplayOptions { after: Some("x".into()), ..options() }).await;
    assert_eq!(wrong.kind(), ErrorKind::InvalidConfig);
    let unknown = next(ReplayOptions::new("test/mial")).await;
    assert_eq!(unknown.kind(), ErrorKind::NotFound);
    assert!(unknown.message().contains("did you mean \"test/mail\"?"), "{unknown}");
    bus.close(DEADLINE).await;
    assert_eq!(next(options()).await.kind(), ErrorKind::BusClosed);
}

/// An unread event of about a kilobyte.
fn heavy(number: usize) -> Outgoing {
    outgoing(event("n", &format!("\"{number:01000}\"")))
}

async fn a_limit_on_bytes_drops_and_counts(world: World) {
    let limits = BusOptions {
        max_bytes: Some(50_000),
        retention: Some(Duration::from_secs(2)), // looks soon enough
        ..BusOptions::new("test")
    };
    let bus = world.bus_with(limits);
    make_group(&bus, "n", "away").await;
    bus.publish((0..100).map(heavy).collect()).await.unwrap();
    eventually("the oldest are dropped", || async {
        let stats = bus.group_stats("test/away").await?;
        Ok(stats.lag <= 50 && stats.lag + stats.expired == 100 && pages(&bus, 100).await.len() as u64 == stats.lag)
    })
    .await;
    let left = pages(&bus, 100).await;
    // What a kilobyte needs differs: Redis measures the blocks of its memory.
    assert!((10..=50).contains(&left.len()), "{}", left.len());
    assert_eq!(payloads(&left).last().unwrap().trim_matches(['"', '0']), "99");
}

async fn a_limit_on_the_number_drops_and_counts(world: World) {
    let limits =
        BusOptions { max_events: Some(10), retention: Some(Duration::from_secs(2)), ..BusOptions::new("test") };
    let bus = world.bus_with(limits);
    make_group(&bus, "n", "away").await;
    publish_many(&bus, "n", 0..30).await;
    eventually("the oldest are dropped", || async { Ok(bus.group_stats("test/away").await?.expired == 20) }).await;
    assert_eq!(payloads(&pages(&bus, 100).await), numbers(20..30));
    let (_away, mut away) = listen(&bus, "n", "away").await;
    let mut rest: Vec<_> = away.take(10).await.iter().map(payload).collect();
    rest.sort();
    assert_eq!(rest, numbers(20..30));
}

/// Publishes one event that expires before the groups `test/plain` and `test/kept` have a member again.
async fn publish_late(bus: &Bus) {
    make_group(bus, "n", "plain").await;
    make_group(bus, "n", "kept").await;
    let late = Outgoing { expires_in: Some(Duration::from_millis(1)), ..outgoing(event("n", "0")) };
    bus.publish(vec![late]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await; // time itself is what is waited for
    publish(bus, "n", "1").await;
}

async fn expired_ones_are_dropped_and_counted(world: World) {
    let bus = world.bus();
    publish_late(&bus).await;
    let (_plain, mut seen) = listen(&bus, "n", "plain").await;
    assert_eq!(payload(&seen.next().await), "1");
    eventually("it is counted", || async { Ok(bus.group_stats("test/plain").await?.expired == 1) }).await;
    assert_eq!(bus.group_stats("test/plain").await.unwrap().dead, 0);
}

async fn expired_ones_can_become_dead_letters(world: World) {
    let bus = world.bus();
    publish_late(&bus).await;
    let options = SubscribeOptions { dead_letter_expired: true, ..SubscribeOptions::new("kept") };
    let (kept, mut seen) = subscribe(&bus, "n", options, |_| Outcome::Done).await;
    assert_eq!(payload(&seen.next().await), "1");
    eventually("it is a dead letter", || async { Ok(bus.dead_count(Default::default()).await? == 1) }).await;
    let letter = bus.dead_letters(Default::default(), None, 1).await.unwrap().remove(0);
    assert_eq!((letter.reason, letter.attempts, &*letter.group), (DeadReason::Expired, 0, "test/kept"));
    finished(&bus, "test/kept").await;
    let stats = bus.group_stats("test/kept").await.unwrap();
    assert_eq!((stats.dead, stats.expired), (1, 0));
    assert_eq!(kept.counters().dead_lettered.load(std::sync::atomic::Ordering::SeqCst), 1);
    // Somebody decided that it shall be handled all the same.
    assert_eq!(bus.dead_replay(Default::default()).await.unwrap(), 1);
    assert_eq!(payload(&seen.next().await), "0");
}
