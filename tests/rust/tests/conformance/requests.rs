//! Requests and replies. Always two buses: what is tested is that they meet in the store.
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use polybus_conformance::*;
use polybus_core::bus::child_event;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Job, Outcome, from_fn};
use polybus_core::options::RequestOptions;
use polybus_core::{Bus, Error, ErrorKind, Event, Result, RetryPolicy, SubscribeOptions, Subscription};
use tokio::sync::Notify;

crate::behaviours![
    a_request_gets_its_reply: request,
    nobody_answers: request,
    an_unanswered_request_times_out_and_a_late_reply_is_dropped: request,
    the_first_of_several_replies_counts: request,
    a_reply_that_is_read_too_late_is_still_there: request,
    an_error_ends_the_request_at_once: request,
    what_is_no_payload_is_an_error: request,
    a_responder_may_try_again: request,
    a_responder_that_takes_too_long: request,
    a_request_that_nobody_took_in_time_expires: request,
    a_cancelled_request_is_forgotten: request,
    close_ends_what_waits: request,
    a_thousand_at_once: request,
    a_handler_may_ask: request,
    replies_are_no_events: request,
    an_ordinary_event_is_handled_without_a_reply: request,
    a_responder_is_no_broadcast: request,
];

fn reply(payload: impl Into<String>) -> Outcome {
    Outcome::Replied(payload.into().into())
}

async fn respond(
    bus: &Bus,
    pattern: &str,
    name: &str,
    say: impl Fn(&Job) -> Outcome + Send + Sync + 'static,
) -> Subscription {
    let handler = from_fn(move |job: Job| std::future::ready(say(&job)));
    bus.respond(pattern, handler, SubscribeOptions::responder(name)).await.unwrap()
}

async fn echo(bus: &Bus, pattern: &str) -> Subscription {
    respond(bus, pattern, "echo", |job| reply(payload(job))).await
}

async fn ask(bus: &Bus, event_type: &str, payload: &str) -> Result<Event> {
    within(bus.request(event(event_type, payload), RequestOptions { timeout: DEADLINE })).await
}

async fn ask_briefly(bus: &Bus, event_type: &str) -> Error {
    let options = RequestOptions { timeout: Duration::from_millis(150) };
    within(bus.request(event(event_type, "1"), options)).await.unwrap_err()
}

fn late(buses: [&Bus; 2]) -> u64 {
    buses.iter().map(|bus| bus.request_counts().late.load(Ordering::Relaxed)).sum()
}

async fn a_request_gets_its_reply(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    echo(&answering, "quote.*").await;
    let number = "123456789012345678901234567890.5";
    let request = event("quote.get", number).with_meta(|meta| {
        meta.user_id = Some("u".into());
        meta.correlation_id = Some("chain".into());
        meta.headers.push(("mine".into(), "x".into()));
    });
    let id = request.meta.id.clone();
    let reply = within(asking.request(request, RequestOptions::default())).await.unwrap();
    assert_eq!(&reply.payload[..], number.as_bytes());
    assert_eq!(reply.event_type.as_str(), "quote.get");
    assert_eq!(reply.meta.correlation_id.as_deref(), Some("chain"));
    assert_eq!(reply.meta.causation_id.as_deref(), Some(&*id));
    assert_eq!(reply.meta.user_id.as_deref(), Some("u"));
    assert_eq!(reply.meta.source.as_deref(), Some("test"));
    assert!(reply.meta.headers.is_empty(), "{:?}", reply.meta.headers);
    assert_eq!(late([&asking, &answering]), 0);
}

async fn nobody_answers(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    assert_eq!(ask(&asking, "a", "1").await.unwrap_err().kind(), ErrorKind::NoResponder);
    let _listener = listen(&answering, "**", "listens").await;
    let responder = echo(&answering, "a").await;
    assert_eq!(&ask(&asking, "a", "1").await.unwrap().payload[..], b"1");
    assert_eq!(ask(&asking, "b", "1").await.unwrap_err().kind(), ErrorKind::NoResponder);
    responder.drain(DEADLINE).await;
    assert_eq!(ask(&asking, "a", "1").await.unwrap_err().kind(), ErrorKind::NoResponder);
    echo(&answering, "a").await;
    assert_eq!(&ask(&asking, "a", "2").await.unwrap().payload[..], b"2");
}

async fn an_unanswered_request_times_out_and_a_late_reply_is_dropped(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let go = Arc::new(Notify::new());
    let wait = go.clone();
    let handler = from_fn(move |job: Job| {
        let wait = wait.clone();
        async move {
            if payload(&job) == "1" {
                wait.notified().await;
            }
            reply("0")
        }
    });
    answering.respond("a", handler, SubscribeOptions::responder("slow")).await.unwrap();
    // A reply may come just before its time is over and vanish before it is read: then nobody can count it.
    let deadline = std::time::Instant::now() + DEADLINE;
    while late([&asking, &answering]) == 0 {
        assert!(std::time::Instant::now() < deadline, "no late reply was counted");
        assert_eq!(ask_briefly(&asking, "a").await.kind(), ErrorKind::RequestTimeout);
        go.notify_one();
        finished(&answering, "test/slow").await;
    }
    assert_eq!(&ask(&asking, "a", "2").await.unwrap().payload[..], b"0");
    finished(&answering, "test/slow").await;
}

/// So that the requester's bus can count it.
async fn a_reply_that_is_read_too_late_is_still_there(world: World) {
    let answering = world.bus();
    echo(&answering, "a").await;
    let (mailbox, within_ms) = ("0123456789abcdef0123456789abcdef", 1000);
    let request = event("a", "1").with_meta(|meta| {
        meta.headers.push(("polybus-reply-to".into(), format!("{mailbox}.{mailbox}").into()));
        meta.headers.push(("polybus-reply-within".into(), within_ms.to_string().into()));
    });
    answering.publish(vec![outgoing(request)]).await.unwrap();
    let replies = || async { Ok(answering.request_counts().replies.load(Ordering::Relaxed) == 1) };
    eventually("it is answered", replies).await;
    tokio::time::sleep(Duration::from_millis(within_ms)).await; // time itself is what is waited for
    let store = world.transport().await;
    let letters = within(store.mailbox(mailbox.into()).unwrap().next()).await.unwrap();
    assert_eq!(letters.len(), 1);
    store.close().await;
}

async fn the_first_of_several_replies_counts(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let go = Arc::new(Notify::new());
    let wait = go.clone();
    let second = from_fn(move |_| {
        let wait = wait.clone();
        async move {
            wait.notified().await;
            reply("\"second\"")
        }
    });
    respond(&answering, "a", "first", |_| reply("\"first\"")).await;
    answering.respond("a", second, SubscribeOptions::responder("second")).await.unwrap();
    assert_eq!(&ask(&asking, "a", "1").await.unwrap().payload[..], b"\"first\"");
    go.notify_one();
    eventually("the second reply was counted", || async { Ok(late([&asking, &answering]) == 1) }).await;
    assert!(polybus_core::metrics::render(&asking).contains("polybus_replies_late_total{service=\"test\""));
}

async fn an_error_ends_the_request_at_once(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    respond(&answering, "a", "fails", move |job| {
        count.fetch_add(1, Ordering::SeqCst);
        let failure = Failure::new("OutOfStock", "none left ☃", "secret stack");
        match &*payload(job) {
            "1" => Outcome::Failed(failure),
            "2" => Outcome::Rejected(failure.coded(Some(ErrorKind::NotFound))),
            _ => Outcome::RetryAfter(DEADLINE, failure),
        }
    })
    .await;
    for (number, code) in [("1", None), ("2", Some("not_found")), ("3", None)] {
        let error = ask(&asking, "a", number).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HandlerError);
        let remote = error.remote().unwrap();
        assert_eq!((&*remote.kind, &*remote.message, remote.code.as_deref()), ("OutOfStock", "none left ☃", code));
        assert!(error.to_string().contains("OutOfStock: none left ☃"), "{error}");
        assert!(!format!("{error:?}").contains("secret"), "{error:?}");
    }
    finished(&answering, "test/fails").await;
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    assert_eq!(answering.dead_count(Default::default()).await.unwrap(), 0);
}

async fn what_is_no_payload_is_an_error(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    respond(&answering, "a", "odd", |job| reply(if payload(job) == "1" { "{".into() } else { "9".repeat(2 << 20) }))
        .await;
    for (number, code) in [("1", "invalid_event"), ("2", "payload_too_large")] {
        let error = ask(&asking, "a", number).await.unwrap_err();
        assert_eq!((error.kind(), error.remote().unwrap().code.as_deref()), (ErrorKind::HandlerError, Some(code)));
    }
}

async fn a_responder_may_try_again(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let handler = from_fn(|job: Job| {
        let last = if payload(&job) == "1" { 3 } else { 9 };
        std::future::ready(if job.attempt == last { reply(job.attempt.to_string()) } else { failed() })
    });
    let options = SubscribeOptions { retry: Some(quick(3)), ..SubscribeOptions::responder("again") };
    answering.respond("a", handler, options).await.unwrap();
    assert_eq!(&ask(&asking, "a", "1").await.unwrap().payload[..], b"3");
    assert_eq!(ask(&asking, "a", "2").await.unwrap_err().remote().unwrap().kind, "Trouble");
    assert_eq!(late([&asking, &answering]), 0);
}

async fn a_responder_that_takes_too_long(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let handler = from_fn(|_| std::future::pending());
    let timeout = Some(Duration::from_millis(20));
    let options = SubscribeOptions { timeout, ..SubscribeOptions::responder("hangs") };
    answering.respond("a", handler, options).await.unwrap();
    let error = ask(&asking, "a", "1").await.unwrap_err();
    assert_eq!(error.remote().unwrap().code.as_deref(), Some("handler_timeout"));
}

async fn a_request_that_nobody_took_in_time_expires(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    let responder = respond(&answering, "a", "pauses", move |job| {
        count.fetch_add(1, Ordering::SeqCst);
        reply(payload(job))
    })
    .await;
    responder.pause();
    for _ in 0..3 {
        assert_eq!(ask_briefly(&asking, "a").await.kind(), ErrorKind::RequestTimeout);
    }
    responder.resume();
    assert_eq!(&ask(&asking, "a", "2").await.unwrap().payload[..], b"2");
    finished(&answering, "test/pauses").await;
    // A take that is under way when it pauses may bring one, which is handed back and has lost its expiry.
    assert!(seen.load(Ordering::SeqCst) <= 2);
    assert_eq!(answering.dead_count(Default::default()).await.unwrap(), 0);
}

async fn a_cancelled_request_is_forgotten(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let (go, began) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (wait, begun) = (go.clone(), began.clone());
    let handler = from_fn(move |_| {
        let (wait, begun) = (wait.clone(), begun.clone());
        async move {
            begun.notify_one();
            wait.notified().await;
            reply("1")
        }
    });
    answering.respond("a", handler, SubscribeOptions::responder("slow")).await.unwrap();
    let request = tokio::spawn({
        let asking = asking.clone();
        async move { ask(&asking, "a", "1").await }
    });
    within(began.notified()).await;
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    go.notify_one();
    eventually("the reply that nobody wants was counted", || async { Ok(late([&asking, &answering]) == 1) }).await;
    finished(&answering, "test/slow").await;
}

async fn close_ends_what_waits(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let began = Arc::new(Notify::new());
    let begun = began.clone();
    let handler = from_fn(move |_| {
        begun.notify_one();
        std::future::pending()
    });
    answering.respond("a", handler, SubscribeOptions::responder("hangs")).await.unwrap();
    let request = tokio::spawn({
        let asking = asking.clone();
        async move { ask(&asking, "a", "1").await }
    });
    within(began.notified()).await;
    asking.close(Duration::ZERO).await;
    assert_eq!(within(request).await.unwrap().unwrap_err().kind(), ErrorKind::BusClosed);
    assert_eq!(ask(&asking, "a", "1").await.unwrap_err().kind(), ErrorKind::BusClosed);
    answering.close(Duration::ZERO).await;
    asking.start().await.unwrap();
    assert_eq!(ask(&asking, "a", "1").await.unwrap_err().kind(), ErrorKind::NoResponder);
    answering.start().await.unwrap();
    echo(&answering, "b").await;
    assert_eq!(&ask(&asking, "b", "2").await.unwrap().payload[..], b"2");
}

async fn a_thousand_at_once(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    echo(&answering, "a").await;
    let requests = (0..1000).map(|number: u32| {
        let asking = asking.clone();
        async move { (number, ask(&asking, "a", &number.to_string()).await.unwrap()) }
    });
    let replies = futures_util::future::join_all(requests.map(tokio::spawn)).await;
    for reply in replies {
        let (number, reply) = reply.unwrap();
        assert_eq!(&reply.payload[..], number.to_string().as_bytes());
    }
    assert_eq!(late([&asking, &answering]), 0);
}

async fn a_handler_may_ask(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    echo(&answering, "inner").await;
    let bus = answering.clone();
    let outer = from_fn(move |job: Job| {
        let bus = bus.clone();
        async move {
            let inner = child_event(&job.event, "inner", job.event.payload.clone(), None, 100).unwrap();
            let reply = bus.request(inner, RequestOptions { timeout: DEADLINE }).await.unwrap();
            Outcome::Replied(format!("[{:?}]", reply.meta.correlation_id.as_deref().unwrap()).into())
        }
    });
    answering.respond("outer", outer, SubscribeOptions::responder("outer")).await.unwrap();
    let request = event("outer", "1");
    let id = request.meta.id.clone();
    let reply = within(asking.request(request, RequestOptions { timeout: DEADLINE })).await.unwrap();
    assert_eq!(&reply.payload[..], format!("[{id:?}]").as_bytes());
}

async fn replies_are_no_events(world: World) {
    let (asking, answering) = (world.bus(), world.bus());
    let (_, mut seen) = listen(&answering, "**", "all").await;
    echo(&answering, "a").await;
    ask(&asking, "a", "1").await.unwrap();
    publish(&asking, "z", "2").await;
    let types: Vec<_> = seen.take(2).await.iter().map(|job| job.event.event_type.to_string()).collect();
    assert_eq!(types, ["a", "z"]);
}

async fn an_ordinary_event_is_handled_without_a_reply(world: World) {
    let bus = world.bus();
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    respond(&bus, "a", "both", move |job| {
        told.send(payload(job)).unwrap();
        reply("1")
    })
    .await;
    publish(&bus, "a", "7").await;
    assert_eq!(within(heard.recv()).await.unwrap(), "7");
    finished(&bus, "test/both").await;
    assert_eq!(bus.request_counts().replies.load(Ordering::Relaxed), 0);
}

async fn a_responder_is_no_broadcast(world: World) {
    let options = SubscribeOptions { broadcast: true, ..SubscribeOptions::responder("all") };
    let handler = from_fn(|_| std::future::ready(Outcome::Done));
    let error = world.bus().respond("a", handler, options).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::InvalidConfig);
    assert_eq!(SubscribeOptions::responder("a").retry, Some(RetryPolicy::NONE));
}
