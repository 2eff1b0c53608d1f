"""Carrying events from the outbox to a bus: `Relay`."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeAlias

from polybus import _runtime
from polybus._native import Event, NativeOutbox, NativeRelay
from polybus.errors import InvalidConfig, PolybusError
from polybus.outbox._driver import explain
from polybus.retry import RetryPolicy

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from polybus._options import RelayOptions, Seconds
    from polybus.bus import Bus

__all__ = ["DeadRow", "Executor", "FailurePolicy", "Relay", "RelayBatch", "RelayHealth", "RelayStats"]

Rows: TypeAlias = "tuple[Sequence[Sequence[Any]], int]"
"""Rows that a statement returned, and how many it changed."""

Executor: TypeAlias = Callable[[str, Sequence[Any]], "Rows | Awaitable[Rows]"]
"""Runs one statement in a transaction of its own, and commits it. May be async."""

Decision: TypeAlias = "float | timedelta | datetime | None"

FailurePolicy: TypeAlias = Callable[[int, PolybusError], "Decision | Awaitable[Decision]"]
"""Decides about a row that the bus refused, from its failed attempts so far, this one included, and the error.

It returns seconds or a `timedelta` until the next attempt, the time of it, or `None` for a dead letter. May be async.
"""


@dataclass(frozen=True)
class RelayBatch:
    """What became of the rows of one claim."""

    attempted: int = 0
    """Rows that were claimed."""
    relayed: int = 0
    """Published, and marked so."""
    publish_failed: int = 0
    """Not taken by the bus."""
    ack_failed: int = 0
    """Published and not marked, as the database did not answer: they will be published again, with the same ids."""
    ownership_mismatches: int = 0
    """Another relay had claimed them meanwhile, because our lease was over: nothing of theirs was changed."""
    malformed: int = 0
    """They hold no event, and are dead."""
    dead_lettered: int = 0
    """They will not be tried again; the malformed ones included."""
    returned: int = 0
    """Given back without an attempt counted: the bus was away, or they wait for an earlier one of their key."""
    outage: str | None = None
    """Why the bus takes nothing, if it is away."""


@dataclass(frozen=True)
class RelayStats:
    """The rows of an outbox by state, counted on the live table."""

    pending: int
    """Not finished, whatever they wait for."""
    claimed: int
    """Of those, claimed by a relay."""
    retrying: int
    """Of those, waiting for another attempt."""
    dead: int
    """Dead letters."""
    oldest: float | None
    """Age in seconds of the oldest that is not finished."""


@dataclass(frozen=True)
class RelayHealth:
    """How a relay is in this process."""

    healthy: bool
    """It runs, reaches the database, and the bus takes events."""
    workers: int
    """Workers that run."""
    database: str | None
    """Why the database cannot be used, if so."""
    bus: str | None
    """Why the bus takes nothing, if so."""
    last_look: float | None
    """Seconds since a worker looked at the table with success."""


@dataclass(frozen=True)
class DeadRow:
    """A row that is not tried again, unless somebody replays it."""

    seq: int
    """Its place: the next page of `dead_letters` continues after it."""
    event_id: str
    type: str
    raw: str
    """What the row holds: an event's wire form, if all is well."""
    partition_key: str | None
    attempts: int
    last_error: str
    """Code and message."""
    created_at: datetime
    """When the row was written, by the database's clock."""
    dead_at: datetime
    """When it died."""

    @property
    def event(self) -> Event[Any]:
        """The event. `InvalidEvent` if the row holds none."""
        try:
            wire = json.loads(self.raw)
        except ValueError:
            wire = self.raw
        return Event.from_dict(wire)


class Relay:
    """Carries events from an outbox to a bus, at least once, in the order of each partition key.

        relay = Relay("postgresql://shop@db/shop", bus)
        await relay.run()

    - `database`: the URL of a PostgreSQL, MySQL or MariaDB database, as libpq or SQLAlchemy writes it; the relay has
      connections of its own. For a SQLite database a `sqlite3.Connection` in autocommit (`isolation_level=None`), or an
      `Executor` that runs the statements on whatever connection; `dialect` and `style` (`%s` for `mysql` unless given)
      tell what it speaks.
    - `bus`: where the events go. Not one with `fail_open`, which would lose them.
    - `failure_policy`: a `FailurePolicy`, or a `RetryPolicy`. Unless given, an error that no retry mends makes a dead
      letter at once, any other one after three retries. It is not asked when the bus is away: then nothing is
      published, and no attempt counts.
    - `table` (`polybus_outbox`), `batch` (500 rows a claim), `workers` (1; with more, events without a key may overtake
      each other), `lease` (30 s: what a relay had that died is published after this), `poll_interval` (0.25 s),
      `listen` (True: wake up by NOTIFY), `listen_url` (where to listen when `database` leads to PgBouncer). The last
      two are PostgreSQL's.

    Any number of relays work on one table. Opens nothing until it is used. `InvalidConfig` for what can never work.
    """

    def __init__(
        self,
        database: str | Executor | Any,
        bus: Bus,
        failure_policy: FailurePolicy | RetryPolicy | None = None,
        *,
        dialect: str | None = None,
        style: str | None = None,
        **options: Unpack[RelayOptions],
    ) -> None:
        given: dict[str, Any] = dict(options)
        if isinstance(failure_policy, RetryPolicy):
            given["retry"], failure_policy = failure_policy, None
        if failure_policy is not None and not callable(failure_policy):
            raise TypeError(
                f"failure_policy is a {type(failure_policy).__qualname__}; give a function or a RetryPolicy"
            )
        self._policy = failure_policy
        self._execute: Executor | None = None
        url: str | None = None
        if isinstance(database, str):
            url = database
        elif type(database).__module__ == "sqlite3" and hasattr(database, "execute"):
            self._execute, dialect, style = _on_sqlite(database), dialect or "sqlite", style or "?"
        elif callable(database):
            self._execute = database
        else:
            raise InvalidConfig(
                f"the database of a relay is a URL, a sqlite3.Connection or a function that runs statements, "
                f"not {type(database).__qualname__}"
            )
        usual = {"sqlite": "?", "mysql": "%s", "mariadb": "%s"}
        spoken = (dialect or ("sqlite" if style == "?" else "postgres"), style or usual.get(dialect or "", "$"))
        self._dialect = spoken[0]
        self._table = NativeOutbox(table=given.get("table"))
        self._native = NativeRelay(url, *spoken, bus._native, failure_policy is not None, given)
        self._asks = self._execute is not None or self._policy is not None
        self._using = 0
        self._clerk: asyncio.Task[None] | None = None

    @property
    def database(self) -> str | None:
        """Where it connects, without a password; `None` if it has no connection of its own."""
        return self._native.database

    async def check(self) -> None:
        """`InvalidConfig` if the table is missing or of another version, `AuthFailed`, `ConnectionFailed`."""
        await self._run(self._native.check())

    async def relay_batch(self) -> RelayBatch:
        """Relay what one claim gives, and tell what became of it. `ConnectionFailed` if the claim cannot be made."""
        return RelayBatch(**await self._run(self._native.relay_batch()))

    async def run(self) -> None:
        """Work until `stop`, or until this is cancelled; rows that are under way then are finished first.

        Database and bus may be away for any time: it waits, longer and longer up to 10 s, and goes on. Fails at once if
        the table is missing or of another version, or if the database refuses the user.
        """
        working = asyncio.ensure_future(self._run(self._native.run()))
        try:
            await asyncio.shield(working)
        except asyncio.CancelledError:
            self._native.stop()
            await working
            raise

    def stop(self) -> None:
        """End `run` when the rows that are under way are finished. May be called from any thread."""
        self._native.stop()

    def wake(self) -> None:
        """Let the workers of this process look at the table now: for after a commit."""
        self._native.wake()

    async def stats(self) -> RelayStats:
        """Count the rows by state."""
        return RelayStats(**await self._run(self._native.stats()))

    def health(self) -> RelayHealth:
        """How it is; asks nobody."""
        return RelayHealth(**self._native.health())

    async def metrics(self) -> str:
        """Totals of this process, and what there is to do, as Prometheus reads it."""
        text: str = await self._run(self._native.metrics())
        return text

    async def dead_letters(self, limit: int = 100, after: int | DeadRow = 0) -> list[DeadRow]:
        """Oldest first, at most `limit`, those after the row `after`."""
        place = after.seq if isinstance(after, DeadRow) else after
        return [_dead(**row) for row in await self._run(self._native.dead_letters(place, limit))]

    async def replay(self, event_id: str | DeadRow | None = None) -> int:
        """Make one dead letter, or all of them, pending again; attempts from 1. Returns how many.

        `NotFound` for an event without one.
        """
        count: int = await self._run(self._native.replay(_id(event_id)))
        return count

    async def purge(self, older_than: Seconds) -> int:
        """Remove rows that were delivered longer ago, in small steps. Returns how many.

        What is removed absorbs no second event of its id or dedupe key any more.
        """
        age = older_than if isinstance(older_than, timedelta) else timedelta(seconds=older_than)
        count: int = await self._run(self._native.purge(age))
        return count

    async def purge_dead(self, event_id: str | DeadRow | None = None) -> int:
        """Remove one dead letter, or all of them. Returns how many."""
        count: int = await self._run(self._native.purge_dead(_id(event_id)))
        return count

    def __repr__(self) -> str:
        return f"Relay({self.database!r})"

    # ---- what the core asks ----

    async def _run(self, operation: Any) -> Any:
        if not self._asks:
            return await _runtime.run(operation)
        async with self._answering():
            return await _runtime.run(operation)

    @contextlib.asynccontextmanager
    async def _answering(self) -> AsyncGenerator[None, None]:
        """While anybody uses the relay, one task answers its questions."""
        self._using += 1
        if self._clerk is None:
            self._clerk = asyncio.ensure_future(self._answer())
        try:
            yield
        finally:
            self._using -= 1
            if self._using == 0:
                clerk, self._clerk = self._clerk, None
                self._native.dismiss()
                await clerk

    async def _answer(self) -> None:
        while (question := await _runtime.run(self._native.next_question())) is not None:
            number, first, second = question
            try:
                if isinstance(first, str):
                    assert self._execute is not None
                    rows, affected = await _awaited(self._execute(first, second))
                    self._native.answer_rows(number, [list(row) for row in rows], max(affected, 0))
                else:
                    assert self._policy is not None
                    self._native.answer_decision(number, _seconds(await _awaited(self._policy(first, second))))
            except Exception as error:
                told = explain(error, self._table, self._dialect, relaying=True)
                if told is not None:
                    self._native.answer_error(number, getattr(told, "retryable", False), str(told))
                    continue
                retryable = not isinstance(error, (TypeError, ValueError, AttributeError, AssertionError))
                self._native.answer_error(number, retryable, f"{type(error).__qualname__}: {error}")


async def _awaited(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


def _seconds(decision: Any) -> float | None:
    if decision is None:
        return None
    if isinstance(decision, timedelta):
        return decision.total_seconds()
    if isinstance(decision, datetime):
        return (decision - datetime.now(decision.tzinfo)).total_seconds()
    if isinstance(decision, (int, float)) and not isinstance(decision, bool):
        return float(decision)
    raise TypeError(f"a failure policy returned {decision!r}; return seconds, a timedelta, a datetime or None")


def _on_sqlite(connection: Any) -> Executor:
    def execute(sql: str, params: Sequence[Any]) -> Rows:
        if connection.in_transaction:
            raise InvalidConfig(
                "the relay's sqlite3 connection is inside a transaction; give it one of its own, "
                "made with isolation_level=None"
            )
        before = connection.total_changes
        with connection:
            rows = connection.execute(sql, params).fetchall()
        return rows, connection.total_changes - before

    return execute


def _id(which: str | DeadRow | None) -> str | None:
    return which.event_id if isinstance(which, DeadRow) else which


def _dead(*, event: str, created_at: int, dead_at: int, **row: Any) -> DeadRow:
    def at(millis: int) -> datetime:
        return datetime.fromtimestamp(millis / 1000, timezone.utc)

    return DeadRow(raw=event, created_at=at(created_at), dead_at=at(dead_at), **row)
