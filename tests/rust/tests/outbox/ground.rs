//! A database with an outbox, rows in it, and buses that tell what they took.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use polybus_conformance::postgres_server::PostgresServer;
use polybus_conformance::{eventually, within};
use polybus_core::bus::new_event;
use polybus_core::codec;
use polybus_core::outbox::Table;
use polybus_core::outbox::relay::{Publisher, Relay, RelayOptions};
use polybus_core::retry::{Jitter, RetryPolicy};
use polybus_core::transport::{Outgoing, Task};
use polybus_core::{Error, Event, Result};

use crate::databases::{Database, Session};

/// A server with an outbox.
pub struct Ground<D = PostgresServer> {
    pub server: D,
}

impl Ground {
    /// On PostgreSQL, for what only that has.
    pub fn new() -> Self {
        Self::on()
    }
}

impl<D: Database> Ground<D> {
    pub fn on() -> Self {
        let ground = Self::bare();
        ground.make("polybus_outbox");
        ground
    }

    /// Without an outbox.
    pub fn bare() -> Self {
        Self { server: D::start() }
    }

    pub fn make(&self, table: &str) {
        self.server.sql(&Table::parse(table).unwrap().outbox_ddl(D::DIALECT).join(";"));
    }

    pub fn relay(&self, bus: &Arc<Memo>) -> Relay {
        self.relay_with(bus, RelayOptions::default())
    }

    pub fn relay_with(&self, bus: &Arc<Memo>, options: RelayOptions) -> Relay {
        let options = RelayOptions { retry: at_once(3), ..options };
        Relay::new(&self.server.url(), bus.clone(), options).unwrap()
    }

    /// Rows in that state.
    pub fn count(&self, status: &str) -> usize {
        let sql = format!("SELECT count(*) FROM polybus_outbox WHERE status = '{status}'");
        self.server.sql(&sql).parse().unwrap()
    }

    pub async fn until_delivered(&self, client: &impl Session, count: i64) {
        eventually("all rows are delivered", || async {
            let sql = "SELECT count(*) FROM polybus_outbox WHERE status = 'delivered'";
            Ok(client.texts(sql).await == Some(vec![count.to_string()]))
        })
        .await;
    }
}

/// Retries without a pause.
pub fn at_once(max_retries: u32) -> RetryPolicy {
    let none = Duration::ZERO;
    RetryPolicy { max_retries, initial_delay: none, max_delay: none, factor: 1.0, jitter: Jitter::None }
}

/// An event whose payload is its number.
pub fn event(number: usize, key: Option<&str>) -> Event {
    let meta = key.map(|key| serde_json::json!({"partitionKey": key}).to_string());
    let meta = meta.as_ref().map(String::as_bytes);
    new_event("order.placed", number.to_string().into_bytes().into(), meta, 1 << 20).unwrap()
}

/// Writes an event into the outbox, on whatever transaction the client is in.
pub async fn insert(client: &impl Session, event: &Event) {
    let wire = String::from_utf8(codec::encode(event).unwrap()).unwrap();
    insert_text(client, &event.meta.id, event.meta.partition_key.as_deref(), &wire).await;
}

pub async fn insert_text(client: &impl Session, id: &str, key: Option<&str>, text: &str) {
    client.add(id, key, text).await;
}

/// Writes `count` events, each in a transaction of its own; their keys go round.
pub async fn insert_numbers(client: &impl Session, count: usize, keys: usize) -> Vec<Event> {
    let mut events = Vec::new();
    for number in 0..count {
        let key = (keys > 0).then(|| format!("key-{}", number % keys));
        events.push(event(number, key.as_deref()));
        insert(client, &events[number]).await;
    }
    events
}

type Refuse = Box<dyn Fn(&Event) -> Option<Error> + Send + Sync>;

/// A bus that remembers what it took, and refuses what it is told to.
pub struct Memo {
    took: Mutex<Vec<Event>>,
    refuse: Mutex<Refuse>,
    pub away: std::sync::atomic::AtomicBool,
}

impl Memo {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { took: Mutex::default(), refuse: Mutex::new(Box::new(|_| None)), away: false.into() })
    }

    pub fn refuse(&self, refuse: impl Fn(&Event) -> Option<Error> + Send + Sync + 'static) {
        *self.refuse.lock().unwrap() = Box::new(refuse);
    }

    pub fn took(&self) -> Vec<Event> {
        self.took.lock().unwrap().clone()
    }

    pub fn ids(&self) -> Vec<String> {
        self.took().iter().map(|event| event.meta.id.to_string()).collect()
    }

    pub fn numbers(&self) -> Vec<usize> {
        self.took().iter().map(number).collect()
    }

    /// The numbers of each key, as they came.
    pub fn by_key(&self) -> HashMap<String, Vec<usize>> {
        let mut keys: HashMap<String, Vec<usize>> = HashMap::new();
        for event in self.took() {
            keys.entry(event.meta.partition_key.as_deref().unwrap().to_owned()).or_default().push(number(&event));
        }
        keys
    }
}

pub fn number(event: &Event) -> usize {
    std::str::from_utf8(&event.payload).unwrap().parse().unwrap()
}

impl Publisher for Memo {
    fn publish(&self, batch: Vec<Outgoing>) -> Task<Result<()>> {
        let away = self.away.load(std::sync::atomic::Ordering::SeqCst);
        let refuse = self.refuse.lock().unwrap();
        let refused: Vec<_> = (batch.iter().enumerate()).filter_map(|(i, o)| Some((i, refuse(&o.event)?))).collect();
        let result = match refused.is_empty() {
            _ if away => Err(Error::connection_failed("away, as the test wants")),
            false => Err(Error::invalid_event("some are refused").listing(refused)),
            true => {
                self.took.lock().unwrap().extend(batch.into_iter().map(|outgoing| outgoing.event));
                Ok(())
            }
        };
        Box::pin(std::future::ready(result))
    }

    fn limit(&self) -> usize {
        1 << 20
    }
}

/// Works with some relays until `done`, then stops them.
pub async fn working<T>(relays: &[Relay], done: impl Future<Output = T>) -> T {
    let running: Vec<_> =
        (relays.iter().cloned()).map(|relay| tokio::spawn(async move { relay.run().await })).collect();
    let value = within(done).await;
    relays.iter().for_each(Relay::stop);
    for running in running {
        within(running).await.unwrap().unwrap();
    }
    value
}
