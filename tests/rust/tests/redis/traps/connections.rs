//! A connection costs the server memory and a file: as few as possible, whatever the number of subscriptions.

use futures_util::future::join_all;
use polybus_conformance::redis_server::RedisServer;
use polybus_conformance::*;
use polybus_core::handler::Outcome;

use super::*;

/// Connections of others than redis-cli, which asks.
fn connected(server: &RedisServer) -> u64 {
    info(server, "connected_clients") - 1
}

#[tokio::test]
async fn fifty_subscriptions_share_a_few_connections() {
    let server = RedisServer::start();
    let bus = bus(&server.url());
    let joined = (0..50).map(|number| {
        let bus = bus.clone();
        async move { subscribe(&bus, "*", one_by_one(&format!("s{number}")), |_| Outcome::Done).await }
    });
    let mut subscriptions = join_all(joined).await;
    publish(&bus, "order.created", "1000").await;
    for (_, seen) in &mut subscriptions {
        assert_eq!(payload(&seen.next().await), "1000");
    }
    until("what was needed to begin is gone", || connected(&server) <= 4).await;
    let before = info(&server, "total_connections_received");
    let asked = info(&server, "total_connections_received") - before; // by asking
    join_all((0..200).map(|number| {
        let bus = bus.clone();
        async move { publish(&bus, "order.created", &number.to_string()).await }
    }))
    .await;
    for (_, seen) in &mut subscriptions {
        seen.all_numbers(200).await;
    }
    assert!(connected(&server) <= 4, "{} connections", connected(&server));
    // `connected` asked twice or three times.
    let opened = info(&server, "total_connections_received") - before;
    assert!(opened <= asked * 4, "{opened} connections were opened");
}
