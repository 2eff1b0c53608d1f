"""Plain data that the native module answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from polybus._native import Event, Failure


@dataclass(frozen=True, kw_only=True)
class Guarantees:
    """What holds on the live store, as measured, not as hoped."""

    transport: str
    """``memory``, ``sqlite``, ``redis`` or ``redis+pubsub``."""
    delivery: str
    """``at-least-once`` or ``at-most-once``."""
    durability: str
    """What a confirmed publish survives: ``none`` (lost with this process), ``memory`` (our processes, not the server),
    ``process`` (any killed process), ``disk`` (a power loss)."""
    ordering: str
    """Order within one group: ``publish`` for first attempts."""
    durable: bool
    cross_process: bool
    ack: bool
    delayed_retry: bool
    """Retries are scheduled by the store and hold no worker."""
    delayed_publish: bool
    dead_letters: bool
    start_position: bool
    broadcast: bool
    ordered: bool
    """Subscriptions with ``ordered=True``."""
    request: bool
    idempotent: bool
    """Subscriptions can handle events of one key once."""
    publish_dedupe: bool
    """A publish with an idempotency key that was published before is absorbed."""
    history: bool
    """The log can be read and replayed."""
    details: Mapping[str, str] = field(default_factory=dict)
    """What was looked at: version, file system, settings."""
    warnings: Sequence[str] = ()
    """Settings that weaken the promise, each with what to do."""


@dataclass(frozen=True, kw_only=True)
class SubscriptionStats:
    """One subscription: its group's numbers on the live store, and what this process did."""

    name: str
    group: str
    pattern: str
    pending: int
    """Not finished: lag, in flight and retrying."""
    lag: int
    """Published, and not yet taken by anyone of the group."""
    in_flight: int
    retrying: int
    dead: int
    expired: int
    oldest_age: float | None
    """Seconds since the oldest event that is not finished was published."""
    completed: int
    failed: int
    retried: int
    dead_lettered: int
    dropped: int
    released: int
    timed_out: int
    duplicates: int
    """Absorbed by an idempotent subscription, because their key was handled before."""
    leases_lost: int
    running: int
    buffered: int
    breaker: Literal["closed", "open", "half_open"] | None
    """Where the breaker stands; ``None`` without one."""
    busy_seconds: float
    """Sum of the handlers' times."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one group did with one event, from what the store keeps anyway; ``None`` is what it does not keep."""

    group: str
    status: Literal["pending", "processing", "completed", "failed"]
    """``completed``: the group has gone past it and holds nothing of it any more. ``failed``: it waits for its next
    attempt (``retry_at``), or is a dead letter (``dead_letter``)."""
    attempts: int | None
    """Attempts that were begun, this one included."""
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    retry_at: datetime | None
    """When the next attempt is due."""
    completed_at: datetime | None
    """No store keeps that today."""
    error: Failure | None
    """What went wrong last."""
    dead_letter: str | None
    """The dead letter's id, for ``bus.dead_letters``."""
    reason: str | None
    """Why it is one."""


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """One event of the log."""

    event: Event[Any] | None
    """``None`` when the bytes cannot be decoded; they are in ``raw``."""
    raw: bytes | None
    """The bytes as stored, when they are no event."""
    position: str
    """Where it stands in the log, as in the receipt of its publish."""
    published_at: datetime
    """When it entered the log, by the store's clock."""
    records: tuple[Record, ...] | None
    """What each group did with it, by the groups' names; ``None`` unless asked for."""


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """How far a replay is."""

    count: int
    """Events handed to the group."""
    skipped: int
    """Events left alone because the group had them to do already."""
    position: str | None
    """Up to where the log was looked at: give it as ``after`` to go on from there."""
    done: bool
    """Nothing is left; false while it goes on, and when the limit ended it."""
