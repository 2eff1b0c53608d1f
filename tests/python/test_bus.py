"""A bus from start to close: who gets which event, and what a handler's answer means."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from polybus import (
    Bus,
    BusClosed,
    ConnectionFailed,
    DuplicateSubscription,
    Event,
    HandlerError,
    HandlerTimeout,
    InvalidConfig,
    InvalidEvent,
    InvalidPattern,
    PayloadTooLarge,
    Reject,
    Retry,
    RetryPolicy,
    Unsupported,
)
from store import Store

QUICK = RetryPolicy(max_retries=3, initial_delay=0.001, jitter="none")


@pytest.fixture
async def bus(store: Store) -> AsyncIterator[Bus]:
    async with store.bus(lease=1.0, retry=QUICK) as bus:
        yield bus


class Seen:
    """Events that arrived, and a way to wait for them."""

    def __init__(self) -> None:
        self.events: list[Event[Any]] = []
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def add(self, event: Event[Any]) -> None:
        self.events.append(event)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def count(self, count: int, timeout: float = 10.0) -> list[Event[Any]]:
        async def wait() -> None:
            while len(self.events) < count:
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), timeout)
        return self.events


async def until(condition: Any, timeout: float = 10.0) -> None:
    """For states that no event announces."""

    async def wait() -> None:
        while not (value := condition()) or (asyncio.iscoroutine(value) and not await value):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), timeout)


@pytest.mark.every_transport
async def test_decorator_publish_and_facts(bus: Bus) -> None:
    seen = Seen()

    async def send_mail(event: Event[Any]) -> None:
        seen.add(event)

    subscription = await bus.subscribe("order.*", send_mail, name="mail")
    receipt = await bus.publish("order.created", {"orderId": "o-1"}, partition_key="o-1")
    (event,) = await seen.count(1)
    assert event.type == "order.created"
    assert event.payload == {"orderId": "o-1"}
    assert event.meta.id == receipt.id
    assert event.meta.source == "shop"
    assert event.meta.partition_key == "o-1"
    assert event.delivery is not None
    assert (event.delivery.attempt, event.delivery.redelivered) == (1, False)
    assert event.delivery.group == subscription.group == "shop/mail"
    assert datetime.now(timezone.utc) - event.delivery.received_at < timedelta(seconds=60)


@pytest.mark.every_transport
async def test_each_subscription_gets_it_and_sync_handlers_run_on_threads(bus: Bus) -> None:
    seen = Seen()
    threads = set()

    async def one(event: Event[Any]) -> None:
        seen.add(event)

    def two(event: Event[Any]) -> None:
        threads.add(threading.current_thread())
        seen.add(event)

    await bus.subscribe("a.*", one, name="one")
    await bus.subscribe("a.*", two, name="two")
    await bus.publish("a.b")
    await bus.publish("c.d")
    await seen.count(2)
    assert [event.type for event in seen.events] == ["a.b", "a.b"]
    assert threading.main_thread() not in threads


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_raise_retry_and_reject(bus: Bus, kind: str) -> None:
    seen = Seen()

    def answer(event: Event[Any]) -> None:
        seen.add(event)
        assert event.delivery is not None
        if event.payload == "later" and event.delivery.attempt == 1:
            raise Retry(after=0.01)
        if event.payload == "fails":
            raise ValueError("no")
        if event.payload == "refused":
            raise Reject("why")

    async def answer_async(event: Event[Any]) -> None:
        answer(event)

    await bus.subscribe("x", answer if kind == "sync" else answer_async, name="x", retry=RetryPolicy(1, 0.001))
    await bus.publish_many([Event.create("x", payload) for payload in ("later", "fails", "refused", "fine")])
    await seen.count(6)

    async def two_dead() -> bool:
        return await bus.dead_letters.count() == 2

    await until(two_dead)
    letters = {letter.event.payload: letter for letter in await bus.dead_letters.list() if letter.event}
    assert letters["fails"].reason == "exhausted"
    assert letters["fails"].attempts == 2
    assert letters["fails"].error.type == "ValueError"
    assert letters["fails"].error.message == "no"
    assert "answer" in letters["fails"].error.stack
    assert letters["refused"].reason == "rejected"
    assert letters["refused"].attempts == 1
    assert sorted(str(event.payload) for event in seen.events) == [
        "fails",
        "fails",
        "fine",
        "later",
        "later",
        "refused",
    ]


async def test_context_variables_do_not_leak(bus: Bus) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    variable.set(99)
    seen: list[int] = []
    done = asyncio.Event()

    async def handler(event: Event[Any]) -> None:
        seen.append(variable.get())
        variable.set(variable.get() + 1)
        if len(seen) == 4:
            done.set()

    loop = asyncio.get_running_loop()

    def plain(event: Event[Any]) -> None:
        seen.append(variable.get())
        variable.set(variable.get() + 1)
        if len(seen) == 4:
            loop.call_soon_threadsafe(done.set)

    await bus.subscribe("x", handler)
    await bus.subscribe("x", plain, concurrency=1)
    await bus.publish("x")
    await bus.publish("x")
    await asyncio.wait_for(done.wait(), 10)
    assert seen == [0, 0, 0, 0]


@pytest.mark.every_transport
async def test_unsubscribe_pause_and_resume(bus: Bus) -> None:
    seen = Seen()

    async def handler(event: Event[Any]) -> None:
        seen.add(event)

    subscription = await bus.subscribe("x", handler)
    subscription.pause()
    await bus.publish("x", 1)
    stats = await subscription.stats()
    assert stats.pending == 1
    subscription.resume()
    await seen.count(1)
    await subscription.unsubscribe()
    assert not subscription.active
    with pytest.raises(BusClosed):
        subscription.pause()
    await subscription.unsubscribe()
    await bus.publish("x", 2)
    await bus.subscribe("x", handler)
    await seen.count(2)
    assert [event.payload for event in seen.events] == [1, 2]


@pytest.mark.every_transport
async def test_iterator_acks_when_the_next_is_asked_for(bus: Bus) -> None:
    iterator = bus.events("x", name="it")
    first = asyncio.ensure_future(iterator.__anext__())
    await until(lambda: bus.subscriptions)
    for number in range(3):
        await bus.publish("x", number)
    assert (await first).payload == 0
    assert (await iterator.__anext__()).payload == 1
    await iterator.aclose()  # 1 is handed back
    rest = []
    async for event in bus.events("x", name="it"):
        rest.append((event.payload, event.delivery.attempt if event.delivery else 0))
        if len(rest) == 2:
            break
    assert rest == [(1, 1), (2, 1)]


@pytest.mark.every_transport
async def test_iterator_ends_when_the_bus_closes(store: Store) -> None:
    bus = store.bus()
    await bus.start()
    iterator = bus.events("x")
    waiting = asyncio.ensure_future(iterator.__anext__())
    await until(lambda: bus.subscriptions)
    await asyncio.wait_for(bus.close(), 5)
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 5)


async def test_sync_mode_runs_handlers_in_order_and_raises_the_first_failure() -> None:
    calls: list[str] = []
    async with Bus(service="shop", mode="sync") as bus:

        async def first(event: Event[Any]) -> None:
            calls.append(f"first {event.delivery.attempt if event.delivery else 0}")

        def second(event: Event[Any]) -> None:
            calls.append("second")
            if event.payload == "bad":
                raise KeyError("bad")

        async def third(event: Event[Any]) -> None:
            calls.append("third")

        await bus.subscribe("x.*", first, name="first")
        await bus.subscribe("**", second, name="second")
        await bus.subscribe("x.*", third, name="third")
        await bus.subscribe("y", third, name="y")
        await bus.publish("x.a", "good")
        assert calls == ["first 1", "second", "third"]
        calls.clear()
        with pytest.raises(HandlerError) as failure:
            await bus.publish("x.a", "bad")
        assert isinstance(failure.value.__cause__, KeyError)
        assert calls == ["first 1", "second"]
        with pytest.raises(Unsupported):
            await bus.publish("x.a", delay=1.0)
        await bus.publish("x.a", "bad", mode="async")
        await until(lambda: calls.count("second") >= 2)


async def test_sync_mode_respects_the_timeout() -> None:
    async with Bus(service="shop", mode="sync") as bus:

        async def slow(event: Event[Any]) -> None:
            await asyncio.sleep(60)

        await bus.subscribe("x", slow, timeout=0.01)
        with pytest.raises(HandlerTimeout):
            await bus.publish("x")


@pytest.mark.every_transport
async def test_timeout_cancels_the_handler(bus: Bus) -> None:
    cancelled = asyncio.Event()

    async def slow(event: Event[Any]) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    await bus.subscribe("x", slow, timeout=0.05, retry=RetryPolicy(max_retries=0))
    await bus.publish("x")
    await asyncio.wait_for(cancelled.wait(), 10)

    async def dead() -> bool:
        return await bus.dead_letters.count() == 1

    await until(dead)
    (letter,) = await bus.dead_letters.list()
    assert letter.error.type == "HandlerTimeout"


@pytest.mark.every_transport
async def test_dead_letters_replay_and_purge(bus: Bus) -> None:
    seen = Seen()
    broken = True

    async def handler(event: Event[Any]) -> None:
        seen.add(event)
        if broken:
            raise Reject("not now")

    await bus.subscribe("x", handler, name="x")
    for number in range(3):
        await bus.publish("x", number)

    async def dead() -> bool:
        return await bus.dead_letters.count() == 3

    await until(dead)
    letters = await bus.dead_letters.list(group="shop/x", pattern="x", limit=2)
    assert len(letters) == 2
    (rest,) = await bus.dead_letters.list(after=letters[-1].id)
    assert await bus.dead_letters.count(group="other") == 0
    broken = False
    assert await bus.dead_letters.replay(letters[0].id) == 1
    assert await bus.dead_letters.replay(letters[1]) == 1
    await seen.count(5)
    assert seen.events[3].meta.id == letters[0].event.meta.id
    assert seen.events[3].delivery.attempt == 1
    from polybus import NotFound

    with pytest.raises(NotFound):
        await bus.dead_letters.replay(letters[0].id)
    with pytest.raises(NotFound):
        await bus.dead_letters.get(letters[0].id)
    assert (await bus.dead_letters.get(rest.id)).id == rest.id
    assert await bus.dead_letters.purge(older_than=3600) == 0
    assert await bus.dead_letters.purge({}) == 1
    with pytest.raises(TypeError):
        await bus.dead_letters.purge()


@pytest.mark.every_transport
async def test_closed_bus_and_restart(store: Store) -> None:
    bus = store.bus()
    seen = Seen()

    @bus.on("x")
    async def handler(event: Event[Any]) -> None:
        seen.add(event)

    async with bus:
        await bus.publish("x", 1)
        await seen.count(1)
    with pytest.raises(BusClosed):
        await bus.publish("x", 2)
    await bus.close()
    async with bus:
        await bus.publish("x", 3)
        await seen.count(2)


@pytest.mark.every_transport
async def test_close_and_publish_from_a_handler(store: Store) -> None:
    bus = store.bus()
    done = asyncio.Event()

    async def closer(event: Event[Any]) -> None:
        await bus.publish("y", event.payload)
        await asyncio.wait_for(bus.close(), 1)
        done.set()

    await bus.start()
    subscription = await bus.subscribe("x", closer)
    await bus.publish("x", 1)
    await asyncio.wait_for(done.wait(), 5)
    await until(lambda: not subscription.active)


async def test_on_after_start_is_subscribed_before_the_next_publish(bus: Bus) -> None:
    seen = Seen()

    @bus.on("x")
    async def handler(event: Event[Any]) -> None:
        seen.add(event)

    await bus.publish("x")
    await seen.count(1)


async def test_duplicate_names(bus: Bus) -> None:
    async def handler(event: Event[Any]) -> None: ...

    await bus.subscribe("x", handler)
    with pytest.raises(DuplicateSubscription, match="name="):
        await bus.subscribe("y", handler)
    bus.on("z", name="z")(handler)
    with pytest.raises(DuplicateSubscription):
        bus.on("z", name="z")(handler)


async def test_bad_handlers(bus: Bus) -> None:
    async def handler(event: Event[Any]) -> None: ...

    async def two(event: Event[Any], other: int) -> None: ...

    for wrong in (None, 5, "handler", two, lambda: None):
        with pytest.raises(TypeError):
            await bus.subscribe("x", wrong)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfig):
            bus.on("x")(wrong)  # type: ignore[type-var]
    for nameless in (lambda event: None, functools.partial(handler)):
        with pytest.raises(InvalidConfig, match="name="):
            await bus.subscribe("x", nameless)
    with pytest.raises(InvalidPattern):
        await bus.subscribe("a..b", handler)
    with pytest.raises(TypeError, match="did you mean concurrency"):
        await bus.subscribe("x", handler, concurency=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidConfig, match="concurrency"):
        await bus.subscribe("x", handler, concurrency=0)


async def test_a_lambda_around_a_coroutine_is_awaited(bus: Bus) -> None:
    seen = Seen()

    async def handler(event: Event[Any], extra: str) -> None:
        seen.add(event)

    await bus.subscribe("x", lambda event: handler(event, "extra"), name="x")
    await bus.subscribe("x", functools.partial(handler, extra="extra"), name="y")
    await bus.publish("x")
    await seen.count(2)


async def test_bad_publishes(bus: Bus) -> None:
    for wrong in ("", "a b", "a\0b", "a..b", ".a", "x" * 201, "a.", "ä", 5, None, b"a"):
        with pytest.raises(InvalidEvent):
            await bus.publish(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="partition_key"):
        await bus.publish("x", partition="o-1")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="delay"):
        await bus.publish("x", dely=3)  # type: ignore[call-overload]
    with pytest.raises(InvalidConfig, match="delay"):
        await bus.publish("x", delay=-1)
    with pytest.raises(PayloadTooLarge):
        await bus.publish("x", "y" * (1 << 20))
    with pytest.raises(TypeError, match="already"):
        await bus.publish(Event.create("x"), {"a": 1})  # type: ignore[call-overload]
    await bus.publish("__proto__".strip("_"), {"__proto__": {"a": 1}})


@pytest.mark.every_transport
async def test_publish_many_lists_what_was_refused(bus: Bus) -> None:
    big = Event.create("x", "y" * (1 << 20))
    with pytest.raises(PayloadTooLarge) as failure:
        await bus.publish_many([Event.create("x"), big])
    ((index, why),) = failure.value.failures
    assert index == 1
    assert isinstance(why, PayloadTooLarge)
    with pytest.raises(TypeError):
        await bus.publish_many(["x"])  # type: ignore[list-item]
    assert await bus.publish_many([]) == []


@pytest.mark.every_transport
async def test_delay_and_expiry(bus: Bus) -> None:
    seen = Seen()

    async def handler(event: Event[Any]) -> None:
        seen.add(event)

    await bus.subscribe("x", handler)
    receipt = await bus.publish("x", "later", delay=timedelta(milliseconds=50))
    assert receipt.position is None
    await bus.publish("x", "now")
    await seen.count(2)
    assert [event.payload for event in seen.events] == ["now", "later"]


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


async def test_errors_that_resist(bus: Bus) -> None:
    def handler(event: Event[Any]) -> None:
        match event.payload:
            case "unprintable":
                raise Unprintable
            case "surrogate":
                raise ValueError("\ud800 in it")
            case "long":
                raise ValueError("x" * 100_000)
            case "deep":
                handler(event)
            case "base":
                raise asyncio.CancelledError

    async def handler_async(event: Event[Any]) -> None:
        handler(event)

    await bus.subscribe("x", handler, name="sync", retry=RetryPolicy(max_retries=0))
    await bus.subscribe("x", handler_async, name="async", retry=RetryPolicy(max_retries=0))
    kinds = ["unprintable", "surrogate", "long", "deep", "base"]
    await bus.publish_many([Event.create("x", kind) for kind in kinds])

    async def all_dead() -> bool:
        return await bus.dead_letters.count() == 2 * len(kinds)

    await until(all_dead)
    for group in ("shop/sync", "shop/async"):
        letters = {letter.event.payload: letter.error for letter in await bus.dead_letters.list(group) if letter.event}
        assert letters["unprintable"].type == "Unprintable"
        assert "RuntimeError" in letters["unprintable"].message
        assert letters["surrogate"].message == "? in it"
        assert len(letters["long"].message.encode()) <= 4096
        assert letters["deep"].type == "RecursionError"
        assert letters["base"].type == "CancelledError"
        assert all(len(error.stack.encode()) <= 4096 for error in letters.values())


async def test_a_coroutine_function_that_returns_something_else(bus: Bus) -> None:
    def handler(event: Event[Any]) -> int:
        return 5

    if not hasattr(inspect, "markcoroutinefunction"):
        pytest.skip("Python 3.12 began to let plain functions be marked as coroutine functions")
    inspect.markcoroutinefunction(handler)
    await bus.subscribe("x", handler, name="x", retry=RetryPolicy(max_retries=0))
    await bus.publish("x")

    async def dead() -> bool:
        return await bus.dead_letters.count() == 1

    await until(dead)
    (letter,) = await bus.dead_letters.list()
    assert "coroutine function" in letter.error.message


@pytest.mark.every_transport
async def test_close_hands_a_handler_back_that_never_ends(store: Store) -> None:
    bus = store.bus()
    attempts: list[int] = []
    begun = asyncio.Event()

    async def handler(event: Event[Any]) -> None:
        assert event.delivery is not None
        attempts.append(event.delivery.attempt)
        begun.set()
        if len(attempts) == 1:
            await asyncio.sleep(1000)

    for _ in range(2):
        await bus.start()
        begun.clear()
        await bus.subscribe("x", handler, name="x")
        if not attempts:
            await bus.publish("x")
        await asyncio.wait_for(begun.wait(), 5)
        await asyncio.wait_for(bus.close(0.05), 5)
    assert attempts == [1, 1]


@pytest.mark.every_transport
async def test_an_ordered_group_keeps_the_order_of_each_key(store: Store) -> None:
    seen: dict[str, list[int]] = {}
    running: set[str] = set()
    done = asyncio.Semaphore(0)

    async def handler(event: Event[Any]) -> None:
        assert event.meta.partition_key is not None
        assert event.delivery is not None
        key = event.meta.partition_key
        assert key not in running
        running.add(key)
        await asyncio.sleep(0)
        running.remove(key)
        if event.payload % 3 == 0 and event.delivery.attempt == 1:
            raise ValueError("once")
        seen.setdefault(key, []).append(event.payload)
        done.release()

    async with store.bus() as one, store.bus() as two:
        assert (await one.guarantees()).ordered
        for bus in (one, two):
            await bus.subscribe("x", handler, name="s", ordered=True, retry=RetryPolicy(initial_delay=0.001))
        await one.publish_many(
            [Event.create("x", number, partition_key=f"k{key}") for number in range(10) for key in range(5)]
        )
        for _ in range(50):
            await asyncio.wait_for(done.acquire(), 20)
        assert seen == {f"k{key}": list(range(10)) for key in range(5)}
        with pytest.raises(InvalidConfig, match="ordered"):
            await two.subscribe("x", handler, name="other", group="shop/s")
        with pytest.raises(InvalidConfig, match="broadcast"):
            await two.subscribe("x", handler, name="other", ordered=True, broadcast=True)


@pytest.mark.every_transport
async def test_groups_share_and_broadcasts_copy(store: Store) -> None:
    seen = Seen()
    copies = Seen()

    async def handler(event: Event[Any]) -> None:
        seen.add(event)

    async def copied(event: Event[Any]) -> None:
        copies.add(event)

    async with store.bus() as one, store.bus() as two:
        for bus in (one, two):
            await bus.subscribe("x", handler, name="shared")
            await bus.subscribe("x", copied, name="copied", broadcast=True)
        await one.publish_many([Event.create("x", number) for number in range(20)])
        await seen.count(20)
        await copies.count(40)
        assert sorted(event.payload for event in seen.events) == list(range(20))
        assert await one.delete_group("shop/nobody") is False


async def test_a_failing_start_leaves_nothing_open(tmp_path: Any) -> None:
    bus = Bus(f"sqlite:///{tmp_path}/bus.db", service="shop")

    async def handler(event: Event[Any]) -> None: ...

    bus.on("x", name="x")(handler)
    other = Bus(f"sqlite:///{tmp_path}/no/bus.db", service="shop")
    other.on("x")(handler)
    for _ in range(2):
        with pytest.raises(ConnectionFailed):
            await other.start()


@pytest.mark.every_transport
async def test_blocking_twin(store: Store) -> None:
    bus = store.bus()
    blocking = bus.blocking

    async def asynchronous(event: Event[Any]) -> None: ...

    def work() -> list[Any]:
        results: list[Any] = []
        seen = threading.Semaphore(0)
        with blocking:
            subscription = blocking.subscribe("x", lambda event: seen.release(), name="x")
            blocking.publish("x", 1)
            blocking.publish_many([Event.create("x", 2)])
            assert seen.acquire(timeout=5)
            assert seen.acquire(timeout=5)
            results += [subscription.stats().name, list(blocking.stats()), blocking.guarantees().transport]
            subscription.pause()
            subscription.resume()
            with pytest.raises(InvalidConfig, match="async"):
                blocking.subscribe("x", asynchronous, name="y")
            subscription.unsubscribe()
            results.append(blocking.delete_group("shop/x"))
            results.append(blocking.dead_letters.count())
            results.append("polybus_events_published_total" in blocking.metrics())
        with pytest.raises(BusClosed):
            blocking.publish("x")
        return results

    assert await asyncio.to_thread(work) == ["x", ["x"], store.transport, True, 0, True]
