//! Requests: [`Bus::request`] and [`Bus::respond`].

use std::sync::Arc;
use std::time::Duration;

use super::{Bus, Session};
use crate::error::{Error, ErrorKind, Result, closed};
use crate::event::Event;
use crate::handler::Handler;
use crate::options::{RequestOptions, SubscribeOptions};
use crate::request::{Counts, Desk, Facts, Responder};
use crate::retry::RetryPolicy;
use crate::subscription::Subscription;
use crate::transport::{Outgoing, Transport};

impl Bus {
    /// As [`Bus::subscribe`], and what the handler says answers the requests among its events: a payload
    /// ([`Outcome::Replied`](crate::handler::Outcome::Replied)) or an error, which ends the request at once unless the
    /// policy has another attempt. One member of the group answers; of several groups the first reply counts.
    ///
    /// Make the options with [`SubscribeOptions::responder`]. `Unsupported` where there are no mailboxes.
    pub async fn respond(
        &self,
        pattern: &str,
        handler: Arc<dyn Handler>,
        options: SubscribeOptions,
    ) -> Result<Subscription> {
        self.subscribe(pattern, handler, SubscribeOptions { respond: true, ..options }).await
    }

    /// Publishes `event` and waits for the reply of a responder. The request expires with the timeout: who has not
    /// begun with it by then never will. Dropping the future ends the wait, and leaves nothing.
    ///
    /// `NoResponder` at once, and nothing published, when nobody is there; `RequestTimeout`; `HandlerError` when the
    /// handler failed ([`Error::remote`]); `BusClosed` also when the bus is closed meanwhile; what [`Bus::publish`]
    /// says; `Unsupported`.
    pub async fn request(&self, event: Event, options: RequestOptions) -> Result<Event> {
        let session = self.session();
        let due = self.0.clock.elapsed().saturating_add(options.timeout);
        let mut closing = session.closed.subscribe();
        let event_type = event.event_type.clone();
        let asked = self.ask(&session, event, due);
        let reply = tokio::select! {
            biased;
            _ = closing.wait_for(|closed| *closed) => Err(closed()),
            reply = asked => reply,
            () = self.0.clock.sleep_until(due) => Err(Error::new(
                ErrorKind::RequestTimeout,
                format!("no reply to {event_type} within {:?}; it may have been handled all the same", options.timeout),
            )),
        };
        reply.map_err(|error| error.during("request"))
    }

    async fn ask(&self, session: &Session, event: Event, due: Duration) -> Result<Event> {
        let transport = self.transport(session).await?;
        if !transport.capabilities().request {
            return Err(no_requests());
        }
        if transport.responders(event.event_type.text().clone()).await? == Some(false) {
            return Err(Error::new(
                ErrorKind::NoResponder,
                format!("nobody answers {}; start the service that does, or correct the type", event.event_type),
            ));
        }
        let desk = match session.desk.get() {
            Some(desk) => desk,
            None => {
                let made = Desk::new(self.state().requests.clone(), self.0.options.max_payload_bytes)?;
                session.desk.get_or_init(|| made)
            }
        };
        let left = due.saturating_sub(self.0.clock.elapsed());
        let mut expected = desk.expect(&transport, left, session.closed.subscribe())?;
        let event = expected.stamp(&event);
        let receipts = self.publish(vec![Outgoing { event, delay: None, expires_in: Some(left) }]).await?;
        if receipts.first().is_none_or(|receipt| receipt.position.is_none()) {
            return Err(Error::connection_failed(
                "the request was not published, and fail_open hides why; see the log",
            ));
        }
        expected.reply().await
    }

    /// Requests made, replies sent, and replies that came late or twice, in this process.
    pub fn request_counts(&self) -> Arc<Counts> {
        self.state().requests.clone()
    }

    /// The handler of a responder around the user's.
    pub(super) fn responder(
        &self,
        handler: Arc<dyn Handler>,
        transport: Arc<dyn Transport>,
        retry: &RetryPolicy,
        timeout: Option<Duration>,
    ) -> Arc<dyn Handler> {
        let facts = Facts {
            transport,
            service: self.0.service.clone(),
            clock: self.0.clock.clone(),
            retry: retry.clone(),
            limit: self.0.options.max_payload_bytes,
            timeout,
            counts: self.request_counts(),
        };
        Arc::new(Responder::new(handler, facts))
    }
}

fn no_requests() -> Error {
    Error::unsupported("this transport has no requests; make them over memory://, sqlite:/// or redis://")
}

pub(super) fn check_responder(transport: &Arc<dyn Transport>, options: &SubscribeOptions) -> Result<()> {
    if !transport.capabilities().request {
        return Err(no_requests());
    }
    if options.broadcast {
        return Err(Error::invalid_config(
            "a responder cannot be a broadcast: every process would answer each request; leave broadcast out",
        ));
    }
    Ok(())
}
