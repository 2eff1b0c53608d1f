"""Plain data that the native module answers with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


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
