//! Many publishes in one step that stay many: what a host collects in one turn of its loop crosses to the core once.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::join_all;

use super::{Bus, closed};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Origin;
use crate::process;
use crate::transport::{Outgoing, Receipt, Watched};

impl Bus {
    /// As [`Bus::publish`] of each event alone, in order, all at the same time: one that fails takes no other with it.
    pub async fn publish_each(&self, mut batch: Vec<Outgoing>) -> Vec<Result<Receipt>> {
        if *self.session().closed.borrow() {
            return batch.iter().map(|_| Err(closed())).collect();
        }
        if self.0.kit.is_some() || self.0.options.fail_open || batch.len() == 1 {
            let alone = batch.into_iter().map(|outgoing| self.publish_one(outgoing));
            return join_all(alone).await;
        }
        let (limit, instance) = (self.0.options.max_payload_bytes, &process::current().instance_id);
        let mut outcomes: Vec<Option<Result<Receipt>>> =
            batch.iter_mut().map(|outgoing| Some(Err(refused(self.stamp(outgoing, limit, instance).err()?)))).collect();
        let mut valid = outcomes.iter().map(Option::is_none);
        batch.retain(|_| valid.next().unwrap_or(false));
        let tally = Origin::tally(batch.iter().map(|outgoing| &outgoing.event));
        let stored = match self.open().await {
            Ok(transport) => transport.publish_each(batch, self.0.options.publish_timeout).await,
            Err(error) => batch.iter().map(|_| Err(error.clone())).collect(),
        };
        self.count_each(&tally, &stored);
        let mut stored = stored.into_iter().map(|outcome| outcome.map_err(|error| error.during("publish")));
        for outcome in outcomes.iter_mut().filter(|outcome| outcome.is_none()) {
            *outcome = stored.next();
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(closed()))).collect()
    }

    /// For an event loop that awaits a publish: where its answer arrives, if that is a socket that can be watched.
    pub fn watched(&self) -> Option<Arc<dyn Watched>> {
        self.session().transport.get()?.watched()
    }

    async fn publish_one(&self, outgoing: Outgoing) -> Result<Receipt> {
        let mut receipts = self.publish(vec![outgoing]).await?;
        receipts.pop().ok_or_else(|| Error::new(ErrorKind::ConnectionFailed, "the transport gave no receipt"))
    }

    /// `tally` is of the same events, in the same order.
    fn count_each(&self, tally: &[(Origin, u64)], outcomes: &[Result<Receipt>]) {
        let is_new = |outcome: &&Result<Receipt>| outcome.as_ref().is_ok_and(|receipt| !receipt.duplicate);
        let state = self.state();
        let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64;
        let new = outcomes.iter().filter(is_new).count() as u64;
        state.published.fetch_add(new, Ordering::Relaxed);
        state.publish_failed.fetch_add(failed, Ordering::Relaxed);
        state.publish_duplicates.fetch_add(outcomes.len() as u64 - failed - new, Ordering::Relaxed);
        let mut rest = outcomes;
        for (origin, events) in tally {
            let (these, others) = rest.split_at((*events as usize).min(rest.len()));
            rest = others;
            let new = these.iter().filter(is_new).count() as u64;
            if new > 0 {
                state.by_origin.change(origin.clone(), |count| *count += new);
            }
        }
    }
}

/// As a publish of this one alone says it.
fn refused(error: Error) -> Error {
    let message = format!("event 0 of 1: {}; nothing was published", error.message());
    Error::new(error.kind(), message).during("publish").listing(vec![(0, error)])
}
