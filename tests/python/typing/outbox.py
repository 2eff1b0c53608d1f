"""As `public_api.py`: the outbox, the inbox and the relay."""

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import assert_type

from polybus import Bus, Event, PolybusError, RetryPolicy
from polybus.django import store
from polybus.outbox import DeadRow, Inbox, Outbox, Relay, RelayBatch, RelayHealth, RelayStats, Statement, inbox


async def outbox(connection: sqlite3.Connection, session: AsyncSession) -> None:
    box = Outbox(table="app.outbox", service="shop")
    event = Event.create("order.paid", {"cents": 1})
    assert_type(box.store(event, session=connection), bool)
    assert_type(box.store([event], connection), list[bool])
    assert_type(await box.store_async(event, session, dedupe_key="k"), bool)
    assert_type(await box.store_async([event, event], session), list[bool])
    box.store([event], connection, dedupe_key="k")  # type: ignore[call-overload]
    assert_type(box.statement(event, style="$"), Statement)
    box.statement(event, style="%d")  # type: ignore[arg-type]
    assert_type(box.ddl("mysql"), list[str])
    with inbox.once(connection, event, consumer="billing") as first:
        assert_type(first, bool)
    async with inbox.once(session, event.meta.id, consumer="billing") as first:
        assert_type(first, bool)
    assert_type(inbox.purge(connection, older_than=timedelta(days=7)), int)
    assert_type(await inbox.purge_async(session, older_than=3600, limit=10), int)
    Outbox(table=5)  # type: ignore[arg-type]
    box.store("order.paid", connection)  # type: ignore[arg-type]
    await box.store_async(event)  # type: ignore[call-overload]
    box.ddl("oracle")  # type: ignore[arg-type]
    inbox.once(connection, 5)  # type: ignore[arg-type]
    inbox.purge(connection)  # type: ignore[call-arg]
    assert_type(Inbox(table="app.inbox").ddl("sqlite"), list[str])


def with_a_framework(session: Session) -> None:
    event = Event.create("order.paid", {"cents": 1})
    Outbox().add(event, session)
    Outbox().add([event, event], session)
    assert_type(store(event, using="default"), bool)
    assert_type(store([event]), list[bool])
    store([event], dedupe_key="k")  # type: ignore[call-overload]


async def relay(bus: Bus, connection: sqlite3.Connection) -> None:
    def execute(sql: str, params: Sequence[Any]) -> tuple[list[tuple[Any, ...]], int]:
        return connection.execute(sql, params).fetchall(), 0

    async def execute_async(sql: str, params: Sequence[Any]) -> tuple[list[list[Any]], int]:
        return [], 0

    def policy(attempts: int, error: PolybusError) -> float | timedelta | datetime | None:
        return None if attempts > 3 or not error.retryable else timedelta(seconds=attempts)

    running = Relay("postgresql://shop@db/shop", bus, policy, workers=2, lease=30.0, poll_interval=timedelta(seconds=1))
    Relay(connection, bus, RetryPolicy(max_retries=5))
    Relay(execute, bus, dialect="sqlite", table="app.outbox")
    Relay(execute_async, bus, dialect="postgres", style="$", listen=False)
    Relay("postgresql://db/shop")  # type: ignore[call-arg]
    Relay("postgresql://db/shop", bus, leese=3)  # type: ignore[call-arg]
    Relay("postgresql://db/shop", bus, batch="10")  # type: ignore[arg-type]
    Relay("postgresql://db/shop", bus, lambda attempts: None)  # type: ignore[arg-type, misc]
    assert_type(running.database, str | None)
    await running.check()
    assert_type(await running.relay_batch(), RelayBatch)
    assert_type((await running.relay_batch()).outage, str | None)
    assert_type(await running.stats(), RelayStats)
    assert_type((await running.stats()).oldest, float | None)
    assert_type(running.health(), RelayHealth)
    assert_type(await running.metrics(), str)
    letters = await running.dead_letters(limit=10)
    assert_type(letters, list[DeadRow])
    assert_type(letters[0].event, Event[Any])
    assert_type(letters[0].dead_at, datetime)
    assert_type(await running.dead_letters(after=letters[-1]), list[DeadRow])
    assert_type(await running.replay(letters[0]), int)
    assert_type(await running.purge(timedelta(days=7)), int)
    assert_type(await running.purge_dead("id"), int)
    await running.purge()  # type: ignore[call-arg]
    letters[0].attempts = 3  # type: ignore[misc]
    running.wake()
    running.stop()
    await running.run()
