//! Mailboxes: letters by the name of their box, each with its time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use tokio::sync::Notify;

use super::store::Store;
use crate::error::Result;
use crate::event::Text;
use crate::transport::{Mailbox, Task};

/// Longest wait of one look.
const WAIT: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Mail {
    boxes: Mutex<AHashMap<Text, Vec<(Duration, Bytes)>>>,
    arrived: Notify,
}

impl Mail {
    fn boxes(&self) -> MutexGuard<'_, AHashMap<Text, Vec<(Duration, Bytes)>>> {
        self.boxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the letter until `until`, and forgets what nobody fetched in time, in every box.
    pub fn post(&self, mailbox: Text, letter: Bytes, until: Duration, now: Duration) {
        let mut boxes = self.boxes();
        boxes.retain(|_, letters| {
            letters.retain(|(until, _)| *until > now);
            !letters.is_empty()
        });
        boxes.entry(mailbox).or_default().push((until, letter));
        drop(boxes);
        self.arrived.notify_waiters();
    }

    fn take(&self, mailbox: &Text, now: Duration) -> Vec<Bytes> {
        let letters = self.boxes().remove(mailbox).unwrap_or_default();
        letters.into_iter().filter(|(until, _)| *until > now).map(|(_, letter)| letter).collect()
    }
}

/// The reading end.
pub(super) struct MemoryMailbox {
    pub store: Arc<Store>,
    pub name: Text,
}

impl Mailbox for MemoryMailbox {
    fn next(&self) -> Task<Result<Vec<Bytes>>> {
        let (store, name) = (self.store.clone(), self.name.clone());
        Box::pin(async move {
            let arrived = store.mail.arrived.notified();
            let mut arrived = std::pin::pin!(arrived);
            arrived.as_mut().enable(); // before the look: a letter that comes while we look must not be missed
            let letters = store.mail.take(&name, store.now());
            if !letters.is_empty() {
                return Ok(letters);
            }
            drop(tokio::time::timeout(WAIT, arrived).await); // in vain, or not: look again
            Ok(store.mail.take(&name, store.now()))
        })
    }
}
