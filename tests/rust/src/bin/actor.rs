//! The Rust actor of the interoperability tests: obeys one JSON command a line on standard input, tells what happens
//! on standard output. `tests/interop/README.md` has the protocol.
#![allow(clippy::unwrap_used, reason = "a test program")]

use std::io::{BufRead, Write};
use std::time::Duration;

use polybus_conformance::quick;
use polybus_core::bus::new_event;
use polybus_core::codec;
use polybus_core::delivery::Failure;
use polybus_core::handler::{Outcome, from_fn};
use polybus_core::options::RequestOptions;
use polybus_core::transport::Outgoing;
use polybus_core::{Bus, BusOptions, Event, SubscribeOptions};
use serde_json::{Value, json};

fn tell(value: &Value) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}").unwrap();
    out.flush().unwrap();
}

/// The event without its payload, which need not fit into a `Value`.
fn wire(event: &Event) -> Value {
    let bare = Event::new(event.event_type.clone(), "null".into(), event.meta.clone());
    serde_json::from_slice(&codec::encode(&bare).unwrap()).unwrap()
}

fn text(event: &Event) -> String {
    String::from_utf8(event.payload.to_vec()).unwrap()
}

#[tokio::main]
async fn main() {
    let [url, bus] = <[String; 2]>::try_from(std::env::args().skip(1).collect::<Vec<_>>()).unwrap();
    let bus = Bus::new(&url, BusOptions { bus, lease: Duration::from_secs(1), ..BusOptions::new("rust") }).unwrap();
    bus.start().await.unwrap();
    tell(&json!({"ready": true}));
    let (sender, mut commands) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            sender.send(serde_json::from_str::<Value>(&line.unwrap()).unwrap()).unwrap();
        }
    });
    while let Some(command) = commands.recv().await {
        obey(&bus, &command).await;
    }
    bus.close(Duration::from_secs(5)).await;
}

async fn obey(bus: &Bus, command: &Value) {
    match command["do"].as_str().unwrap() {
        "publish" => {
            let payload = command["payload"].as_str().unwrap().to_owned();
            let meta = command["meta"].to_string();
            let event =
                new_event(command["type"].as_str().unwrap(), payload.into(), Some(meta.as_bytes()), 1 << 20).unwrap();
            let batch = vec![Outgoing { event, delay: None, expires_in: None }];
            tell(&json!({"published": *bus.publish(batch).await.unwrap()[0].id}));
        }
        "subscribe" => {
            let fail = command["fail"].as_bool().unwrap_or(false);
            let hang = command["hang"].as_bool().unwrap_or(false);
            let handler = from_fn(move |job| {
                tell(&json!({"saw": wire(&job.event), "payload": text(&job.event), "attempt": job.attempt}));
                async move {
                    if hang {
                        std::future::pending::<()>().await;
                    }
                    let failure = Failure::new("Trouble", "as the test wants ☃", "");
                    if fail { Outcome::Failed(failure) } else { Outcome::Done }
                }
            });
            let options = SubscribeOptions {
                group: Some(command["group"].as_str().unwrap().into()),
                retry: Some(quick(1)),
                ..SubscribeOptions::new(command["name"].as_str().unwrap())
            };
            bus.subscribe(command["pattern"].as_str().unwrap(), handler, options).await.unwrap();
            tell(&json!({"subscribed": command["name"]}));
        }
        "respond" => {
            let fail = command["fail"].as_bool().unwrap_or(false);
            let hang = command["hang"].as_bool().unwrap_or(false);
            let handler = from_fn(move |job| {
                tell(&json!({"saw": wire(&job.event)}));
                async move {
                    if hang {
                        std::future::pending::<()>().await;
                    }
                    let reply = format!(r#"{{"by":"rust","got":{}}}"#, text(&job.event));
                    let failure = Failure::new("Trouble", "as the test wants ☃", "");
                    if fail { Outcome::Failed(failure) } else { Outcome::Replied(reply.into()) }
                }
            });
            let options = SubscribeOptions::responder(command["name"].as_str().unwrap());
            bus.respond(command["pattern"].as_str().unwrap(), handler, options).await.unwrap();
            tell(&json!({"responding": command["name"]}));
        }
        "request" => {
            let payload = command["payload"].as_str().unwrap().to_owned();
            let request = new_event(command["type"].as_str().unwrap(), payload.into(), None, 1 << 20).unwrap();
            let id = request.meta.id.to_string();
            let options = RequestOptions { timeout: Duration::from_millis(command["timeoutMs"].as_u64().unwrap()) };
            match bus.request(request, options).await {
                Ok(reply) => {
                    let event: Value = serde_json::from_slice(&codec::encode(&reply).unwrap()).unwrap();
                    tell(&json!({"replied": {"event": event, "request": id}}));
                }
                Err(error) => {
                    let remote = error.remote().map(|remote| &remote.message);
                    tell(&json!({"refused": {"code": error.kind().code(), "remote": remote}}));
                }
            }
        }
        "unsubscribe" => {
            for subscription in bus.subscriptions() {
                subscription.drain(Duration::from_secs(5)).await;
            }
            tell(&json!({"unsubscribed": true}));
        }
        "dead" => {
            let letters = bus.dead_letters(Default::default(), None, 100).await.unwrap();
            let letters = letters.iter().map(|letter| {
                let event = letter.event.as_ref().unwrap();
                json!({"event": wire(event), "payload": text(event), "reason": letter.reason.as_str(), "attempts": letter.attempts,
                    "group": *letter.group, "error": letter.error.message})
            });
            tell(&json!({"dead": letters.collect::<Vec<_>>()}));
        }
        "replay" => tell(&json!({"replayed": bus.dead_replay(Default::default()).await.unwrap()})),
        other => panic!("unknown command {other}"),
    }
}
