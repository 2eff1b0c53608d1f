//! The two pages of a relay that runs alone: health for probes, metrics for Prometheus.
//!
//! The protocol is hyper's. Ours are the limits, because whoever asks is not the relay's work: so many connections at a
//! time, each for so long, for one request whose head has so many bytes.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::error::{Error, Result};
use crate::outbox::relay::Relay;

/// Connections at a time; others wait in the system's line.
const CONNECTIONS: usize = 64;
/// Bytes of a request's head; hyper answers 431 to more.
const HEAD: usize = 8 << 10;
/// For a request's head, and for all of a connection.
const TIME: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(15));

/// The pages at one address. Dropped, they are gone.
pub(super) struct Pages(TcpListener);

impl Pages {
    /// Takes the address. `InvalidConfig` if it is taken, or not one of this machine.
    pub async fn at(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).await.map_err(|cause| {
            let advice = match cause.kind() {
                std::io::ErrorKind::AddrInUse => "another process has this port: end it, or give another port",
                std::io::ErrorKind::PermissionDenied => "give a port above 1023",
                _ => "give an address of this machine, such as 127.0.0.1:9187",
            };
            Error::invalid_config(format!("--http {address} cannot be used: {cause}; {advice}")).caused_by(cause)
        })?;
        // Where it is, if the port was left to the system (0).
        let place = listener.local_addr().unwrap_or(address);
        log::info!("health and metrics are served at http://{place}/health and /metrics");
        Ok(Self(listener))
    }

    /// Answers, for as long as it is polled.
    pub async fn serve(&self, relay: &Relay) {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            // Never closed.
            let Ok(place) = room.clone().acquire_owned().await else { return };
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let relay = relay.clone();
                    connections.spawn(async move {
                        // Too slow, or gone: either way it is their loss.
                        let _ = tokio::time::timeout(TIME.1, connection(stream, relay)).await;
                        drop(place);
                    });
                }
                Err(cause) => {
                    log::warn!("no request for health or metrics was accepted: {cause}");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
            while connections.try_join_next().is_some() {}
        }
    }
}

async fn connection(stream: TcpStream, relay: Relay) -> hyper::Result<()> {
    let service = service_fn(move |request: Request<Incoming>| {
        let relay = relay.clone();
        async move { Ok::<_, Infallible>(page(request.method(), request.uri().path(), &relay).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(TIME.0)
        .max_buf_size(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn page(method: &Method, path: &str, relay: &Relay) -> Response<Full<Bytes>> {
    const TEXT: (HeaderName, &str) = (CONTENT_TYPE, "text/plain; charset=utf-8");
    if !matches!(path, "/health" | "/healthz" | "/metrics") {
        return answer(StatusCode::NOT_FOUND, TEXT, "there are /health and /metrics\n".into());
    }
    if !matches!(*method, Method::GET | Method::HEAD) {
        let mut response = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".into());
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if path == "/metrics" {
        let kind = (CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
        return answer(StatusCode::OK, kind, relay.metrics().await);
    }
    let health = relay.health();
    let status = if health.healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({
        "healthy": health.healthy,
        "why": health.why(),
        "workers": health.workers,
        "database": health.database,
        "bus": health.bus,
        "lastLookSeconds": health.last_look.map(|ago| ago.as_secs_f64()),
    });
    answer(status, (CONTENT_TYPE, "application/json"), format!("{body}\n"))
}

fn answer(status: StatusCode, (name, value): (HeaderName, &'static str), body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(name, hyper::header::HeaderValue::from_static(value));
    headers.insert(CACHE_CONTROL, hyper::header::HeaderValue::from_static("no-store"));
    response
}
