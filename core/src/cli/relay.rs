//! `polybus relay`: a process that carries events from an outbox to a bus.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Stop;
use crate::error::{Error, Result};
use crate::outbox::relay::{Relay, RelayBatch, RelayOptions};
use crate::outbox::table::OUTBOX;
use crate::{Bus, BusOptions, process};

/// Most bytes of a request's head, and how long it may take.
const REQUEST: (usize, Duration) = (8 << 10, Duration::from_secs(5));

#[derive(Args)]
pub(super) struct Command {
    /// URL of the PostgreSQL, MySQL or MariaDB database with the outbox; without it, POLYBUS_RELAY_DB
    #[arg(long)]
    db: Option<String>,
    /// URL of the bus; without it, POLYBUS_URL
    #[arg(long)]
    bus: Option<String>,
    /// Name of the bus inside its store
    #[arg(long, default_value = "default")]
    bus_name: String,
    /// Name of this service; the source of events that name none
    #[arg(long, default_value = "relay")]
    service: String,
    /// Name of the outbox, with its schema if it has one
    #[arg(long, default_value = OUTBOX)]
    table: String,
    /// Relay what is there, and end
    #[arg(long)]
    once: bool,
    /// Claims under way at the same time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    workers: u16,
    /// Most rows in one claim
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    batch: u16,
    /// Seconds without a sign of life after which another relay takes what this one had claimed
    #[arg(long, default_value_t = 30.0, value_parser = seconds)]
    lease: f64,
    /// Where to listen for NOTIFY when --db leads to PgBouncer
    #[arg(long)]
    listen_url: Option<String>,
    /// Serve /health and /metrics at this address, such as 127.0.0.1:9187
    #[arg(long)]
    http: Option<SocketAddr>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.1..=86_400.0).contains(&number) => Ok(number),
        _ => Err("give seconds from 0.1 to 86400".to_owned()),
    }
}

impl Command {
    pub(super) fn run(self, out: &mut dyn Write) -> Result<(), Stop> {
        let given = |option: Option<String>, flag: &str, variable: &str| {
            let found = option.or_else(|| std::env::var(variable).ok()).filter(|url| !url.is_empty());
            found.ok_or_else(|| Error::invalid_config(format!("pass --{flag}, or set {variable}")))
        };
        let (db, url) = (given(self.db, "db", "POLYBUS_RELAY_DB")?, given(self.bus, "bus", "POLYBUS_URL")?);
        let bus = Bus::new(&url, BusOptions { bus: self.bus_name, ..BusOptions::new(self.service) })?;
        let options = RelayOptions {
            table: self.table,
            workers: self.workers.into(),
            batch: self.batch.into(),
            lease: Duration::from_secs_f64(self.lease),
            listen_url: self.listen_url,
            ..RelayOptions::default()
        };
        let relay = Relay::new(&db, Arc::new(bus.clone()), options)?;
        let (once, http) = (self.once, self.http);
        let total = process::current().runtime.block_on(async {
            let ended = if once { drain(&relay).await } else { serve(&relay, http).await };
            bus.close(Duration::from_secs(10)).await;
            ended
        })?;
        if let Some(RelayBatch { relayed, dead_lettered, .. }) = total {
            writeln!(out, "{relayed} events relayed, {dead_lettered} dead letters")?;
        }
        Ok(())
    }
}

/// Relays until a claim gives nothing.
async fn drain(relay: &Relay) -> Result<Option<RelayBatch>> {
    let mut total = RelayBatch::default();
    loop {
        let batch = relay.relay_batch().await?;
        total.relayed += batch.relayed;
        total.dead_lettered += batch.dead_lettered;
        if let Some(outage) = batch.outage {
            return Err(Error::connection_failed(format!("{} events were relayed, then: {outage}", total.relayed)));
        }
        if batch.attempted == 0 {
            return Ok(Some(total));
        }
    }
}

/// Relays until SIGINT or SIGTERM.
async fn serve(relay: &Relay, http: Option<SocketAddr>) -> Result<Option<RelayBatch>> {
    heed_signals();
    let pages = match http {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|cause| {
                Error::invalid_config(format!("--http {address} cannot be used: {cause}")).caused_by(cause)
            })?;
            Some(tokio::spawn(pages(listener, relay.clone())))
        }
        None => None,
    };
    let mut running = std::pin::pin!(relay.run());
    let asked_to_stop = async {
        while !ASKED_TO_STOP.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let ended = tokio::select! {
        ended = &mut running => ended,
        () = asked_to_stop => {
            relay.stop();
            running.await
        }
    };
    if let Some(pages) = pages {
        pages.abort();
    }
    ended.map(|()| None)
}

/// SIGINT or SIGTERM came.
static ASKED_TO_STOP: AtomicBool = AtomicBool::new(false);

/// Notes both signals, whatever Python or Node had in mind for them: their own threads wait for us.
fn heed_signals() {
    extern "C" fn note(_: libc::c_int) {
        ASKED_TO_STOP.store(true, Ordering::Relaxed);
    }
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: the handler only stores into an atomic.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
}

async fn pages(listener: TcpListener, relay: Relay) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let relay = relay.clone();
                tokio::spawn(async move { tokio::time::timeout(REQUEST.1, answer(stream, &relay)).await });
            }
            Err(cause) => {
                log::warn!("no request for health or metrics was accepted: {cause}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

/// One request, one answer, and the connection ends: enough for probes and for Prometheus.
async fn answer(mut stream: TcpStream, relay: &Relay) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|four| four == b"\r\n\r\n") {
        if head.len() > REQUEST.0 || stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    let head = String::from_utf8_lossy(&head);
    let (status, kind, body) = match head.split_whitespace().take(2).collect::<Vec<_>>()[..] {
        ["GET" | "HEAD", "/metrics"] => ("200 OK", "text/plain; version=0.0.4", relay.metrics().await),
        ["GET" | "HEAD", "/health" | "/healthz"] => {
            let health = relay.health();
            let status = if health.healthy { "200 OK" } else { "503 Service Unavailable" };
            let body = serde_json::json!({
                "healthy": health.healthy, "workers": health.workers, "database": health.database, "bus": health.bus,
            });
            (status, "application/json", format!("{body}\n"))
        }
        _ => ("404 Not Found", "text/plain", "there are /health and /metrics\n".to_owned()),
    };
    let length = body.len();
    let body = if head.starts_with("HEAD") { "" } else { &body };
    let text = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await?;
    stream.shutdown().await
}
