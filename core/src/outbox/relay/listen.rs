//! Waking up by PostgreSQL's NOTIFY: a hint, on a connection of its own. Polling finds everything without it.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_postgres::AsyncMessage;

use super::postgres::Server;
use crate::outbox::dialect::Dialect;

/// How often the connection is tried: one that is half-open says nothing.
const HEARTBEAT: Duration = Duration::from_secs(30);
/// Between attempts to connect.
const PAUSE: Duration = Duration::from_secs(5);

/// Listens until it is dropped.
pub(super) struct Listener(tokio::task::JoinHandle<()>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Listener {
    /// Rings `wake` for every notification on `channel`, and after each new connection, since some may have been missed.
    pub fn new(server: Server, channel: &str, wake: Arc<Notify>) -> Self {
        let listen = format!("LISTEN {}", Dialect::Postgres.quote(channel));
        Self(tokio::spawn(async move {
            let mut told = false;
            loop {
                if let Err(cause) = listen_once(&server, &listen, &wake).await
                    && !std::mem::replace(&mut told, true)
                {
                    log::warn!("the relay polls, because it cannot listen on {}: {cause}", server.name());
                }
                tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
            }
        }))
    }
}

async fn listen_once(server: &Server, listen: &str, wake: &Notify) -> Result<(), tokio_postgres::Error> {
    let (config, tls) = server.plain();
    let (client, mut connection) = config.connect(tls).await?;
    let messages = async {
        while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(_) = message? {
                wake.notify_one();
            }
        }
        Ok(())
    };
    let heartbeat = async {
        client.batch_execute(listen).await?;
        wake.notify_one();
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            if tokio::time::timeout(HEARTBEAT, client.simple_query("")).await.is_err() {
                return Ok(()); // nobody there any more
            }
        }
    };
    tokio::select! {
        ended = messages => ended,
        ended = heartbeat => ended,
    }
}
