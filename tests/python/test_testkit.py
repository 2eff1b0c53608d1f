"""The test kit and `with_retry`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from polybus import Event, Reject, Retry, RetryPolicy, with_retry
from polybus.testing import TestBus


async def test_published_and_mock_handler() -> None:
    bus = TestBus()
    mock = bus.mock_handler("order.*")
    other = bus.mock_handler("user.*")
    await bus.publish("order.created", {"n": 1})
    await bus.idle()
    assert mock.called
    assert not other.called
    assert [event.payload for event in mock.events] == [{"n": 1}]
    assert [event.type for event in bus.published("order.*")] == ["order.created"]
    assert bus.assert_published("order.created").payload == {"n": 1}
    bus.assert_published("order.created", payload={"n": 1})
    with pytest.raises(AssertionError, match="never with"):
        bus.assert_published("order.created", payload={"n": 2})
    with pytest.raises(AssertionError, match=r"order\.created"):
        bus.assert_published("order.deleted")
    await bus.close()


async def test_wait_for() -> None:
    async with TestBus() as bus:
        waiting = asyncio.ensure_future(bus.wait_for("a.*", timeout=5))
        await asyncio.sleep(0)
        await bus.publish("a.b", 1)
        assert (await waiting).payload == 1
        assert (await bus.wait_for("a.*", 0.01)).payload == 1
        with pytest.raises(TimeoutError, match=r"a\.b"):
            await bus.wait_for("c", 0.01)


async def test_time_stands_still_until_it_is_moved() -> None:
    async with TestBus() as bus:
        attempts: list[int] = []

        async def handler(event: Event[Any]) -> None:
            assert event.delivery is not None
            attempts.append(event.delivery.attempt)
            raise ValueError

        policy = RetryPolicy(max_retries=2, initial_delay=10, factor=2, jitter="none")
        await bus.subscribe("x", handler, name="x", retry=policy)
        await bus.publish("x")
        await bus.idle()
        assert attempts == [1]
        await bus.advance(9.9)
        assert attempts == [1]
        await bus.advance(0.1)
        assert attempts == [1, 2]
        await bus.advance(20)
        assert attempts == [1, 2, 3]
        (letter,) = await bus.dead_letters.list()
        assert (letter.reason, letter.attempts) == ("exhausted", 3)


async def test_time_goes_from_one_due_time_to_the_next() -> None:
    async with TestBus() as bus:
        attempts: list[int] = []

        async def handler(event: Event[Any]) -> None:
            assert event.delivery is not None
            attempts.append(event.delivery.attempt)
            if event.delivery.attempt < 3:
                raise ValueError

        await bus.subscribe("x", handler, name="x", retry=RetryPolicy(3, initial_delay=1, factor=1, jitter="none"))
        await bus.publish("x")
        await bus.idle()
        await bus.advance(10)
        assert attempts == [1, 2, 3]


async def test_delays_expiry_and_timeouts_follow_the_test() -> None:
    async with TestBus() as bus:
        mock = bus.mock_handler("x")
        await bus.publish("x", "later", delay=3600)
        await bus.idle()
        assert not mock.called
        await bus.advance(3600)
        assert mock.call_count == 1


async def test_faults() -> None:
    async with TestBus() as bus:
        mock = bus.mock_handler("x", retry=RetryPolicy(1, initial_delay=1, jitter="none"))
        bus.fail_next("x")
        await bus.publish("x")
        await bus.idle()
        assert not mock.called
        await bus.advance(1)
        assert mock.call_count == 1
        bus.duplicate_next("x")
        await bus.publish("x")
        await bus.idle()
        assert mock.call_count == 3
        assert mock.events[1] == mock.events[2]


async def test_sync_handlers_on_a_test_bus() -> None:
    async with TestBus() as bus:
        seen = []
        await bus.subscribe("x", lambda event: seen.append(event.payload), name="x")
        await bus.publish("x", 1)
        await bus.idle()
        assert seen == [1]


async def test_advance_does_not_wait_for_ever() -> None:
    async with TestBus() as bus:
        gate = asyncio.Event()

        async def handler(event: Event[Any]) -> None:
            await gate.wait()

        await bus.subscribe("x", handler)
        await bus.publish("x")
        await bus.advance(5)
        gate.set()
        await bus.idle()


async def test_idle_does_not_wait_for_what_is_paused() -> None:
    async with TestBus() as bus:
        seen: list[int] = []
        subscription = await bus.subscribe("x", lambda event: seen.append(event.payload), name="x")
        subscription.pause()
        await bus.publish("x", 1)
        await asyncio.wait_for(bus.idle(), 20)
        assert seen == []
        subscription.resume()
        await asyncio.wait_for(bus.idle(), 20)
        assert seen == [1]


async def test_with_retry() -> None:
    calls: list[Any] = []
    buried: list[Any] = []

    async def flaky(word: str, *, fails: int) -> str:
        calls.append(word)
        if len(calls) <= fails:
            raise ConnectionError(word)
        return word.upper()

    policy = RetryPolicy(max_retries=2, initial_delay=0, jitter="none")
    wrapped = with_retry(flaky, policy, on_dead=lambda error, *args, **kwargs: buried.append((error, args, kwargs)))
    assert await wrapped("a", fails=2) == "A"
    assert calls == ["a"] * 3
    calls.clear()
    with pytest.raises(ConnectionError):
        await wrapped("b", fails=5)
    assert calls == ["b"] * 3
    ((error, args, kwargs),) = buried
    assert isinstance(error, ConnectionError)
    assert (args, kwargs) == (("b",), {"fails": 5})
    assert wrapped.__name__ == "flaky"


async def test_with_retry_obeys_retry_and_reject() -> None:
    calls = 0
    buried: list[BaseException] = []

    async def bury(error: Exception) -> None:
        buried.append(error)

    async def handler() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Retry(after=0)
        raise Reject("no")

    with pytest.raises(Reject):
        await with_retry(handler, RetryPolicy(initial_delay=60, jitter="none"), on_dead=bury)()
    assert calls == 2
    assert isinstance(buried[0], Reject)


async def test_with_retry_does_not_retry_cancellation() -> None:
    calls = 0

    async def handler() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(60)

    task = asyncio.ensure_future(with_retry(handler)())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert calls == 1
    with pytest.raises(TypeError):
        with_retry(5)  # type: ignore[arg-type]


def test_retry_takes_its_delay_by_name() -> None:
    with pytest.raises(TypeError, match="after="):
        Retry(5)
    with pytest.raises(ValueError, match="after"):
        Retry(after=-1)
