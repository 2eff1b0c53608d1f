"""Middleware around handlers and around publish: order, what it may do, and where it runs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from polybus import Bus, Event, HandlerError, InvalidConfig, PayloadTooLarge, Receipt, Reject, Retry, RetryPolicy
from polybus.testing import TestBus
from program import run
from store import Store

CallNext = Callable[..., Awaitable[Any]]
who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")


def tracing(log: list[str], name: str) -> Any:
    async def middleware(event: Event[Any], call_next: CallNext) -> Any:
        log.append(f"{name} in")
        try:
            return await call_next(event)
        finally:
            log.append(f"{name} out")

    return middleware


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_order_context_and_place(store: Store, kind: str) -> None:
    """The first is the outermost; it runs on the loop also around a plain function, which sees its variables."""
    log: list[str] = []
    threads = {}
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def outer(event: Event[Any], call_next: CallNext) -> Any:
        threads["middleware"] = threading.current_thread()
        who.set(f"{event.payload} of {event.delivery and event.delivery.group}")
        try:
            return await call_next()
        finally:
            loop.call_soon(done.set)

    def handle(event: Event[Any]) -> None:
        threads["handler"] = threading.current_thread()
        log.append(who.get())

    async def handle_async(event: Event[Any]) -> None:
        handle(event)

    async with store.bus() as bus:
        assert bus.use(outer) is outer
        bus.use(tracing(log, "one"))
        bus.use(tracing(log, "two"))
        await bus.subscribe("a", handle if kind == "plain" else handle_async, name="h")
        await bus.publish("a", 1)
        await asyncio.wait_for(done.wait(), 10)
    assert log == ["one in", "two in", "1 of shop/h", "two out", "one out"]
    assert threads["middleware"] is threading.main_thread()
    assert (threads["handler"] is threading.main_thread()) == (kind == "async")
    assert who.get() == "nobody"


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_what_it_raises_the_handler_raised(kind: str) -> None:
    bus = TestBus(retry=RetryPolicy(max_retries=1, initial_delay=1, jitter="none"))
    ran: list[Any] = []

    @bus.use
    async def judge(event: Event[Any], call_next: CallNext) -> None:
        match event.payload:
            case "reject":
                raise Reject("not this one")
            case "retry":
                if event.delivery and event.delivery.attempt == 1:
                    raise Retry(after=5)
            case "fail":
                raise ValueError("no")
            case "skip":
                return
        await call_next()

    async def handle_async(event: Event[Any]) -> None:
        ran.append(event.payload)

    def handle(event: Event[Any]) -> None:
        ran.append(event.payload)

    bus.on("a", name="h")(handle if kind == "plain" else handle_async)
    for payload in ("reject", "retry", "fail", "skip", "fine"):
        await bus.publish("a", payload)
    await bus.idle()
    assert ran == ["fine"]
    await bus.advance(4.9)
    assert ran == ["fine"]
    await bus.advance(0.2)
    assert sorted(ran) == ["fine", "retry"]
    letters = {letter.event.payload: letter for letter in await bus.dead_letters.list() if letter.event}
    assert {payload: (letter.reason, letter.attempts) for payload, letter in letters.items()} == {
        "reject": ("rejected", 1),
        "fail": ("exhausted", 2),
    }
    assert letters["reject"].error.message == "not this one"
    assert (await bus.stats())["h"].completed == 3
    await bus.close()


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_handlers_error_passes_through_and_may_be_caught(kind: str) -> None:
    bus = TestBus(retry=RetryPolicy(max_retries=0))
    caught: list[str] = []

    async def catch(event: Event[Any], call_next: CallNext) -> Any:
        try:
            return await call_next()
        except LookupError as error:
            caught.append(repr(error))
            if event.payload == "let go":
                raise

    def handle(event: Event[Any]) -> None:
        raise StopIteration if event.payload == "stop" else LookupError(event.payload)

    async def handle_async(event: Event[Any]) -> None:
        handle(event)

    bus.use(catch)
    bus.on("a", name="h")(handle if kind == "plain" else handle_async)
    for payload in ("keep", "let go", "stop"):
        await bus.publish("a", payload)
    await bus.idle()
    assert sorted(caught) == ["LookupError('keep')", "LookupError('let go')"]
    letters = [letter.event.payload for letter in await bus.dead_letters.list() if letter.event]
    assert sorted(letters) == ["let go", "stop"]
    await bus.close()


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_added_after_start_it_concerns_later_events(kind: str) -> None:
    bus = TestBus()
    seen: list[str] = []

    def handle(event: Event[Any]) -> None:
        seen.append(who.get())

    async def handle_async(event: Event[Any]) -> None:
        handle(event)

    bus.on("a", name="h")(handle if kind == "plain" else handle_async)
    await bus.publish("a")
    await bus.idle()

    @bus.use
    def plain(event: Event[Any], call_next: CallNext) -> Awaitable[Any]:
        who.set("somebody")
        return call_next(event)

    await bus.publish("a")
    await bus.idle()
    assert seen == ["nobody", "somebody"]
    await bus.close()


@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_around_publish(mode: Any) -> None:
    """It may change the event, sees the receipt, and may keep the event back."""
    bus = TestBus(mode=mode)
    receipts: list[Receipt] = []
    mock = bus.mock_handler("**")

    @bus.use(on="publish")
    async def stamp(event: Event[Any], call_next: CallNext) -> None:
        if event.payload == "keep back":
            return
        if event.payload == "refuse":
            raise PermissionError("you may not")
        receipts.append(await call_next(event.with_meta(user_id="u-1", headers={"seen": "yes"})))

    receipt = await bus.publish("a", "go", session_id="s-1")
    assert receipt == receipts[0]
    event = Event.create("a", "go too")
    assert (await bus.publish(event)).id == event.meta.id
    (first, second) = await bus.publish_many([Event.create("a", "many"), Event.create("a", "keep back")])
    assert (first.id, second.position) == (receipts[2].id, None)
    with pytest.raises(PermissionError):
        await bus.publish("a", "refuse")
    assert (await bus.publish("a", "keep back")).position is None
    await bus.idle()
    assert [(e.payload, e.meta.user_id, e.meta.headers) for e in mock.events] == [
        (payload, "u-1", {"seen": "yes"}) for payload in ("go", "go too", "many")
    ]
    assert mock.events[0].meta.session_id == "s-1"
    await bus.close()


async def test_publish_many_is_still_all_or_none() -> None:
    bus = TestBus(max_payload_bytes=100)
    errors: list[Exception] = []

    @bus.use(on="publish")
    async def watch(event: Event[Any], call_next: CallNext) -> Any:
        if event.payload == "skip":
            return None
        await asyncio.sleep(0)
        try:
            return await call_next()
        except PayloadTooLarge as error:
            errors.append(error)
            raise

    events = [Event.create("a", payload) for payload in ("skip", "fine", "x" * 200)]
    with pytest.raises(PayloadTooLarge) as caught:
        await bus.publish_many(events)
    assert [index for index, _ in caught.value.failures] == [2]
    assert len(errors) == 2  # each of those that were to be sent
    assert bus.published() == []
    assert await bus.publish_many([]) == []

    @bus.use(on="publish")
    async def refuse(event: Event[Any], call_next: CallNext) -> Any:
        if event.payload == "refuse":
            raise PermissionError
        return await call_next()

    with pytest.raises(PermissionError):
        await bus.publish_many([Event.create("a", "fine"), Event.create("a", "refuse")])
    assert bus.published() == []
    await bus.close()


async def test_a_synchronous_publish_runs_the_handlers_inside_it() -> None:
    bus = Bus("memory://", service="shop", mode="sync")
    log: list[str] = []
    bus.use(tracing(log, "handle"))
    bus.use(tracing(log, "publish"), on="publish")
    bus.on("a", name="plain")(lambda event: log.append("handler"))
    await bus.publish("a")
    assert log == ["publish in", "handle in", "handler", "handle out", "publish out"]

    @bus.use
    async def refuse(event: Event[Any], call_next: CallNext) -> None:
        raise Reject("no")

    with pytest.raises(HandlerError) as caught:
        await bus.publish("a")
    assert isinstance(caught.value.__cause__, Reject)
    await bus.close()


async def test_around_an_iterator() -> None:
    async with Bus("memory://", service="shop") as bus:

        @bus.use
        async def refuse(event: Event[Any], call_next: CallNext) -> Any:
            if event.payload == 1:
                raise Reject("not this one")
            return await call_next()

        events = bus.events("a")
        first = asyncio.ensure_future(anext(events))
        while not bus.subscriptions:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await bus.publish_many([Event.create("a", n) for n in (1, 2)])
        assert (await asyncio.wait_for(first, 10)).payload == 2
        await events.aclose()


def test_bad_middleware_is_refused() -> None:
    bus = Bus("memory://", service="shop")
    with pytest.raises(InvalidConfig, match="handle, publish"):
        bus.use(tracing([], "x"), on="publsh")  # type: ignore[call-overload]
    with pytest.raises(InvalidConfig, match="call_next"):
        bus.use(lambda event: None)  # type: ignore[type-var]
    with pytest.raises(InvalidConfig):
        bus.use(5)  # type: ignore[call-overload]


def test_meta_of_a_copy() -> None:
    event = Event.create("a", raw=b'{"n": 1.10}', user_id="u")._delivered("g")
    other = event.with_meta(traceparent="00-1-2-01", user_id=None)
    assert (other.meta.id, other.raw, other.meta.user_id) == (event.meta.id, event.raw, "u")
    assert (other.meta.traceparent, event.meta.traceparent) == ("00-1-2-01", None)
    assert other.delivery is not None
    assert other.delivery.group == "g"
    with pytest.raises(TypeError, match="did you mean traceparent"):
        event.with_meta(traceparen="x")  # type: ignore[call-arg]


@pytest.mark.every_transport
def test_without_a_loop(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish middleware, and middleware around plain functions, of a program that has no loop; also after a fork."""
    monkeypatch.setenv("TEST_BUS", store.name)
    out = run(
        """
        import contextvars
        who = contextvars.ContextVar("who", default="nobody")
        bus = Bus(URL, service="shop")
        done = threading.Event()

        @bus.use(on="publish")
        async def stamp(event, call_next):
            await asyncio.sleep(0)
            return await call_next(event.with_meta(user_id=who.get()))

        @bus.use
        async def around(event, call_next):
            who.set("inside")
            await asyncio.sleep(0)
            await call_next()
            if event.payload in ("child", 2):
                done.set()

        @bus.on("x")
        def handler(event):
            say(event.payload, event.meta.user_id, who.get(), threading.current_thread().name[:8])
            if event.payload == 0:
                bus.blocking.publish("y", "from a handler")

        def go(word):
            with bus.blocking:
                who.set(word)
                bus.blocking.publish("x", 0)
                bus.blocking.publish_many([Event.create("x", n) for n in (1, 2)])
                assert done.wait(10)
                say(bus.blocking.stats()["handler"].failed)

        bus.on("y", name="y")(lambda event: None)
        bus._registered["handler"][2]["concurrency"] = 1
        go("main")
        done.clear()
        child = os.fork()
        if child == 0:
            bus.blocking.start()
            bus.blocking.publish("x", "child")
            assert done.wait(10)
            bus.blocking.close()
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        """,
        store.url,
    )
    assert out.splitlines() == [
        *(f"{n} main inside polybus-" for n in range(3)),
        "0",
        "child main inside polybus-",
    ]
