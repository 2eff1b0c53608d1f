//! What becomes of a row that could not be published.

use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::retry::RetryPolicy;
use crate::transport::Task;

/// A row that the bus refused, while it took others.
#[derive(Debug, Clone)]
pub struct Failed {
    /// Id of its event.
    pub event_id: String,
    /// Type of its event.
    pub event_type: String,
    /// Failed attempts, this one included.
    pub attempts: u32,
    /// Why.
    pub error: Error,
}

/// What to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Try again after so long. Until then nothing of its partition key is published.
    Retry(Duration),
    /// Keep it for people to look at; its partition key goes on.
    DeadLetter,
}

/// Decides about rows that fail. Not asked when the transport is away: then nothing is published, and no attempt counts.
pub trait FailurePolicy: Send + Sync + 'static {
    /// Decides about one.
    fn decide(&self, failed: Failed) -> Task<Decision>;
}

/// An error that no retry mends ends in a dead letter at once, any other when the attempts are used up.
impl FailurePolicy for RetryPolicy {
    fn decide(&self, failed: Failed) -> Task<Decision> {
        let delay = failed.error.is_retryable().then(|| self.delay(failed.attempts, fastrand::f64())).flatten();
        Box::pin(std::future::ready(delay.map_or(Decision::DeadLetter, Decision::Retry)))
    }
}

/// Whether `error` says something about the transport rather than about an event.
pub(super) fn is_outage(error: &Error) -> bool {
    let kind = error.kind();
    error.is_retryable()
        || matches!(
            kind,
            ErrorKind::BusClosed | ErrorKind::AuthFailed | ErrorKind::Unsupported | ErrorKind::InvalidConfig
        )
}
