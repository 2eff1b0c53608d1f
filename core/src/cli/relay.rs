//! `polybus relay`: a process that carries events from an outbox to a bus.

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;

use super::Stop;
use super::http::Pages;
use crate::error::{Error, Result};
use crate::outbox::relay::{Relay, RelayBatch, RelayOptions};
use crate::outbox::table::OUTBOX;
use crate::{Bus, BusOptions, process};

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
    #[arg(long, value_parser = address, conflicts_with = "once")]
    http: Option<SocketAddr>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if (0.1..=86_400.0).contains(&number) => Ok(number),
        _ => Err("give seconds from 0.1 to 86400".to_owned()),
    }
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "give an IP address and a port, such as 127.0.0.1:9187, 0.0.0.0:9187 or [::]:9187".to_owned())
}

impl Command {
    pub(super) fn run(self, out: &mut dyn Write) -> Result<(), Stop> {
        crate::logs::watch(log::LevelFilter::Info, say);
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
        Some(address) => Some(Pages::at(address).await?),
        None => None,
    };
    let answering = async {
        match &pages {
            Some(pages) => pages.serve(relay).await,
            None => std::future::pending().await,
        }
    };
    let mut running = std::pin::pin!(relay.run());
    let asked_to_stop = async {
        while !ASKED_TO_STOP.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let working = async {
        tokio::select! {
            ended = &mut running => ended,
            () = asked_to_stop => {
                relay.stop();
                running.await
            }
        }
    };
    // The pages are there until the last row is done.
    let ended = tokio::select! {
        ended = working => ended,
        () = answering => Ok(()),
    };
    ended.map(|()| None)
}

/// What the core logs goes to standard error, at once: no language is there to fetch it.
fn say() -> bool {
    let mut err = std::io::stderr().lock();
    for (level, text) in crate::logs::take() {
        let now = humantime::format_rfc3339_seconds(std::time::SystemTime::now());
        let _ = writeln!(err, "{now} {level} {text}"); // there is nowhere else to say it
    }
    true
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
