"""Breakers, batches and full queues, as Python sees them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from polybus import (
    BatchFailed,
    BufferFull,
    Bus,
    Event,
    HandlerError,
    InvalidConfig,
    Reject,
    Retry,
    RetryPolicy,
    SubscriptionStats,
)
from polybus.testing import TestBus
from store import Store

QUICK = RetryPolicy(max_retries=3, initial_delay=0.001, jitter="none")
NEVER = 3600.0


@pytest.fixture
async def bus(store: Store) -> AsyncIterator[Bus]:
    async with store.bus(retry=QUICK) as bus:
        yield bus


async def stats_when(bus: Bus, name: str, ok: Any) -> SubscriptionStats:
    async def ask() -> SubscriptionStats:
        while not ok(stats := (await bus.stats())[name]):  # noqa: ASYNC110 - the store tells only when it is asked
            await asyncio.sleep(0.002)
        return stats

    return await asyncio.wait_for(ask(), 20)


def nothing_left(stats: SubscriptionStats) -> bool:
    return stats.pending == 0


async def publish(bus: Bus, *numbers: int) -> list[str]:
    events = [Event.create("n", number) for number in numbers]
    await bus.publish_many(events)
    return [event.meta.id for event in events]


@pytest.mark.every_transport
async def test_a_breaker_opens_and_recovers(bus: Bus) -> None:
    calls: list[int] = []

    async def handler(event: Event[int]) -> None:
        assert event.delivery
        calls.append(event.delivery.attempt)
        if len(calls) <= 2:
            raise ConnectionError("the database is away")

    guard = {"threshold": 2, "window": 60, "recovery": timedelta(seconds=0.5), "probes": 1}
    await bus.subscribe("n", handler, name="s", concurrency=1, breaker=guard)  # type: ignore[arg-type]
    assert (await bus.stats())["s"].breaker == "closed"
    await publish(bus, *range(6))
    # It opens while the handler that failed last is still counted.
    stats = await stats_when(bus, "s", lambda stats: stats.breaker == "open" and stats.running == 0)
    assert (stats.running, stats.completed, stats.dead, len(calls)) == (0, 0, 0, 2)
    assert "polybus_breaker_state" in bus.metrics()
    stats = await stats_when(bus, "s", lambda stats: stats.pending == 0 and stats.breaker == "closed")
    assert (stats.completed, stats.failed, stats.dead) == (6, 2, 0)
    assert (len(calls), calls.count(1)) == (8, 6)


async def test_a_breaker_follows_the_virtual_clock() -> None:
    async with TestBus(retry=QUICK) as bus:
        bus.mock_handler("n", name="s", breaker=True, concurrency=1).raises = OSError("away")
        for number in range(8):
            await bus.publish("n", number)
        await bus.idle()
        stats = (await bus.stats())["s"]
        assert (stats.breaker, stats.failed) == ("open", 5)
        await bus.advance(29)
        assert (await bus.stats())["s"].failed == 5
        await bus.advance(1)
        stats = (await bus.stats())["s"]
        assert (stats.breaker, stats.failed) == ("open", 6)
        await bus.publish("other")


@pytest.mark.every_transport
@pytest.mark.parametrize("threads", [False, True])
async def test_a_batch_and_what_fails_in_it(bus: Bus, threads: bool) -> None:
    batches: list[list[tuple[int, int]]] = []
    ids: dict[int, str] = {}

    def judge(events: list[Event[int]]) -> None:
        batches.append([(event.payload, event.delivery.attempt) for event in events if event.delivery])
        ids.update({event.payload: event.meta.id for event in events})
        errors: dict[str, BaseException | str] = {}
        for event in events:
            assert event.delivery
            if event.payload == 1:
                errors[event.meta.id] = Reject("never")
            elif event.delivery.attempt == 1 and event.payload == 2:
                errors[event.meta.id] = Retry(after=0.01)
            elif event.delivery.attempt == 1 and event.payload == 3:
                errors[event.meta.id] = "no luck"
        events.clear()  # the list is ours
        raise BatchFailed(errors)

    async def later(events: list[Event[int]]) -> None:
        assert threading.current_thread() is threading.main_thread()
        judge(events)

    await bus.subscribe("n", judge if threads else later, name="s", batch={"size": 5, "wait": 0.05})
    await publish(bus, *range(5))
    stats = await stats_when(bus, "s", lambda stats: stats.pending == 0 and stats.dead == 1)
    assert (stats.completed, stats.retried, stats.dead_lettered) == (4, 2, 1)
    seen = sorted(entry for batch in batches for entry in batch)
    assert seen == [(0, 1), (1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1)]
    (letter,) = await bus.dead_letters.list()
    assert letter.event is not None
    assert (letter.event.payload, letter.reason, letter.error.type) == (1, "rejected", "Reject")


@pytest.mark.every_transport
async def test_a_batch_that_raises_fails_as_a_whole(bus: Bus) -> None:
    sizes: list[int] = []

    async def handler(events: list[Event[int]]) -> None:
        sizes.append(len(events))
        if any(event.payload == 1 for event in events):
            raise ValueError("one of them is bad")

    await bus.subscribe("n", handler, name="s", batch={"size": 3, "wait": 0.02})
    await publish(bus, 0, 1, 2)
    stats = await stats_when(bus, "s", lambda stats: stats.dead == 1 and stats.pending == 0)
    assert (stats.completed, stats.dead) == (2, 1), "the last attempt is made alone"
    (letter,) = await bus.dead_letters.list()
    assert letter.event is not None
    assert (letter.event.payload, letter.attempts) == (1, 4)


async def test_an_unknown_id_fails_whatever_is_not_named(bus: Bus) -> None:
    attempts: list[int] = []

    async def handler(events: list[Event[int]]) -> None:
        attempts.extend(event.delivery.attempt for event in events if event.delivery)
        if events[0].delivery and events[0].delivery.attempt == 1:
            raise BatchFailed({"order-7": "not an id of an event"})

    await bus.subscribe("n", handler, name="s", batch={"size": 2, "wait": 0.02})
    await publish(bus, 0, 1)
    await stats_when(bus, "s", lambda stats: stats.completed == 2)
    assert sorted(attempts) == [1, 1, 2, 2]


@pytest.mark.parametrize("threads", [False, True])
async def test_a_batch_has_one_timeout(bus: Bus, threads: bool) -> None:
    cancelled: list[int] = []
    release = threading.Event()

    async def later(events: list[Event[int]]) -> None:
        if events[0].delivery and events[0].delivery.attempt == 1:
            try:
                await asyncio.sleep(NEVER)
            except asyncio.CancelledError:
                cancelled.append(len(events))
                raise

    def stuck(events: list[Event[int]]) -> None:
        if events[0].delivery and events[0].delivery.attempt == 1:
            release.wait(20)

    await bus.subscribe("n", stuck if threads else later, name="s", timeout=0.1, batch={"size": 3, "wait": NEVER})
    await publish(bus, 0, 1, 2)
    stats = await stats_when(bus, "s", lambda stats: stats.completed == 3)
    release.set()
    assert stats.timed_out == 3
    assert cancelled == ([] if threads else [3])


@pytest.mark.every_transport
async def test_a_batch_that_is_not_full_goes_back_at_close(store: Store) -> None:
    attempts: list[int] = []

    async def handler(events: list[Event[int]]) -> None:
        attempts.extend(event.delivery.attempt for event in events if event.delivery)

    async with store.bus(retry=QUICK) as bus:
        subscription = await bus.subscribe("n", handler, name="s", batch={"size": 100, "wait": NEVER})
        await publish(bus, 0, 1)
        await stats_when(bus, "s", lambda stats: stats.in_flight == 2)
        await subscription.unsubscribe()
        assert attempts == []
        await bus.subscribe("n", handler, name="s", batch={"size": 2, "wait": NEVER})
        await stats_when(bus, "s", nothing_left)
    assert attempts == [1, 1]


async def test_a_synchronous_publish_makes_a_batch_of_one() -> None:
    async with Bus(service="shop", mode="sync") as bus:
        sizes: list[int] = []

        async def handler(events: list[Event[Any]]) -> None:
            sizes.append(len(events))
            if events[0].payload == "bad":
                raise BatchFailed({events[0].meta.id: "bad"})

        await bus.subscribe("n", handler, batch=True)
        await bus.subscribe("n", lambda events: sizes.append(len(events)), name="plain", batch=True)
        await bus.publish("n", 1)
        assert sizes == [1, 1]
        with pytest.raises(HandlerError):
            await bus.publish("n", "bad")


def test_batches_without_a_loop(store: Store) -> None:
    done = threading.Event()
    sizes: list[int] = []

    def handler(events: list[Event[int]]) -> None:
        sizes.append(len(events))
        if sum(sizes) == 4:
            done.set()

    with store.bus().blocking as bus:
        bus.subscribe("n", handler, batch={"size": 2, "wait": NEVER})
        bus.publish_many([Event.create("n", number) for number in range(4)])
        assert done.wait(20)
    assert sizes == [2, 2]


@pytest.mark.every_transport
async def test_a_full_queue_refuses_or_waits(store: Store) -> None:
    big = Event.create("n", "x" * 100_000)
    for when_full in ("error", "wait"):
        async with store.bus(when_full=when_full, publish_buffer_bytes=65536) as bus:
            await bus.start()
            results = await asyncio.gather(*(bus.publish(big) for _ in range(20)), return_exceptions=True)
            refused = [result for result in results if isinstance(result, BaseException)]
            assert all(isinstance(error, BufferFull) and error.retryable for error in refused)
            assert (len(refused) > 0) == (when_full == "error")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"breaker": {"threshold": 0}}, r"breaker\.threshold=0 .* from 1"),
    ({"breaker": {"window": 0}}, r"breaker\.window=0"),
    ({"breaker": {"recovery": -1.0}}, r"breaker\.recovery=-1\.0 .* seconds"),
    ({"breaker": {"probes": 1.5}}, r"breaker\.probes=1\.5"),
    ({"breaker": {"treshold": 3}}, "breaker option treshold; did you mean threshold"),
    ({"breaker": {"window": "soon"}}, r"breaker\.window="),
    ({"breaker": 5}, "breaker=5 .* object"),
    ({"breaker": {3: 4}}, "names are strings"),
    ({"breaker": True, "broadcast": True}, "broadcast"),
    ({"ordered": True, "broadcast": True}, "ordered and broadcast exclude"),
    ({"batch": True, "ordered": True}, "batch and ordered exclude"),
    ({"batch": True, "idempotent": True}, "batch and idempotent exclude"),
    ({"batch": {"size": 0}}, r"batch\.size=0 .* from 1"),
    ({"batch": {"wait": -0.1}}, r"batch\.wait=-0\.1 .* seconds"),
    ({"batch": {"sise": 5}}, "batch option sise; did you mean size"),
    ({"batch": [5]}, "batch="),
    ({"batch": {"size": 2000}}, "does not fit into the buffer of 1000"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
async def test_wrong_options(options: dict[str, Any], message: str) -> None:
    async with Bus(service="shop") as bus:
        with pytest.raises(InvalidConfig, match=message):
            await bus.subscribe("n", lambda given: None, name="s", **options)


async def test_middleware_leaves_batches_alone() -> None:
    """Added before or after the subscription, for batches and for a synchronous publish."""
    given: list[Any] = []
    passed: list[str] = []

    async def store(events: list[Event[Any]]) -> None:
        given.append([event.payload for event in events])

    async def single(event: Event[Any]) -> None: ...

    async def middleware(event: Event[Any], call_next: Any) -> object:
        passed.append(event.type)
        return await call_next(event)

    async with TestBus() as bus:
        await bus.subscribe("n", store, name="batches", batch={"size": 2, "wait": 60})
        await bus.subscribe("other", single, name="single")
        bus.use(middleware)
        await bus.publish_many([Event.create("n", 1), Event.create("n", 2)])
        await bus.publish("other", 3)
        await bus.idle()
        await bus.publish("n", 4, mode="sync")
        assert given == [[1, 2], [4]]
        assert passed == ["other"]


async def test_events_come_one_by_one() -> None:
    async with Bus(service="shop") as bus:
        with pytest.raises(InvalidConfig, match="one event at a time"):
            async for _ in bus.events("n", batch=True):
                pass


@pytest.mark.parametrize("errors", [None, ["id"], {3: "x"}])
def test_batch_failed_wants_errors_by_id(errors: Any) -> None:
    with pytest.raises(TypeError, match=r"event\.meta\.id"):
        BatchFailed(errors)
    assert str(BatchFailed({"a": "b"})) == "1 events of the batch failed"
