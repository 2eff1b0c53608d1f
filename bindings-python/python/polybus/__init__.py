"""One event bus for Python and TypeScript services, with a Rust core."""

from polybus._native import Aggregate, DeadLetter, Delivery, Event, Failure, Meta, Receipt, RetryPolicy, version
from polybus._views import Guarantees, SubscriptionStats
from polybus.bus import Bus
from polybus.errors import (
    AuthFailed,
    BufferFull,
    BusClosed,
    ConnectionFailed,
    DuplicateSubscription,
    HandlerError,
    HandlerTimeout,
    InvalidConfig,
    InvalidEvent,
    InvalidPattern,
    LeaseLost,
    NoResponder,
    NotFound,
    PayloadTooLarge,
    PolybusError,
    PublishTimeout,
    PublishUnknown,
    Reject,
    Remote,
    RequestTimeout,
    Retry,
    SchemaViolation,
    Unsupported,
)
from polybus.retry import with_retry
from polybus.shutdown import lifespan, run, serve
from polybus.subscription import Subscription

__all__ = [
    "Aggregate",
    "AuthFailed",
    "BufferFull",
    "Bus",
    "BusClosed",
    "ConnectionFailed",
    "DeadLetter",
    "Delivery",
    "DuplicateSubscription",
    "Event",
    "Failure",
    "Guarantees",
    "HandlerError",
    "HandlerTimeout",
    "InvalidConfig",
    "InvalidEvent",
    "InvalidPattern",
    "LeaseLost",
    "Meta",
    "NoResponder",
    "NotFound",
    "PayloadTooLarge",
    "PolybusError",
    "PublishTimeout",
    "PublishUnknown",
    "Receipt",
    "Reject",
    "Remote",
    "RequestTimeout",
    "Retry",
    "RetryPolicy",
    "SchemaViolation",
    "Subscription",
    "SubscriptionStats",
    "Unsupported",
    "__version__",
    "lifespan",
    "run",
    "serve",
    "version",
    "with_retry",
]

__version__ = version()
