"""The log as a Python program reads it, and replays of it into one group."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from polybus import (
    Bus,
    BusClosed,
    Event,
    HistoryEntry,
    InvalidConfig,
    InvalidPattern,
    NotFound,
    Reject,
    ReplayResult,
    RetryPolicy,
)
from store import Store

pytestmark = pytest.mark.every_transport


@pytest.fixture
async def bus(store: Store) -> AsyncIterator[Bus]:
    async with store.bus(retry=RetryPolicy(max_retries=0)) as bus:
        yield bus


class Inbox:
    """Events that a handler was given."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[Event[Any]] = asyncio.Queue()

    async def handle(self, event: Event[Any]) -> None:
        self._events.put_nowait(event)

    async def take(self, count: int) -> list[Event[Any]]:
        return [await asyncio.wait_for(self._events.get(), 20) for _ in range(count)]

    @property
    def empty(self) -> bool:
        return self._events.empty()


async def finished(bus: Bus, name: str) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    pending = True
    while pending:
        assert asyncio.get_running_loop().time() < deadline
        pending = (await bus.stats())[name].pending > 0


async def test_pages_in_publish_order(bus: Bus) -> None:
    before = datetime.now(timezone.utc) - timedelta(seconds=5)
    receipts = [await bus.publish("order.placed", number) for number in range(7)]
    await bus.publish("user.created", 7)
    pages: list[list[HistoryEntry]] = []
    after = None
    while page := await bus.history("order.*", limit=3, after=after):
        pages.append(page)
        after = page[-1].position
    assert [len(page) for page in pages] == [3, 3, 1]
    entries = [entry for page in pages for entry in page]
    assert [entry.event.payload for entry in entries if entry.event] == list(range(7))
    assert [entry.position for entry in entries] == [receipt.position for receipt in receipts]
    assert all(entry.published_at > before and entry.records is None and entry.raw is None for entry in entries)
    assert len(await bus.history()) == 8
    assert await bus.history(since=datetime.now(timezone.utc) + timedelta(hours=2)) == []
    assert len(await bus.history(since=before, until=before + timedelta(hours=1))) == 8
    assert [entry.position for entry in await asyncio.to_thread(bus.blocking.history, limit=1)] == [
        receipts[0].position
    ]


async def test_records_of_each_group(bus: Bus) -> None:
    done = Inbox()

    async def refuse(event: Event[Any]) -> None:
        raise Reject("never")

    await bus.subscribe("x", done.handle, name="done")
    await bus.subscribe("x", refuse, name="refuse")
    away = await bus.subscribe("x", Inbox().handle, name="away")
    await away.unsubscribe()
    await bus.publish("x", 1)
    await done.take(1)
    await finished(bus, "done")
    await finished(bus, "refuse")
    (entry,) = await bus.history(records=True)
    assert entry.records is not None
    found = {record.group: record for record in entry.records}
    assert {name: record.status for name, record in found.items()} == {
        "shop/done": "completed",
        "shop/refuse": "failed",
        "shop/away": "pending",
    }
    failed = found["shop/refuse"]
    assert (failed.attempts, failed.reason, failed.retry_at) == (1, "rejected", None)
    assert failed.error is not None
    assert failed.error.message == "never"
    assert failed.dead_letter is not None
    assert (await bus.dead_letters.get(failed.dead_letter)).attempts == 1
    assert found["shop/done"].completed_at is None


async def test_replay_into_one_group(bus: Bus) -> None:
    one, two = Inbox(), Inbox()
    await bus.subscribe("x", one.handle, name="one")
    await bus.subscribe("x", two.handle, name="two")
    await bus.publish_many([Event.create("x", number) for number in range(600)])
    ids = {event.meta.id for event in await one.take(600)}
    await two.take(600)
    await finished(bus, "one")
    await finished(bus, "two")
    told: list[ReplayResult] = []

    async def progress(result: ReplayResult) -> None:
        await asyncio.sleep(0)
        told.append(result)

    first = await bus.replay("x", group="shop/one", limit=10, progress=progress)
    assert (first.count, first.done, told) == (10, False, [first])
    rest = await bus.replay("x", group="shop/one", after=first.position, progress=told.append)
    assert (rest.count, rest.done) == (590, True)
    assert len(told) > 2
    again = await one.take(600)
    assert {event.meta.id for event in again} == ids
    assert {event.delivery.attempt for event in again if event.delivery} == {1}
    await finished(bus, "one")
    assert (await bus.replay("nothing", group="shop/one")).count == 0
    assert (await asyncio.to_thread(bus.blocking.replay, group="shop/one", limit=1)).count == 1
    await one.take(1)
    assert one.empty
    assert two.empty


async def test_a_progress_that_raises_ends_the_replay_between_two_batches(bus: Bus) -> None:
    inbox = Inbox()
    subscription = await bus.subscribe("x", inbox.handle, name="s")
    await bus.publish_many([Event.create("x", number) for number in range(1200)])
    await inbox.take(1200)
    await finished(bus, "s")
    await subscription.unsubscribe()
    told: list[ReplayResult] = []

    def stop(result: ReplayResult) -> None:
        told.append(result)
        raise KeyError("enough")

    with pytest.raises(KeyError):
        await bus.replay(group="shop/s", progress=stop)
    (reached,) = told
    assert 0 < reached.count < 1200
    rest = await bus.replay(group="shop/s", after=reached.position)
    assert reached.count + rest.count == 1200


async def test_bad_questions(bus: Bus, store: Store) -> None:
    await bus.subscribe("x", Inbox().handle, name="mail")
    now = datetime.now(timezone.utc)
    for wrong in [
        {"since": now, "until": now - timedelta(seconds=1)},
        {"limit": 0},
        {"limit": "ten"},
        {"after": "yesterday"},
        {"since": "yesterday"},
    ]:
        with pytest.raises(InvalidConfig):
            await bus.history(**wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfig):
            await bus.replay(group="shop/mail", **wrong)  # type: ignore[arg-type]
    with pytest.raises(InvalidPattern):
        await bus.history("[")
    with pytest.raises(NotFound, match="did you mean"):
        await bus.replay(group="shop/mial")
    with pytest.raises(TypeError):
        await bus.replay()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="progress"):
        await bus.replay(group="shop/mail", progress=7)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="dead_letter"):
        await bus.subscribe("x", Inbox().handle, name="x", dead_letter=False, dead_letter_expired=True)
    with pytest.raises(InvalidConfig, match="max_bytes"):
        store.bus(max_bytes=0)
    await bus.close()
    with pytest.raises(BusClosed):
        await bus.history()
    with pytest.raises(BusClosed):
        await bus.replay(group="shop/mail")


async def test_what_expires_can_become_a_dead_letter(bus: Bus) -> None:
    inbox = Inbox()
    subscription = await bus.subscribe("x", inbox.handle, name="s")
    await subscription.unsubscribe()
    await bus.publish("x", 1, expires_in=0.001)
    await asyncio.sleep(0.05)  # time itself is what is waited for
    await bus.publish("x", 2)
    await bus.subscribe("x", inbox.handle, name="s", dead_letter_expired=True)
    assert [event.payload for event in await inbox.take(1)] == [2]
    await finished(bus, "s")
    (letter,) = await bus.dead_letters.list()
    assert (letter.reason, letter.attempts, letter.group) == ("expired", 0, "shop/s")
    assert letter.event is not None
    assert letter.event.payload == 1
