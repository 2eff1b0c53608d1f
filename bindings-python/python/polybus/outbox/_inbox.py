"""The inbox: an event takes effect once for each consumer."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

from polybus._native import Event, NativeInbox
from polybus.errors import InvalidConfig
from polybus.outbox._driver import AsyncDriver, Driver, Steps, async_driver, drive, drive_async, sync_driver
from polybus.outbox._store import Dialect

__all__ = ["Inbox", "Once"]


class Inbox:
    """The inbox in one table, `polybus_inbox` unless `table` is given, as `table` or `schema.table`.

    It holds nothing open and is safe in threads. `InvalidConfig` for what is no name, `TypeError` for an unknown
    keyword.
    """

    def __init__(self, *, table: str | None = None, **unknown: Any) -> None:
        self._native = NativeInbox(table=table, **unknown)

    def once(
        self,
        session: Any,
        event: Event[Any] | str,
        *,
        consumer: str | None = None,
        allow_autocommit: bool = False,
    ) -> Once:
        """Mark the event, or the event of that id, as handled by `consumer`, in the transaction open on `session`.

            async with inbox.once(session, event, consumer="billing") as first:
                if first: …

        `first` is `False` when it was marked before, also when a transaction at the same time marks it and commits: the
        later one waits for the earlier. The mark commits with the effects, because both are in your transaction. An
        error that leaves the block takes the mark back; let it end the transaction too, so that the effects go with it.

        `with` takes what `Outbox.store` takes, `async with` what `Outbox.store_async` takes. `consumer` is the group
        that the event was delivered to unless given. `InvalidConfig` when no transaction is open
        (`allow_autocommit=True` allows that), when `session` is something else, or when the table is missing.
        """
        if isinstance(event, Event):
            if consumer is None and event.delivery is not None:
                consumer = event.delivery.group
            event_id = event.meta.id
        elif isinstance(event, str):
            event_id = event
        else:
            raise TypeError(f"once() takes an Event or the id of one, not {type(event).__name__}")
        if consumer is None:
            raise InvalidConfig('once() needs consumer= for an event that was not delivered, like consumer="billing"')
        return Once(self._native, session, consumer, event_id, allow_autocommit)

    def purge(self, session: Any, *, older_than: float | timedelta, limit: int = 1000) -> int:
        """Delete up to `limit` marks that are older than `older_than` (seconds or a `timedelta`), and return how many.

        In your transaction, or in none. Call it until it returns less than `limit`, with a commit after each call:
        short transactions disturb nobody. Keep marks for longer than an event can come again, replays included.
        """
        driver = sync_driver(session, "purge()")
        steps = _counted(self._native.purge(driver.dialect, driver.style, older_than, limit))
        return drive(driver, steps, self._native, what="", allow_autocommit=True)

    async def purge_async(self, session: Any, *, older_than: float | timedelta, limit: int = 1000) -> int:
        """As `purge`, on what `Outbox.store_async` takes."""
        driver = async_driver(session, "purge_async()")
        steps = _counted(self._native.purge(driver.dialect, driver.style, older_than, limit))
        return await drive_async(driver, steps, self._native, what="", allow_autocommit=True)

    def ddl(self, dialect: Dialect) -> list[str]:
        """Statements that make the table and its index where they are missing, to be run in order."""
        return self._native.ddl(dialect)


class Once:
    """What `Inbox.once` returns: `with` or `async with` it."""

    def __init__(self, native: NativeInbox, session: Any, consumer: str, event_id: str, allow_autocommit: bool) -> None:
        self._native = native
        self._session = session
        self._key = (consumer, event_id)
        self._allow_autocommit = allow_autocommit
        self._first = False

    def _mark(self, driver: Driver | AsyncDriver) -> Steps[int]:
        return _counted(self._native.mark(driver.dialect, driver.style, *self._key))

    def _unmark(self, driver: Driver | AsyncDriver) -> tuple[str, Any]:
        return self._native.unmark(driver.dialect, driver.style, *self._key)

    def __enter__(self) -> bool:
        driver = sync_driver(self._session, "with once()")
        allow = self._allow_autocommit
        self._first = drive(driver, self._mark(driver), self._native, what="the mark", allow_autocommit=allow) == 1
        return self._first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._first:
            return
        driver = sync_driver(self._session, "with once()")
        with suppress(Exception):  # a transaction that takes no statement any more can only be rolled back
            driver.run(*self._unmark(driver))

    async def __aenter__(self) -> bool:
        driver = async_driver(self._session, "async with once()")
        allow = self._allow_autocommit
        marked = await drive_async(driver, self._mark(driver), self._native, what="the mark", allow_autocommit=allow)
        self._first = marked == 1
        return self._first

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._first:
            return
        driver = async_driver(self._session, "async with once()")
        with suppress(Exception):  # as above
            await driver.run(*self._unmark(driver))


def _counted(change: tuple[tuple[str, Any], tuple[str, Any] | None]) -> Steps[int]:
    statement, confirm = change
    rows = yield statement
    if confirm is None:
        return len(rows)
    return int((yield confirm)[0])
