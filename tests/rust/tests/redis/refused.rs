//! Servers that answer, and refuse: replicas, too many clients, one that is still loading.
use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::ErrorKind;

use crate::support::*;

/// Connections stay open, so the bus has to notice by the answers.
#[tokio::test]
async fn a_master_that_becomes_a_replica_and_a_master_again() {
    let master = RedisServer::start();
    let server = RedisServer::start();
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish(&bus, "n", "0").await;
    seen.all_numbers(1).await;
    let port = master.port().to_string();
    server.cli(&["REPLICAOF", "127.0.0.1", &port]);
    assert_error(&refused(&bus).await, ErrorKind::ConnectionFailed, &["read-only replica"]);
    let batch = vec![outgoing(event("n", "98")), outgoing(event("n", "99"))];
    assert_error(&bus.publish(batch).await.unwrap_err(), ErrorKind::ConnectionFailed, &["read-only replica"]);
    server.cli(&["REPLICAOF", "NO", "ONE"]);
    publish_at_last(&bus, "n", "1").await;
    while payload(&seen.next().await) != "1" {}
    finished(&bus, "test/all").await;
}

#[tokio::test]
async fn too_many_clients_are_told() {
    let server = RedisServer::start();
    let early = hasty(&server.url());
    let (_, mut seen) = listen(&early, "n", "all").await;
    publish(&early, "n", "0").await;
    seen.next().await;
    let mut administrator = Administrator::of(&server);
    administrator.tell("CONFIG SET maxclients 1");
    let late = hasty(&server.url());
    assert_error(&not_opened(&late).await, ErrorKind::ConnectionFailed, &[&server.address(), "maxclients"]);
    publish(&early, "n", "1").await;
    seen.next().await;
    administrator.tell("CONFIG SET maxclients 1000");
    publish(&late, "n", "2").await;
    seen.next().await;
}

/// Nothing is answered but that it loads, for about two seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_loads_is_waited_for() {
    let more = vec![
        ("key-load-delay", "10000".to_owned()), // microseconds for each key
        ("loading-process-events-interval-bytes", "1024".to_owned()), // one key: it answers in between
        ("rdbcompression", "no".to_owned()),
    ];
    let mut server = RedisServer::with(Options { appendfsync: Some("always"), more, ..Options::default() });
    let bus = hasty(&server.url());
    let (_, mut seen) = listen(&bus, "n", "all").await;
    publish(&bus, "n", "0").await;
    seen.all_numbers(1).await;
    server.cli(&["EVAL", "for i = 1, 200 do redis.call('SET', i, string.rep('x', 1024)) end", "0"]);
    server.cli(&["BGREWRITEAOF"]); // only the compact form is read key by key
    server.until(&["INFO", "persistence"], "aof_rewrite_in_progress:0");
    server.stop();
    let restarting = tokio::task::spawn_blocking(move || {
        server.restart(Data::Kept);
        server
    });
    let loads = || async {
        let error = try_publish(&bus, "n", "98").await.err();
        Ok(error
            .is_some_and(|error| error.kind() == ErrorKind::ConnectionFailed && error.message().contains("loading")))
    };
    eventually("it says that it loads", loads).await;
    publish_at_last(&bus, "n", "1").await;
    while payload(&seen.next().await) != "1" {}
    let _server = within(restarting).await.unwrap();
    finished(&bus, "test/all").await;
    assert_eq!(count(&bus, "stream_resets_total"), 0);
}
