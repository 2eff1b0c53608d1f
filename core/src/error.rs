//! What can go wrong, by kind.
//!
//! Match on [`Error::kind`], print with `Display`, retry on [`Error::is_retryable`]; nobody parses text.
//! The strings of [`ErrorKind::code`] are shared by all languages (`tests/vectors/errors.json`).

use std::fmt;
use std::sync::Arc;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident = $code:literal, retryable: $retryable:literal;)*) => {
        /// The kinds of failure, the same in three languages. The name is the class name in Python and TypeScript.
        #[non_exhaustive]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ErrorKind { $($(#[$doc])* $kind,)* }

        impl ErrorKind {
            /// Every kind, in the order of the table in `docs/errors.md`.
            pub const ALL: &'static [ErrorKind] = &[$(ErrorKind::$kind,)*];

            /// The stable string that every language exposes as `.code`.
            pub const fn code(self) -> &'static str {
                match self { $(ErrorKind::$kind => $code,)* }
            }

            /// The name of the class that stands for this kind in Python and TypeScript.
            pub const fn class_name(self) -> &'static str {
                match self { $(ErrorKind::$kind => stringify!($kind),)* }
            }

            /// The kind with that code.
            pub fn from_code(code: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|kind| kind.code() == code)
            }

            /// Whether the same call may succeed later without a change by the caller.
            pub const fn is_retryable(self) -> bool {
                match self { $(ErrorKind::$kind => $retryable,)* }
            }
        }
    };
}

kinds! {
    /// The event's type, payload or meta is not valid: nothing was published.
    InvalidEvent = "invalid_event", retryable: false;
    /// The glob pattern cannot be compiled.
    InvalidPattern = "invalid_pattern", retryable: false;
    /// An option, URL or file given at construction is not usable.
    InvalidConfig = "invalid_config", retryable: false;
    /// The payload, or the whole event, exceeds the limit.
    PayloadTooLarge = "payload_too_large", retryable: false;
    /// The payload does not fit its schema.
    SchemaViolation = "schema_violation", retryable: false;
    /// The transport cannot be reached, or its storage failed; nothing was stored.
    ConnectionFailed = "connection_failed", retryable: true;
    /// The publish did not start within its timeout; nothing was stored.
    PublishTimeout = "publish_timeout", retryable: true;
    /// The publish was sent and not confirmed: it may or may not have happened.
    PublishUnknown = "publish_unknown", retryable: true;
    /// A bounded buffer is full.
    BufferFull = "buffer_full", retryable: true;
    /// The bus was closed.
    BusClosed = "bus_closed", retryable: false;
    /// The transport does not have this capability.
    Unsupported = "unsupported", retryable: false;
    /// A handler failed (raised by synchronous publish, and by wrapped handlers).
    HandlerError = "handler_error", retryable: false;
    /// A handler ran longer than its timeout.
    HandlerTimeout = "handler_timeout", retryable: true;
    /// The lease on a delivery passed to somebody else; its outcome was refused.
    LeaseLost = "lease_lost", retryable: false;
    /// A second subscription of the same name on one bus.
    DuplicateSubscription = "duplicate_subscription", retryable: false;
    /// The thing named by an id does not exist.
    NotFound = "not_found", retryable: false;
    /// The server refused the credentials.
    AuthFailed = "auth_failed", retryable: false;
    /// A request was not answered in time.
    RequestTimeout = "request_timeout", retryable: true;
    /// Nobody answers requests of this type.
    NoResponder = "no_responder", retryable: true;
}

/// What a handler in another process raised. Its stack stays there: it shows the inside of another service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// Class of the error.
    pub kind: String,
    /// Its message.
    pub message: String,
    /// The code, if it was an error of polybus.
    pub code: Option<String>,
}

/// A failure: its kind, what was being done, a message that says what to do next, and the cause.
///
/// Cheap to clone, because one failed commit answers many callers.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    operation: Option<&'static str>,
    failures: Vec<(usize, Error)>,
    remote: Option<Remote>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// A failure of `kind`. The message says what happened and what to do next, without secrets or payloads.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let message = message.into();
        Self(Arc::new(Inner { kind, message, operation: None, failures: Vec::new(), remote: None, source: None }))
    }

    /// Adds what was being done, once, where it is known.
    #[must_use]
    pub fn during(self, operation: &'static str) -> Self {
        self.edit(|inner| inner.operation = inner.operation.or(Some(operation)))
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.edit(|inner| inner.source = Some(Box::new(source)))
    }

    /// Adds, for a call on many things, which of them failed: index in the caller's list, and why.
    #[must_use]
    pub fn listing(self, failures: Vec<(usize, Error)>) -> Self {
        self.edit(|inner| inner.failures = failures)
    }

    /// Adds what a handler in another process raised.
    #[must_use]
    pub fn from_remote(self, remote: Remote) -> Self {
        self.edit(|inner| inner.remote = Some(remote))
    }

    fn edit(self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Arc::try_unwrap(self.0).unwrap_or_else(|shared| Inner {
            kind: shared.kind,
            message: shared.message.clone(),
            operation: shared.operation,
            failures: shared.failures.clone(),
            remote: shared.remote.clone(),
            source: None,
        });
        change(&mut inner);
        Self(Arc::new(inner))
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The message, without kind and operation.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What was being done.
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// For a call on many things: which failed (index in the caller's list) and why. All others were accepted.
    pub fn failures(&self) -> &[(usize, Error)] {
        &self.0.failures
    }

    /// For a request whose responder failed: what its handler raised.
    pub fn remote(&self) -> Option<&Remote> {
        self.0.remote.as_ref()
    }

    /// Whether the same call may succeed later without a change by the caller.
    pub fn is_retryable(&self) -> bool {
        self.0.kind.is_retryable()
    }
}

macro_rules! shorthand {
    ($($name:ident => $kind:ident),* $(,)?) => {
        impl Error {$(
            #[doc = concat!("A failure of kind [`ErrorKind::", stringify!($kind), "`].")]
            pub fn $name(message: impl Into<String>) -> Self {
                Self::new(ErrorKind::$kind, message)
            }
        )*}
    };
}

shorthand! {
    invalid_event => InvalidEvent,
    invalid_pattern => InvalidPattern,
    invalid_config => InvalidConfig,
    connection_failed => ConnectionFailed,
    unsupported => Unsupported,
    bus_closed => BusClosed,
    not_found => NotFound,
}

/// Whatever is asked of a bus that is closed.
pub(crate) fn closed() -> Error {
    Error::bus_closed("the bus is closed; call start() to open it again")
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(operation) = self.0.operation {
            write!(f, "{operation}: ")?;
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({self}", self.0.kind.class_name())?;
        if let Some(source) = &self.0.source {
            write!(f, "; caused by: {source}")?;
        }
        f.write_str(")")
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

/// The word of `known` nearest to `word`, if any is near: for "did you mean …?".
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&word.to_lowercase(), &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= 2.max(candidate.len() / 3))
        .min()
        .map(|(_, candidate)| candidate)
}
