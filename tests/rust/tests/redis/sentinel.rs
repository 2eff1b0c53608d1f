//! A master that dies, and the replica that takes over.
use std::time::Duration;

use polybus_conformance::redis_server::*;
use polybus_conformance::*;
use polybus_core::transport::Confirm;
use polybus_core::{BusOptions, ErrorKind};

use crate::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_loses_nothing_that_a_replica_confirmed() {
    let options = Options { password: Some("pass"), appendfsync: Some("everysec"), ..Options::default() };
    let mut group = Sentinels::with(options);
    let consuming = bus(&group.url());
    let (_, mut seen) = listen(&consuming, "n", "all").await;
    let replicated = BusOptions {
        confirm: Confirm::Replica,
        publish_timeout: Duration::from_millis(500),
        ..BusOptions::new("test")
    };
    let replicated = bus_with(&group.url(), replicated);
    let publishing = Publisher::start(&replicated);
    publishing.goes_on(100).await;
    group.master.kill9();
    group.replica.until(&["INFO", "replication"], "role:master");
    publishing.end().await.arrives(&mut seen).await;

    let publishing = hasty(&group.url());
    publish_at_last(&publishing, "n", "-1").await;
    while payload(&seen.next().await) != "-1" {}
    finished(&consuming, "test/all").await;
    assert_eq!(count(&consuming, "stream_resets_total"), 0);

    // The old master comes back as a replica, and a bus that is made now finds the new one.
    group.master.restart(Data::Kept);
    let port = group.replica.port().to_string();
    group.master.cli(&["REPLICAOF", "127.0.0.1", &port]); // the sentinels would see to it in ten seconds
    group.replica.until(&["INFO", "replication"], "state=online");
    publish_at_last(&replicated, "n", "-2").await;
    publish(&bus(&group.url()), "n", "-2").await;
    while payload(&seen.next().await) != "-2" {}
}

#[tokio::test]
async fn a_master_that_the_sentinels_do_not_know_is_told() {
    let group = Sentinels::start();
    let error = not_opened(&bus(&group.url().replace("/main", "/mian"))).await;
    assert_error(&error, ErrorKind::ConnectionFailed, &["mian", "sentinels"]);
}
