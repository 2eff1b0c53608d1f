"""Storing events in the outbox."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, cast, overload

from polybus._native import Event, NativeInsert, NativeOutbox
from polybus.errors import InvalidConfig
from polybus.outbox import _collect
from polybus.outbox._driver import (
    AsyncCounting,
    AsyncDriver,
    AsyncNotifying,
    Counting,
    Driver,
    Notifying,
    Statement,
    Steps,
    async_driver,
    before_notify,
    change,
    change_async,
    counts,
    drive,
    drive_async,
    sync_driver,
)
from polybus.outbox._wake import wake

__all__ = ["Dialect", "Outbox", "Statement", "Style"]

Dialect: TypeAlias = Literal["postgres", "postgresql", "sqlite", "mysql", "mariadb"]
Style: TypeAlias = Literal["$", "?", "%s", ":name"]


class Outbox:
    """The outbox in one table: stores events on a connection that you hand in, in its transaction.

    - `table`: `table` or `schema.table`, `polybus_outbox` unless given; letters, digits and `_`.
    - `service`: the `source` of events that have none. Unless given, the relay's service becomes their source.
    - `max_payload_bytes`: 1 MiB unless given, as on a bus.

    It holds nothing open and is safe in threads. `InvalidConfig` for a name or a value that is not valid, `TypeError`
    for an unknown keyword.
    """

    def __init__(
        self,
        *,
        table: str | None = None,
        service: str | None = None,
        max_payload_bytes: int | None = None,
        **unknown: Any,
    ) -> None:
        self._native = NativeOutbox(table=table, service=service, max_payload_bytes=max_payload_bytes, **unknown)
        self._texts: dict[tuple[str, str], str] = {}

    @overload
    def store(
        self, event: Event[Any], session: Any, *, dedupe_key: str | None = None, allow_autocommit: bool = False
    ) -> bool: ...
    @overload
    def store(self, event: Iterable[Event[Any]], session: Any, *, allow_autocommit: bool = False) -> list[bool]: ...
    def store(
        self,
        event: Event[Any] | Iterable[Event[Any]],
        session: Any,
        *,
        dedupe_key: str | None = None,
        allow_autocommit: bool = False,
    ) -> bool | list[bool]:
        """Store an event, or many in one statement, in the transaction that is open on `session`.

        `session`: a Django connection or the name of one, a SQLAlchemy `Session` or `Connection`, or a connection of
        psycopg, psycopg2, sqlite3 or PyMySQL. Nothing is committed here.

        Returns whether the event was stored: `False` if one with the same id or the same `dedupe_key` (the event's
        idempotency key unless given) is in the table already, also when a transaction at the same time is about to put
        it there. A list for many.

        `InvalidConfig` when no transaction is open (`allow_autocommit=True` allows that), when `session` is something
        else, or when the table is missing; `PayloadTooLarge` and `InvalidEvent` before anything is sent. What the
        database refuses is the driver's own error.
        """
        driver = sync_driver(session, "store()")
        if isinstance(event, Event) and (text := self._text(driver)):
            row, counting = self._native.row(event, dedupe_key), cast("Counting", driver)
            return change(counting, text, row, self._native, what="the event", allow_autocommit=allow_autocommit) == 1
        inserts = self._inserts(driver.dialect, driver.style, event, dedupe_key)
        stored = drive(driver, _steps(inserts), self._native, what="the event", allow_autocommit=allow_autocommit)
        self._wake_after(driver)
        return stored[0] if isinstance(event, Event) else stored

    @overload
    async def store_async(
        self, event: Event[Any], session: Any, *, dedupe_key: str | None = None, allow_autocommit: bool = False
    ) -> bool: ...
    @overload
    async def store_async(
        self, event: Iterable[Event[Any]], session: Any, *, allow_autocommit: bool = False
    ) -> list[bool]: ...
    async def store_async(
        self,
        event: Event[Any] | Iterable[Event[Any]],
        session: Any,
        *,
        dedupe_key: str | None = None,
        allow_autocommit: bool = False,
    ) -> bool | list[bool]:
        """As `store`, on SQLAlchemy's `AsyncSession` or `AsyncConnection`, or one of asyncpg, psycopg or aiosqlite."""
        driver = async_driver(session, "store_async()")
        if isinstance(event, Event) and (text := self._text(driver)):
            row, counting, allow = self._native.row(event, dedupe_key), cast("AsyncCounting", driver), allow_autocommit
            count = await change_async(counting, text, row, self._native, what="the event", allow_autocommit=allow)
            return count == 1
        inserts = self._inserts(driver.dialect, driver.style, event, dedupe_key)
        steps = _steps(inserts)
        stored = await drive_async(driver, steps, self._native, what="the event", allow_autocommit=allow_autocommit)
        self._wake_after(driver)
        return stored[0] if isinstance(event, Event) else stored

    def add(self, event: Event[Any] | Iterable[Event[Any]], session: Any) -> None:
        """Let a SQLAlchemy `Session` or `AsyncSession` store the event when it commits; nothing is to be awaited.

        All that was added in one transaction is stored in one statement, before the commit. What was added inside
        `begin_nested` is forgotten when that is rolled back. `InvalidConfig` for another kind of session; what
        `store` raises comes from the commit, `TypeError` for what is no event at once.
        """
        _collect.add(self, _events(event), session)

    def notify(self, session: Any) -> None:
        """Tell relays that listen, on whatever machine, that there is something to do. Call it after the commit.

        Then they need not wait for their next look. PostgreSQL only: elsewhere it does nothing, because relays cannot
        listen. At most a hundred times a second: in between it sends nothing, as a relay that was woken looks again
        soon. A SQLAlchemy session that stored an event does it by itself. For a relay in this process call its `wake`.

        `session` is what `store` takes. `InvalidConfig` in an open transaction: all that commit a NOTIFY wait for each
        other. Where a driver begins a transaction by itself, this one is committed.
        """
        driver = cast("Notifying", sync_driver(session, "notify()"))
        if driver.dialect != "postgres":
            return
        before_notify(driver)
        if statement := wake(self._native, driver.style):
            driver.run(*statement)
            driver.commit()

    async def notify_async(self, session: Any) -> None:
        """As `notify`, on what `store_async` takes."""
        driver = cast("AsyncNotifying", async_driver(session, "notify_async()"))
        if driver.dialect != "postgres":
            return
        before_notify(driver)
        if statement := wake(self._native, driver.style):
            await driver.run(*statement)
            await driver.commit()

    def statement(
        self,
        event: Event[Any] | Iterable[Event[Any]],
        *,
        style: Style,
        dialect: Dialect | None = None,
        dedupe_key: str | None = None,
    ) -> Statement:
        """What stores the event, to be run on any other driver: `(sql, params)`.

        `style` is how the driver writes placeholders: `$` (`$1`), `?`, `%s` or `:name`, for which `params` is a dict.
        `dialect` is the database: SQLite for `?`, PostgreSQL for the others unless given. On both the statement
        returns the ids of the events that were stored, and not of those that were absorbed; on MySQL nothing.

        One statement takes at most 1,000 events of together 8 MiB: `InvalidConfig` for more.
        """
        inserts = self._inserts(dialect, style, event, dedupe_key)
        if len(inserts) != 1:
            raise InvalidConfig(
                "statement() takes from 1 to 1,000 events of together 8 MiB; call it once for each part of them"
            )
        return Statement(*inserts[0].statement)

    def ddl(self, dialect: Dialect) -> list[str]:
        """Statements that make the table and its indexes where they are missing, to be run in order."""
        return self._native.ddl(dialect)

    def _wake_after(self, driver: Driver | AsyncDriver) -> None:
        """Notify after the commit, where the driver tells of it. None of those counts."""
        if driver.dialect == "postgres" and hasattr(driver, "wake_after"):
            driver.wake_after(self._native)

    def _text(self, driver: Driver | AsyncDriver) -> str | None:
        """What stores one event through a driver that counts: kept, so that only its values are asked for."""
        if not counts(driver):
            return None
        key = driver.dialect, driver.style
        text = self._texts.get(key)
        if text is None:
            text = self._texts[key] = self._native.one(*key) or ""
        return text

    def _inserts(
        self, dialect: str | None, style: str, event: Event[Any] | Iterable[Event[Any]], dedupe_key: str | None
    ) -> list[NativeInsert]:
        if dedupe_key is not None and not isinstance(event, Event):
            raise TypeError("dedupe_key= belongs to one event; give each of many an idempotency_key")
        return self._native.insert(dialect, style, _events(event), dedupe_key)


def _events(given: Event[Any] | Iterable[Event[Any]]) -> list[Event[Any]]:
    events = [given] if isinstance(given, (Event, str)) else list(given)
    for event in events:
        if not isinstance(event, Event):
            raise TypeError(f"the outbox stores events, not {type(event).__name__}: make one with Event.create(…)")
    return events


def _steps(inserts: list[NativeInsert]) -> Steps[list[bool]]:
    stored: list[bool] = []
    for insert in inserts:
        ids = yield insert.statement
        if insert.confirm is not None:
            ids = yield insert.confirm
        stored += insert.stored(ids)
    return stored
