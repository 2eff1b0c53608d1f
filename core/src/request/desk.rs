//! The requester's side: one mailbox for each bus and process, and who waits for what.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::{Address, Counts, REPLY_FOR, REPLY_STATUS, header, secret, strip};
use crate::codec;
use crate::error::{Error, ErrorKind, Remote, Result, closed};
use crate::event::{Event, Text};
use crate::transport::{Mailbox, Transport};

/// How long the mailbox is still read after the last request ended, to count what comes late; then a connection that it
/// needs is let go.
const LINGER: Duration = Duration::from_secs(30);
/// Before a read is repeated that failed.
const AGAIN: Duration = Duration::from_millis(50);
/// The same, when it will fail again.
const LATER: Duration = Duration::from_secs(1);
/// Requests that wait at one time.
const MOST: usize = 100_000;

pub(crate) struct Desk {
    mailbox: Text,
    counts: Arc<Counts>,
    /// Largest payload of a reply.
    limit: usize,
    state: Mutex<State>,
}

struct State {
    asked: AHashMap<Text, oneshot::Sender<Result<Event>>>,
    reading: bool,
    /// When a request began or ended last.
    used: Instant,
}

/// A place at the desk; dropping it gives it up.
pub(crate) struct Expected {
    desk: Arc<Desk>,
    address: Address,
    reply: oneshot::Receiver<Result<Event>>,
}

impl Desk {
    pub fn new(counts: Arc<Counts>, limit: usize) -> Result<Arc<Self>> {
        let state = State { asked: AHashMap::new(), reading: false, used: Instant::now() };
        Ok(Arc::new(Self { mailbox: secret()?, counts, limit, state: Mutex::new(state) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prepares for a reply within `within`. Reads the mailbox from now on, until `closed`.
    pub fn expect(
        self: &Arc<Self>,
        transport: &Arc<dyn Transport>,
        within: Duration,
        closed: watch::Receiver<bool>,
    ) -> Result<Expected> {
        let address = Address { mailbox: self.mailbox.clone(), token: secret()?, within };
        let (sender, reply) = oneshot::channel();
        let mut state = self.state();
        if state.asked.len() >= MOST {
            return Err(Error::new(ErrorKind::BufferFull, format!("{MOST} requests wait for replies; ask slower")));
        }
        if !state.reading {
            let mailbox = transport.mailbox(self.mailbox.clone())?;
            crate::process::current().runtime.spawn(self.clone().read(mailbox, closed));
            state.reading = true;
        }
        state.asked.insert(address.token.clone(), sender);
        state.used = Instant::now();
        drop(state);
        Counts::count(&self.counts.requests);
        Ok(Expected { desk: self.clone(), address, reply })
    }

    async fn read(self: Arc<Self>, mailbox: Box<dyn Mailbox>, mut closed: watch::Receiver<bool>) {
        loop {
            let letters = tokio::select! {
                biased;
                _ = closed.wait_for(|closed| *closed) => break, // an error means that the session is gone
                letters = mailbox.next() => letters,
            };
            match letters {
                Ok(letters) => letters.into_iter().for_each(|letter| self.open(letter)),
                Err(error) if error.kind() == ErrorKind::BusClosed => break,
                Err(error) if !error.is_retryable() => {
                    // A missing permission, say: nobody gets a reply.
                    let asked = std::mem::take(&mut self.state().asked);
                    asked.into_values().for_each(|asked| drop(asked.send(Err(error.clone()))));
                    tokio::time::sleep(LATER).await;
                }
                Err(error) => {
                    log::debug!("reading replies failed, again soon: {error}");
                    tokio::time::sleep(AGAIN).await;
                }
            }
            // Under the lock: whoever comes next sees that nobody reads, or is seen.
            let mut state = self.state();
            if state.asked.is_empty() && state.used.elapsed() >= LINGER {
                state.reading = false;
                return;
            }
        }
        self.state().reading = false;
    }

    fn open(&self, letter: Bytes) {
        let reply = match codec::decode(&letter, usize::MAX) {
            Ok(reply) => reply,
            Err(error) => return log::warn!("a reply cannot be read: {error}"),
        };
        let asked = header(&reply.meta, REPLY_FOR).and_then(|token| self.state().asked.remove(token));
        let taken = asked.is_some_and(|asked| asked.send(Ok(reply)).is_ok());
        if !taken {
            Counts::count(&self.counts.late);
            log::debug!("a reply came late, or was not the first: dropped");
        }
    }
}

impl Expected {
    /// Makes a request of `event`.
    pub fn stamp(&self, event: &Event) -> Event {
        event.with_meta(|meta| self.address.write(meta))
    }

    /// The reply; `HandlerError` with what the responder's handler raised.
    pub async fn reply(&mut self) -> Result<Event> {
        // The sender is dropped only with the desk's entry, which is ours.
        let reply = (&mut self.reply).await.unwrap_or_else(|_| Err(closed()))?;
        codec::check_payload(&reply.payload, self.desk.limit)?;
        let failed = header(&reply.meta, REPLY_STATUS) == Some("error");
        if failed { Err(remote(&reply)) } else { Ok(reply.with_meta(strip)) }
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut state = self.desk.state();
        state.used = Instant::now();
        let sender = state.asked.remove(&self.address.token);
        drop(state);
        drop(sender);
    }
}

fn remote(reply: &Event) -> Error {
    let told: Value = serde_json::from_slice(&reply.payload).unwrap_or_default();
    let text = |name: &str| told[name].as_str().map(str::to_owned);
    let (kind, message) = (text("type").unwrap_or_else(|| "Error".into()), text("message").unwrap_or_default());
    let service = reply.meta.source.as_deref().unwrap_or("the responder");
    let error =
        Error::new(ErrorKind::HandlerError, format!("{service} failed on {}: {kind}: {message}", reply.event_type));
    error.from_remote(Remote { kind, message, code: text("code") })
}
