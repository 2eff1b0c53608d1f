//! The idempotency keys of what was published.

use std::collections::VecDeque;
use std::time::Duration;

use ahash::AHashMap;

use crate::event::Text;
use crate::transport::Receipt;

/// Keys that are remembered; beyond it the oldest are forgotten.
const SEEN: usize = 200_000;

#[derive(Default)]
pub(super) struct Seen {
    receipts: AHashMap<Text, (Receipt, Duration)>,
    /// When they are forgotten, about in that order.
    forget: VecDeque<(Duration, Text)>,
}

impl Seen {
    /// The receipt of the event that was published under `key`.
    pub fn first(&self, key: &Text, now: Duration) -> Option<Receipt> {
        self.receipts.get(key).filter(|(_, until)| *until > now).map(|(receipt, _)| receipt.clone())
    }

    pub fn add(&mut self, key: Text, receipt: Receipt, now: Duration, window: Duration) {
        while let Some((until, _)) = self.forget.front()
            && (*until <= now || self.forget.len() >= SEEN)
            && let Some((until, oldest)) = self.forget.pop_front()
        {
            // It may have been published once more since.
            if self.receipts.get(&oldest).is_some_and(|(_, known)| *known == until) {
                self.receipts.remove(&oldest);
            }
        }
        let until = now.saturating_add(window);
        self.receipts.insert(key.clone(), (receipt, until));
        self.forget.push_back((until, key));
    }
}
