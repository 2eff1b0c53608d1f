//! The relay behind a real PgBouncer in transaction mode, where each statement may run in another session.

use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use polybus_conformance::pgbouncer::PgBouncer;
use polybus_conformance::{eventually, within};
use polybus_core::logs;
use polybus_core::outbox::relay::{Relay, RelayOptions, wake};
use polybus_core::outbox::{Style, Table};

use crate::ground::{Ground, Memo, event, insert, insert_numbers, working};

fn relay(pool: &PgBouncer, bus: &Arc<Memo>, options: RelayOptions) -> Relay {
    Relay::new(&pool.url(), bus.clone(), options).unwrap()
}

/// What the core has logged in this process, whose tests may run beside each other.
static SAID: Mutex<Vec<(log::Level, String)>> = Mutex::new(Vec::new());

fn hear() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        logs::watch(log::LevelFilter::Info, || {
            SAID.lock().unwrap().extend(logs::take());
            true
        })
    });
}

/// The warnings that name the place of `url`.
fn warnings(url: &str) -> Vec<String> {
    let place = url.split('@').nth(1).unwrap();
    let said = SAID.lock().unwrap();
    let warnings = said.iter().filter(|(level, text)| *level == log::Level::Warn && text.contains(place));
    warnings.map(|(_, text)| text.clone()).collect()
}

/// One that refuses what we wish of a session, as it does by itself, and one that is told to swallow it.
#[tokio::test(flavor = "multi_thread")]
async fn everything_arrives_in_order_and_nothing_stays_behind() {
    hear();
    for settings in ["", "ignore_startup_parameters = options"] {
        let ground = Ground::new();
        let (pool, bus) = (PgBouncer::start(&ground.server, settings), Memo::new());
        let options = RelayOptions { batch: 7, workers: 2, ..RelayOptions::default() };
        let relays = [relay(&pool, &bus, options.clone()), relay(&pool, &bus, options)];
        let client = ground.server.connect().await;
        working(&relays, async {
            // Two sessions for two relays with two workers each, and for this one.
            let other = pool.connect().await;
            for number in 0..200 {
                insert(&client, &event(number, Some(&format!("k{}", number % 5)))).await;
                other.batch_execute("SELECT 1").await.unwrap();
            }
            ground.until_delivered(&client, 200).await;
        })
        .await;
        assert!(bus.by_key().values().all(|numbers| numbers.is_sorted()), "{:?}", bus.by_key());
        assert_eq!(bus.numbers().len(), 200);
        let rows = "SELECT count(*) FROM polybus_outbox WHERE status <> 'delivered' OR attempts > 0";
        assert_eq!(ground.server.sql(rows), "0");
        // The sessions are as the application wants them.
        for _ in 0..20 {
            let asked = pool.connect().await.simple_query("SELECT current_setting('synchronous_commit') || current_setting('enable_seqscan') || (SELECT count(*) FROM pg_prepared_statements) || (SELECT count(*) FROM pg_listening_channels())").await;
            let first = asked.unwrap().into_iter().find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            });
            assert_eq!(first.as_deref(), Some("onon00"));
        }
        let told = warnings(&pool.url());
        assert_eq!(told.len(), 2, "one for each relay: {told:?}");
        assert!(told.iter().all(|text| text.contains("PgBouncer") && text.contains("listen_url")), "{told:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_listens_at_the_database_itself() {
    hear();
    let ground = Ground::new();
    let (pool, bus) = (PgBouncer::start(&ground.server, ""), Memo::new());
    let never = Duration::from_secs(3600);
    let options =
        RelayOptions { poll_interval: never, listen_url: Some(ground.server.url()), ..RelayOptions::default() };
    let client = ground.server.connect().await;
    let notify = wake(&Table::parse("polybus_outbox").unwrap(), Style::Dollar);
    let listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND state = 'idle'";
    working(&[relay(&pool, &bus, options)], async {
        eventually("it listens", || async {
            Ok(client.query_one(listening, &[]).await.unwrap().get::<_, i64>(0) == 1)
        })
        .await;
        // Through the pool, from where the application writes.
        let writer = pool.connect().await;
        insert(&client, &event(1, None)).await;
        writer.query_typed(&notify.sql, &[(&"polybus_outbox", tokio_postgres::types::Type::TEXT)]).await.unwrap();
        ground.until_delivered(&client, 1).await;
    })
    .await;
    assert_eq!(warnings(&pool.url()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_restarts_or_whose_database_goes_holds_nobody_up() {
    let mut ground = Ground::new();
    // It lets whoever waits for its database wait, by itself for two minutes.
    let (mut pool, bus) = (PgBouncer::start(&ground.server, "query_wait_timeout = 1"), Memo::new());
    let relay = relay(&pool, &bus, RelayOptions { lease: Duration::from_secs(2), ..RelayOptions::default() });
    let running = tokio::spawn({
        let relay = relay.clone();
        async move { relay.run().await }
    });
    insert_numbers(&ground.server.connect().await, 5, 0).await;
    ground.until_delivered(&ground.server.connect().await, 5).await;
    pool.restart();
    insert(&ground.server.connect().await, &event(5, None)).await;
    ground.until_delivered(&ground.server.connect().await, 6).await;
    ground.server.stop();
    eventually("the relay knows", || async { Ok(relay.health().database.is_some()) }).await;
    ground.server.restart();
    insert(&ground.server.connect().await, &event(6, None)).await;
    ground.until_delivered(&ground.server.connect().await, 7).await;
    relay.stop();
    within(running).await.unwrap().unwrap();
}
