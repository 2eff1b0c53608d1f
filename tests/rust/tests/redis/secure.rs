//! Passwords, permissions and certificates.
use polybus_conformance::certificates::Certificates;
use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::handler::{Job, Outcome, from_fn};
use polybus_core::options::RequestOptions;
use polybus_core::{Error, ErrorKind, SubscribeOptions};

use crate::support::*;

const SECRET: &str = "s3cr3t-p4ss";

#[track_caller]
fn assert_secret(error: &Error) {
    assert!(!format!("{error} {error:?} {error:#?}").contains(SECRET), "{error:?}");
}

#[tokio::test]
async fn a_wrong_password_is_refused_and_not_told() {
    let server = RedisServer::with(Options { password: Some("right"), ..Options::default() });
    for login in [format!(":{SECRET}@"), format!("default:{SECRET}@"), format!("nobody:{SECRET}@"), String::new()] {
        let bus = hasty(&format!("redis://{login}{}", server.address()));
        let error = not_opened(&bus).await;
        assert_error(&error, ErrorKind::AuthFailed, &["password"]);
        assert_secret(&error);
        assert!(!bus.url().contains(SECRET));
    }
    publish(&bus(&server.url()), "n", "1").await;
}

/// Nobody who is connected is thrown out, but nobody comes back: until the old password holds again.
#[tokio::test]
async fn a_password_that_changes_while_we_run() {
    let mut server = RedisServer::with(Options { password: Some(SECRET), ..Options::default() });
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish(&bus, "n", "0").await;
    seen.next().await;
    let mut administrator = Administrator::of(&server);
    let mut tell = |words: &str| administrator.tell(words);
    tell(&format!("AUTH {SECRET}"));
    tell("CONFIG SET requirepass other");
    tell("CLIENT KILL TYPE normal SKIPME yes");
    let error = refused_at_last(&bus).await;
    assert_error(&error, ErrorKind::AuthFailed, &["password"]);
    assert_secret(&error);
    assert_eq!(refused(&bus).await.kind(), ErrorKind::AuthFailed);
    tell(&format!("CONFIG SET requirepass {SECRET}"));
    publish_at_last(&bus, "n", "1").await;
    assert_eq!(payload(&seen.next().await), "1");
    server.stop();
    assert_secret(&refused_at_last(&bus).await);
}

/// Each of these permissions is missing in turn.
#[tokio::test]
async fn a_missing_permission_is_named() {
    let server = RedisServer::start();
    let url = format!("redis://worker:{SECRET}@{}", server.address());
    let user = |more: &[&str]| {
        let base = ["ACL", "SETUSER", "worker", "reset", "on", &format!(">{SECRET}"), "~polybus:*", "+@all"];
        server.cli(&[&base, more].concat());
    };
    for (missing, name) in [("-info", "info"), ("-xadd", "XADD"), ("-xgroup", "ACL"), ("-evalsha", "evalsha")] {
        user(&[missing]);
        let bus = hasty(&url);
        let tried = async {
            bus.start().await?;
            let handler = from_fn(|_| std::future::ready(Outcome::Done));
            bus.subscribe("n", handler, SubscribeOptions::new("all")).await?;
            try_publish(&bus, "n", "1").await
        };
        let error = tokio::time::timeout(2 * SOON, tried).await.expect("it hangs").unwrap_err();
        assert_error(&error, ErrorKind::AuthFailed, &[name, "ACL SETUSER"]);
        assert_secret(&error);
    }
    user(&["resetkeys", "~other:*"]);
    assert_eq!(not_opened(&hasty(&url)).await.kind(), ErrorKind::AuthFailed);
    // Without CONFIG it works, and says what it cannot know.
    server.cli(&["CONFIG", "SET", "appendonly", "yes"]);
    user(&["-config"]);
    let bus = hasty(&url);
    publish(&bus, "n", "1").await;
    let guarantees = bus.guarantees().await.unwrap();
    assert_eq!(guarantees.durability, "memory");
    assert!(guarantees.warnings[0].contains("+config|get"), "{:?}", guarantees.warnings);
}

/// The commands of docs/redis.md are enough, and a channel that is missing is told, not waited for.
#[tokio::test]
async fn the_documented_permissions_are_enough() {
    let server = RedisServer::start();
    let page = include_str!("../../../../docs/redis.md");
    let command = page.split("ACL SETUSER polybus on >password").nth(1).and_then(|rest| rest.split("```").next());
    let rules: Vec<&str> = command.unwrap().split_whitespace().collect();
    let base = ["ACL", "SETUSER", "worker", "reset", "on", &format!(">{SECRET}")];
    server.cli(&[&base[..], &rules].concat());
    let url = format!("redis://worker:{SECRET}@{}", server.address());
    let bus = bus(&url);
    let (_, mut seen) = subscribe(&bus, "n", SubscribeOptions::new("all"), |job| match job.attempt {
        1 => failed(),
        _ => Outcome::Done,
    })
    .await;
    publish(&bus, "n", "1").await;
    assert_eq!(seen.take(2).await[1].attempt, 2);
    finished(&bus, "test/all").await;
    let echo = from_fn(|job: Job| std::future::ready(Outcome::Replied(job.event.payload.clone())));
    bus.respond("echo", echo, SubscribeOptions::responder("echo")).await.unwrap();
    let options = RequestOptions { timeout: DEADLINE };
    assert_eq!(&within(bus.request(event("echo", "7"), options)).await.unwrap().payload[..], b"7");
    bus.close(DEADLINE).await;

    let heard = hasty(&url.replace("redis://", "redis+pubsub://"));
    let options = || SubscribeOptions { broadcast: true, ..SubscribeOptions::new("heard") };
    let (_, mut seen) = subscribe(&heard, "n.*", options(), |_| Outcome::Done).await;
    publish(&heard, "n.x", "1").await;
    seen.next().await;
    server.cli(&[&base[..], &rules, &["resetchannels", "&polybus:*"]].concat());
    let deaf = hasty(&url.replace("redis://", "redis+pubsub://"));
    let handler = from_fn(|_| std::future::ready(Outcome::Done));
    let error = deaf.subscribe("n.*", handler, options()).await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::AuthFailed, "{error}");
}

#[tokio::test]
async fn tls_works_with_its_authority_and_with_a_clients_certificate() {
    for tls in [Tls::On, Tls::Mutual] {
        let mut server = RedisServer::with(Options { tls, password: Some(SECRET), ..Options::default() });
        let bus = hasty(&server.url());
        let (_, mut seen) = listen(&bus, "n", "all").await;
        publish(&bus, "n", "0").await;
        assert_eq!(payload(&seen.next().await), "0");
        server.restart(Data::Kept);
        publish_at_last(&bus, "n", "1").await;
        while payload(&seen.next().await) != "1" {}
    }
}

#[tokio::test]
async fn tls_refuses_strangers() {
    let more = vec![("bind", "127.0.0.1 127.0.0.2".to_owned())];
    let server = RedisServer::with(Options { tls: Tls::Mutual, more, ..Options::default() });
    let (address, other) = (server.address(), Certificates::new());
    let made = server.certificates().unwrap();
    let authority = |made: &Certificates| format!("ca_file={}", made.authority().display());
    let client = |made: &Certificates| {
        let (certificate, key) = made.client();
        format!("cert_file={}&key_file={}", certificate.display(), key.display())
    };
    for (what, why, url) in [
        ("no authority", "UnknownIssuer", format!("rediss://{address}?{}", client(made))),
        ("another authority", "certificate", format!("rediss://{address}?{}&{}", authority(&other), client(made))),
        ("no certificate of the client", "CertificateRequired", format!("rediss://{address}?{}", authority(made))),
        ("another client", "UnknownCA", format!("rediss://{address}?{}&{}", authority(made), client(&other))),
        ("no TLS", "TLS", format!("redis://{address}")),
        (
            "another name",
            "not valid for name",
            format!("rediss://127.0.0.2:{}?{}&{}", server.port(), authority(made), client(made)),
        ),
    ] {
        let error = not_opened(&hasty(&url)).await;
        assert_error(&error, ErrorKind::ConnectionFailed, &[&server.port().to_string(), "TLS"]);
        assert!(error.to_string().contains(why), "{what}: {error}");
    }
    let plain = RedisServer::start();
    let url = format!("rediss://{}?{}", plain.address(), authority(made));
    assert_error(&not_opened(&hasty(&url)).await, ErrorKind::ConnectionFailed, &[&plain.address()]);
    let missing = format!("rediss://{address}?ca_file=/no/such/file");
    assert_error(&not_opened(&hasty(&missing)).await, ErrorKind::InvalidConfig, &["/no/such/file"]);
}
