"""What can go wrong, as exceptions: one class for each kind, the same names and codes in Python, TypeScript and Rust.

Match on the class or on ``.code``, never on the text. ``.retryable`` says whether the same call may succeed later
without a change on your side.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import ClassVar, NamedTuple

__all__ = [
    "AuthFailed",
    "BatchFailed",
    "BufferFull",
    "BusClosed",
    "ConnectionFailed",
    "DuplicateSubscription",
    "HandlerError",
    "HandlerTimeout",
    "InvalidConfig",
    "InvalidEvent",
    "InvalidPattern",
    "LeaseLost",
    "NoResponder",
    "NotFound",
    "PayloadTooLarge",
    "PolybusError",
    "PublishTimeout",
    "PublishUnknown",
    "Reject",
    "Remote",
    "RequestTimeout",
    "Retry",
    "SchemaViolation",
    "Unsupported",
]


class PolybusError(Exception):
    """The base of every failure of this package."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    failures: list[tuple[int, PolybusError]] | tuple[()] = ()
    """For a call on many things: which of your list failed, and why. All others were accepted."""


class InvalidEvent(PolybusError):
    """The event's type, payload or meta is not valid: nothing was published."""

    code = "invalid_event"


class InvalidPattern(PolybusError):
    """The glob pattern cannot be compiled."""

    code = "invalid_pattern"


class InvalidConfig(PolybusError):
    """An option, URL or file given at construction is not usable."""

    code = "invalid_config"


class InvalidHandler(InvalidConfig, TypeError):
    """What was given as a handler cannot be called with an event."""


class PayloadTooLarge(PolybusError):
    """The payload, or the whole event, exceeds the limit."""

    code = "payload_too_large"


class SchemaViolation(PolybusError):
    """The payload does not fit its schema."""

    code = "schema_violation"


class ConnectionFailed(PolybusError):
    """The transport cannot be reached, or its storage failed; nothing was stored."""

    code = "connection_failed"
    retryable = True


class PublishTimeout(PolybusError):
    """The publish did not start within its timeout; nothing was stored."""

    code = "publish_timeout"
    retryable = True


class PublishUnknown(PolybusError):
    """The publish was sent and not confirmed: it may or may not have happened."""

    code = "publish_unknown"
    retryable = True


class BufferFull(PolybusError):
    """A bounded buffer is full."""

    code = "buffer_full"
    retryable = True


class BusClosed(PolybusError):
    """The bus was closed."""

    code = "bus_closed"


class Unsupported(PolybusError):
    """The transport does not have this capability."""

    code = "unsupported"


class Remote(NamedTuple):
    """What a responder raised, perhaps in another language. Its traceback stays with it."""

    type: str
    """Class of the error."""
    message: str
    code: str | None
    """Its `.code`, if it was a `PolybusError`."""


class HandlerError(PolybusError):
    """A handler failed.

    In a synchronous publish the cause is what it raised; for a request, `.remote` says what the responder raised.
    """

    code = "handler_error"
    remote: Remote | None = None


class HandlerTimeout(PolybusError):
    """A handler ran longer than its timeout."""

    code = "handler_timeout"
    retryable = True


class LeaseLost(PolybusError):
    """The lease on a delivery passed to somebody else; its outcome was refused."""

    code = "lease_lost"


class DuplicateSubscription(PolybusError):
    """A second subscription of the same name on one bus."""

    code = "duplicate_subscription"


class NotFound(PolybusError):
    """The thing named by an id does not exist."""

    code = "not_found"


class AuthFailed(PolybusError):
    """The server refused the credentials."""

    code = "auth_failed"


class RequestTimeout(PolybusError):
    """A request was not answered in time."""

    code = "request_timeout"
    retryable = True


class NoResponder(PolybusError):
    """Nobody answers requests of this type."""

    code = "no_responder"
    retryable = True


class Retry(Exception):
    """Raised by a handler: try again, after so many seconds if given, else when the policy says.

    Counts as an attempt.
    """

    def __init__(
        self, message: object = "the handler asked for another attempt", *, after: float | timedelta | None = None
    ):
        """Take seconds, or a timedelta, to wait."""
        if isinstance(message, (int, float, timedelta)):
            raise TypeError("Retry takes the delay by name: Retry(after=5.0)")
        seconds = after.total_seconds() if isinstance(after, timedelta) else after
        if seconds is not None and not 0 <= seconds <= 10 * 365 * 86_400:
            raise ValueError(f"after={after!r} is not valid; give seconds, at least 0")
        super().__init__(message)
        self.after = None if seconds is None else float(seconds)


class Reject(Exception):
    """Raised by a handler: this event can never be handled. It becomes a dead letter now."""


class BatchFailed(Exception):
    """Raised by a handler of batches: these of its events failed, by id. All others are done.

    `errors` maps `event.meta.id` to what went wrong with that event: an exception, among them `Retry(after=…)` and
    `Reject`, or a text. An id that the batch does not have fails all events that are not named.
    """

    def __init__(self, errors: Mapping[str, BaseException | str]):
        given: object = errors
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError("BatchFailed takes a dict of errors by event.meta.id")
        super().__init__(f"{len(errors)} events of the batch failed")
        self.errors: dict[str, BaseException | str] = dict(errors)
        """By event id."""


BY_CODE: dict[str, type[PolybusError]] = {
    error.code: error
    for error in (
        InvalidEvent,
        InvalidPattern,
        InvalidConfig,
        PayloadTooLarge,
        SchemaViolation,
        ConnectionFailed,
        PublishTimeout,
        PublishUnknown,
        BufferFull,
        BusClosed,
        Unsupported,
        HandlerError,
        HandlerTimeout,
        LeaseLost,
        DuplicateSubscription,
        NotFound,
        AuthFailed,
        RequestTimeout,
        NoResponder,
    )
}
"""The class of each code; the native module raises these."""
