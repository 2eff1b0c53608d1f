"""The keyword arguments of the API, for type checkers; the core knows their defaults and judges their values.

Seconds are a number or a ``timedelta``.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from typing_extensions import Required

    from polybus._log import AnyLogger
    from polybus._native import Aggregate, Event, RetryPolicy

Seconds = float | timedelta
Mode = Literal["async", "sync"]


class RelayOptions(TypedDict, total=False):
    """Options of a relay of the outbox."""

    table: str
    """`table` or `schema.table`. Default ``polybus_outbox``."""
    batch: int
    """Most rows in one claim, and so in memory for each worker. Default 500."""
    workers: int
    """Claims under way at the same time in this process. With one, rows without a key go in order, too. Default 1."""
    lease: Seconds
    """What a relay had that died is published after this. Default 30 s."""
    poll_interval: Seconds
    """Longest pause between looks at the table; after rows were found pauses are shorter. Default 0.25 s."""
    listen: bool
    """Wake up by NOTIFY. Default true."""
    listen_url: str
    """Where to listen, when the database's URL leads to a pool that passes no notifications on."""
    retry: RetryPolicy
    """For rows that the bus refuses, unless there is a failure policy."""


class BusOptions(TypedDict, total=False):
    """Options of a bus."""

    service: Required[str]
    """Name of the service: the ``source`` of its events and the prefix of its groups."""
    bus: str
    """Buses inside one store do not see each other. Default ``default``."""
    mode: Mode
    """``async``: through the transport (default). ``sync``: ``publish`` runs this process's matching handlers."""
    worker_count: int
    """Handlers of one subscription that run at once, unless it says otherwise. Default 10."""
    buffer_size: int
    """Most deliveries that one subscription holds in this process. Default 1000."""
    when_full: Literal["wait", "error"]
    """When many publishes wait: ``wait`` for room up to ``publish_timeout`` (default), or ``error``: `BufferFull`."""
    publish_buffer_bytes: int
    """Publishes that may wait: to be written, or in memory to be handled. Default 64 MiB, 512 MiB in memory."""
    fail_open: bool
    """A publish that fails in the transport is logged and counted, not raised. Default false."""
    max_payload_bytes: int
    """Largest payload, on publish and on consume. Default 1 MiB."""
    retry: RetryPolicy
    """Policy of the subscriptions that have none of their own."""
    durability: Literal["warn", "required", "off", "full", "normal"]
    """What a confirmed publish has to survive. Default ``warn``: the safest there is, and a warning if that is weak."""
    lease: Seconds
    """How long a delivery stays with a process that gives no sign of life. At least 1; default 30."""
    publish_timeout: Seconds
    """Longest wait of one publish. Default 10."""
    retention: Seconds
    """How long an event is kept after every group has finished it. Default: 1 hour in a file, 1 minute on Redis."""
    max_age: Seconds
    """Drop events older than this, finished or not. Default: never."""
    max_events: int
    """Drop the oldest events beyond this number, finished or not. Default: never."""
    max_bytes: int
    """Drop the oldest events beyond so many bytes, finished or not; on Redis of the log's memory. Default: never."""
    confirm: Literal["memory", "disk", "replica"]
    """Where a publish to a server must have arrived before it returns. Default ``memory``: in the server."""
    idempotency_window: Seconds
    """How long the ``idempotency_key`` of a published event is remembered: another publish with it is absorbed, and its
    receipt says ``duplicate``. 0 turns it off. Default: 1 hour; not on ``redis+pubsub``."""
    partitions: int
    """Parts that a bus on a server is split into, by partition key; fixed when the bus is made. Default 1."""
    allow_network_fs: bool
    """Open a file on a network file system, which may break its locks. Default false."""
    on_duplicate: Literal["error", "replace"]
    """What a second handler of the same name does. Default ``error``; ``replace`` at a prompt or reloading server."""
    logger: AnyLogger
    """Where to log; also an object like structlog's. Default ``logging.getLogger("polybus")``."""


class BreakerOptions(TypedDict, total=False):
    """When a subscription stops taking events, and how it starts again."""

    threshold: int
    """So many failed calls of the handler … Default 5."""
    window: Seconds
    """… within this time open the breaker: nothing is taken any more. Default 60."""
    recovery: Seconds
    """How long. Default 30."""
    probes: int
    """How many calls are tried then, at once; when all succeed it closes, when one fails it opens again. Default 1."""


class BatchOptions(TypedDict, total=False):
    """How events are gathered for a handler that takes a list."""

    size: int
    """Most events of one batch. Default 100."""
    wait: Seconds
    """How long the first one waits for the others. Default 0.05."""


class SubscribeOptions(TypedDict, total=False):
    """Options of a subscription."""

    name: str
    """Unique on the bus. Default: the handler's qualified name."""
    group: str
    """The durable group. Default ``<service>/<name>``."""
    concurrency: int
    """Handlers that run at once. Default: the bus's ``worker_count``; 1 for a handler of batches."""
    prefetch: int
    """Deliveries taken ahead of a free handler. Default 0."""
    retry: RetryPolicy
    """Default: the bus's."""
    timeout: Seconds
    """A handler that runs longer is cancelled, and its event retried. Default: none."""
    start: Literal["new", "beginning"] | datetime | float
    """Where a new group begins. Default ``new``: with what is published from now on."""
    broadcast: bool
    """Every process gets every event from now on; nothing is retried or kept. Default false."""
    ordered: bool
    """Events of one ``partition_key`` are handled one at a time and in order, over all processes of the group;
    other keys go on. All processes of a group must agree: ``InvalidConfig``. Default false."""
    dead_letter: bool
    """Keep what cannot be handled. Default true; otherwise it is logged and dropped."""
    breaker: BreakerOptions | bool
    """Stop taking while the handler keeps failing. ``True`` for the defaults; default: none."""
    batch: BatchOptions | bool
    """The handler takes a list of events; ``BatchFailed`` fails some of them. ``True`` for the defaults."""
    idempotent: bool | Callable[[Event[Any]], str | int | None]
    """Handle events of one key once, in the whole group. ``True``: the event's ``idempotency_key``, or its id where it
    has none. A plain function tells the key; where it returns ``None``, the event's own counts. Default false."""
    idempotent_retention: Seconds
    """How long a handled key is remembered. Default: 7 days."""
    dead_letter_expired: bool
    """Keep what expires before a handler got it, too. Default false: it is dropped and counted as ``expired``."""


class MetaOptions(TypedDict, total=False):
    """The members of an event's meta that a publisher may set."""

    id: str
    timestamp: str | datetime
    source: str
    schema_version: int
    correlation_id: str
    causation_id: str
    partition_key: str
    idempotency_key: str
    resource: str
    resource_id: str
    user_id: str
    organization_id: str
    session_id: str
    instance_id: str
    aggregate: Aggregate | tuple[str, str] | dict[str, str]
    traceparent: str
    tracestate: str
    headers: dict[str, str]


class DeadLetterFilter(TypedDict, total=False):
    """Which dead letters a call is about. Empty means all of them."""

    id: str
    group: str
    pattern: str
    since: datetime | float
    """Failed last at this time or later."""
    before: datetime | float
    """Failed last before this time."""
    older_than: Seconds
    """Failed last longer ago than this."""
