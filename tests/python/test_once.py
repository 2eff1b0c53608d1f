"""What happens once although it comes twice."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from polybus import Bus, Event, InvalidConfig, RetryPolicy
from polybus.testing import TestBus
from program import Program
from store import Store

QUICK = RetryPolicy(max_retries=3, initial_delay=0.005, jitter="none")


async def until(done: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until the answer is yes: for what a store tells only when asked."""

    async def wait() -> None:
        while not await done():  # noqa: ASYNC110 - nobody tells when it is
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), 30)


async def seen_all(seen: list[Any], expected: list[Any]) -> None:
    async def same() -> bool:
        return sorted(seen) == expected

    await until(same)


async def absorbed(name: str, count: int, *buses: Bus) -> None:
    """So many were absorbed, over all buses, and no more."""

    async def so_many() -> bool:
        numbers = [(await bus.stats())[name].duplicates for bus in buses]
        assert sum(numbers) <= count
        return sum(numbers) == count

    await until(so_many)


@pytest.mark.every_transport
async def test_an_event_is_handled_once_by_its_own_key(store: Store) -> None:
    async with store.bus(idempotency_window=0) as bus:
        seen = []

        async def handler(event: Event[Any]) -> None:
            seen.append(event.payload)

        await bus.subscribe("x", handler, name="x", idempotent=True, idempotent_retention=3600)
        event = Event.create("x", 1)
        for _ in range(3):
            await bus.publish(event)
            assert not (await bus.publish("x", 2, idempotency_key="k")).duplicate
        await absorbed("x", 4, bus)
        assert sorted(seen) == [1, 2]
        assert f'polybus_duplicates_total{{service="shop",bus="{store.name}"' in bus.metrics()
        assert re.search(r'polybus_events_processed_total\{.*status="duplicate"\} 4\n', bus.metrics())


@pytest.mark.every_transport
@pytest.mark.parametrize("threads", [False, True])
async def test_a_function_tells_the_key(store: Store, threads: bool) -> None:
    async with store.bus() as one, store.bus() as two:
        seen: Counter[int] = Counter()

        def plain(event: Event[Any]) -> None:
            assert event.delivery is not None
            assert event.delivery.attempt == 1
            seen[event.payload["order"]] += 1

        async def handler(event: Event[Any]) -> None:
            plain(event)

        for bus in (one, two):
            await bus.subscribe(
                "x", plain if threads else handler, name="x", idempotent=lambda event: event.payload["order"]
            )
        await one.publish_many([Event.create("x", {"order": n % 5, "n": n}) for n in range(50)])
        await absorbed("x", 45, one, two)
        assert seen == dict.fromkeys(range(5), 1)


@pytest.mark.every_transport
async def test_a_failed_attempt_frees_the_key(store: Store) -> None:
    async with store.bus(retry=QUICK) as bus:
        attempts = []

        async def handler(event: Event[Any]) -> None:
            assert event.delivery is not None
            attempts.append(event.delivery.attempt)
            if event.delivery.attempt < 3:
                raise ValueError

        await bus.subscribe("x", handler, name="x", idempotent=lambda _: None)
        event = Event.create("x", 1)
        await bus.publish(event)
        await seen_all(attempts, [1, 2, 3])
        await bus.publish(event)
        await absorbed("x", 1, bus)
        assert attempts == [1, 2, 3]


async def test_a_function_that_fails_is_a_failed_attempt(store: Store) -> None:
    told: list[Any] = [ValueError("no"), 1.5, asyncio.sleep, "\ud800", "key"]

    def key(_: Event[Any]) -> Any:
        value = told.pop(0)
        if isinstance(value, Exception):
            raise value
        return value

    async with store.bus(retry=RetryPolicy(max_retries=9, initial_delay=0.001, jitter="none")) as bus:
        seen = []
        await bus.subscribe("x", lambda event: seen.append(event.delivery.attempt), name="x", idempotent=key)
        await bus.publish("x")
        await seen_all(seen, [5])
        assert (await bus.stats())["x"].failed == 4


async def test_what_cannot_tell_a_key_is_refused(store: Store) -> None:
    async def key(_: Event[Any]) -> str:
        return "k"

    async with store.bus() as bus:
        for wrong in (key, "function", 1):
            with pytest.raises(InvalidConfig, match="idempotent"):
                await bus.subscribe("x", print, idempotent=wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfig, match="broadcast"):
            await bus.subscribe("x", print, idempotent=True, broadcast=True)
        with pytest.raises(InvalidConfig, match="idempotent"):
            await bus.subscribe("x", print, idempotent_retention=5)
        await bus.subscribe("x", print, name="off", idempotent=False)


@pytest.mark.every_transport
async def test_a_killed_process_frees_the_key(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_BUS", store.name)
    victim = Program(
        """
        bus = Bus(URL, service="shop", lease=1.0)
        @bus.on("x", name="x", idempotent=lambda event: "same")
        async def handler(event):
            say("begun", event.payload)
            await asyncio.sleep(1000)
        async def main():
            async with bus:
                await bus.publish_many([Event.create("x", n) for n in range(3)])
                await asyncio.sleep(1000)
        asyncio.run(main())
        """,
        store.url,
    )
    assert victim.line().startswith("begun")
    victim.process.kill()
    victim.process.communicate()
    async with store.bus(lease=1.0) as bus:
        seen = []

        async def handler(event: Event[Any]) -> None:
            seen.append(event.payload)

        await bus.subscribe("x", handler, name="x", idempotent=lambda _: "same")
        await absorbed("x", 2, bus)
        assert len(seen) == 1


@pytest.mark.every_transport
async def test_a_key_is_published_once(store: Store) -> None:
    async with store.bus() as one, store.bus() as two:
        seen = []
        await one.subscribe("x", lambda event: seen.append(event.payload), name="x")
        first = await one.publish("x", 1, idempotency_key="k")
        assert not first.duplicate
        again = await two.publish("x", 2, idempotency_key="k")
        assert (again.duplicate, again.id, again.position) == (True, first.id, first.position)
        assert again != first
        assert "duplicate=True" in repr(again)
        blocking = await asyncio.to_thread(two.blocking.publish, "x", 3, idempotency_key="k")
        assert blocking == again
        events = [Event.create("x", 4, idempotency_key="k"), Event.create("x", 5)]
        assert [receipt.duplicate for receipt in await two.publish_many(events)] == [True, False]
        delayed = await one.publish("x", 6, idempotency_key="later", delay=0.05)
        assert await one.publish("x", 7, idempotency_key="later", delay=0.05) != delayed
        await seen_all(seen, [1, 5, 6])
        guarantees = await one.guarantees()
        assert guarantees.idempotent
        assert guarantees.publish_dedupe


@pytest.mark.every_transport
async def test_one_of_eight_publishers_wins(store: Store) -> None:
    buses = [store.bus() for _ in range(8)]
    try:
        receipts = await asyncio.gather(*(bus.publish("x", n, idempotency_key="k") for n, bus in enumerate(buses)))
    finally:
        await asyncio.gather(*(bus.close() for bus in buses))
    assert [receipt.duplicate for receipt in receipts].count(False) == 1
    assert len({receipt.id for receipt in receipts}) == 1


async def test_an_injected_duplicate_is_handled_once() -> None:
    async with TestBus() as bus:
        mock = bus.mock_handler("x", idempotent=True)
        careless = bus.mock_handler("x", name="careless")
        bus.duplicate_next("x", 2)
        await bus.publish("x", 1)
        await bus.publish("x", 2, idempotency_key="k")
        await bus.idle()
        assert mock.call_count == 2
        assert careless.call_count == 4
        await bus.publish("x", 3, idempotency_key="k")
        await bus.idle()
        assert careless.call_count == 4
