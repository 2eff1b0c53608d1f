"""Requests and replies as a Python program sees them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from polybus import (
    Bus,
    BusClosed,
    Event,
    HandlerError,
    InvalidConfig,
    NoResponder,
    NotFound,
    Remote,
    RequestTimeout,
    Unsupported,
)
from polybus.testing import TestBus
from store import Store

LONG = 30.0


@pytest.fixture
async def asking(store: Store) -> AsyncIterator[Bus]:
    async with store.bus() as bus:
        yield bus


@pytest.fixture
async def answering(store: Store) -> AsyncIterator[Bus]:
    async with store.bus() as bus:
        yield bus


@pytest.mark.every_transport
async def test_a_reply_is_an_event_of_the_chain(asking: Bus, answering: Bus) -> None:
    async def quote(event: Event[Any]) -> dict[str, Any]:
        return {"total": event.payload["n"] * 2, "user": event.meta.user_id}

    subscription = await answering.respond("quote.*", quote)
    assert subscription.group.endswith("quote")
    reply = await asking.request("quote.get", {"n": 21}, timeout=LONG, user_id="u")
    assert reply.payload == {"total": 42, "user": "u"}
    assert reply.type == "quote.get"
    request = Event.create("quote.get", {"n": 1}, correlation_id="c")
    reply = await asking.request(request, timeout=LONG)
    assert (reply.meta.correlation_id, reply.meta.causation_id) == ("c", request.meta.id)
    assert reply.meta.headers == {}


@pytest.mark.every_transport
async def test_nobody_answers_until_somebody_does(asking: Bus, answering: Bus) -> None:
    with pytest.raises(NoResponder, match="quote"):
        await asking.request("quote")

    @answering.respond("quote")
    def quote(event: Event[Any]) -> int:  # on a thread
        assert threading.current_thread() is not threading.main_thread()
        return event.payload + 1

    await answering.publish("other")  # waits until it is subscribed
    assert (await asking.request("quote", 1, timeout=LONG)).payload == 2


@pytest.mark.every_transport
async def test_errors_arrive_at_once(asking: Bus, answering: Bus) -> None:
    async def fails(event: Event[Any]) -> object:
        if event.payload == "ours":
            raise NotFound("no such quote")
        if event.payload == "set":
            return {1, 2}
        raise KeyError("sku ☃")

    await answering.respond("quote", fails)
    with pytest.raises(HandlerError, match="KeyError") as failed:
        await asking.request("quote", timeout=LONG)
    assert failed.value.remote == Remote("KeyError", "'sku ☃'", None)
    assert "Traceback" not in str(failed.value)
    with pytest.raises(HandlerError) as failed:
        await asking.request("quote", "ours", timeout=LONG)
    assert failed.value.remote == Remote("NotFound", "no such quote", "not_found")
    with pytest.raises(HandlerError) as failed:
        await asking.request("quote", "set", timeout=LONG)
    assert failed.value.remote is not None
    assert failed.value.remote.code == "invalid_event"
    assert await answering.dead_letters.count() == 0


async def test_a_timeout_a_cancellation_and_close(asking: Bus, answering: Bus) -> None:
    began = asyncio.Event()

    async def hangs(event: Event[Any]) -> None:
        began.set()
        await asyncio.Event().wait()

    await answering.respond("quote", hangs)
    with pytest.raises(RequestTimeout, match="quote"):
        await asking.request("quote", timeout=0.1)
    await asyncio.wait_for(began.wait(), LONG)
    began.clear()
    task = asyncio.ensure_future(asking.request("quote", timeout=LONG))
    await asyncio.wait_for(began.wait(), LONG)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    began.clear()
    task = asyncio.ensure_future(asking.request("quote", timeout=LONG))
    await asyncio.wait_for(began.wait(), LONG)
    await asking.close()
    with pytest.raises(BusClosed):
        await asyncio.wait_for(task, LONG)
    await answering.close(0)


@pytest.mark.every_transport
async def test_many_at_once_and_inside_a_handler(asking: Bus, answering: Bus) -> None:
    async def inner(event: Event[Any]) -> int:
        return event.payload * 2

    async def outer(event: Event[Any]) -> int:
        reply = await answering.request(event.child("inner", event.payload), timeout=LONG)
        assert reply.meta.correlation_id == event.meta.correlation_id
        return reply.payload + 1

    await answering.respond("inner", inner, concurrency=100)
    await answering.respond("outer", outer, concurrency=100)
    replies = await asyncio.gather(*(asking.request("outer", n, timeout=LONG) for n in range(300)))
    assert [reply.payload for reply in replies] == [2 * n + 1 for n in range(300)]
    assert "polybus_requests_total" in asking.metrics()


async def test_without_a_loop(store: Store) -> None:
    def use() -> None:
        with store.bus().blocking as bus:
            bus.respond("quote", lambda event: event.payload + 1, name="quote")
            assert bus.request("quote", 1, timeout=LONG).payload == 2
            with pytest.raises(NoResponder):
                bus.request("other")

    await asyncio.get_running_loop().run_in_executor(None, use)


async def test_the_clock_of_a_test_bus_ends_a_request() -> None:
    async with TestBus() as bus:
        began = asyncio.Event()

        @bus.respond("quote")
        async def quote(event: Event[Any]) -> int:
            began.set()
            if event.payload is None:
                await asyncio.Event().wait()
            return 7

        assert (await bus.request("quote", 1)).payload == 7
        began.clear()
        waiting = asyncio.ensure_future(bus.request("quote", timeout=60))
        await asyncio.wait_for(began.wait(), LONG)
        await bus.advance(61)
        with pytest.raises(RequestTimeout):
            await asyncio.wait_for(waiting, LONG)
        await bus.close(0)


async def test_what_is_refused(asking: Bus) -> None:
    with pytest.raises(InvalidConfig, match="broadcast"):
        await asking.respond("quote", print, name="p", broadcast=True)
    with pytest.raises(InvalidConfig, match="timeout=0"):
        await asking.request("quote", timeout=0)
    with pytest.raises(TypeError, match="concurrency"):
        asking.respond("quote", concurency=1)  # type: ignore[call-overload]
    assert (await asking.guarantees()).request


async def test_pubsub_has_none(redis_server: Any) -> None:
    async with Bus(redis_server.url.replace("redis://", "redis+pubsub://"), service="shop") as bus:
        with pytest.raises(Unsupported, match="sqlite"):
            await bus.request("quote")
        with pytest.raises(Unsupported, match="redis"):
            await bus.respond("quote", print, name="p")
