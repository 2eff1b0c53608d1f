"""Processes that get SIGTERM while a handler runs: what ended is not delivered again, the rest is at once."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import polybus
from polybus import Bus, BusClosed, ConnectionFailed, Event
from program import Program, run
from store import Store

WORKER = """
bus = Bus(URL, service="shop", lease=30.0)
go_on = threading.Event()
drain, kind = float(sys.argv[2]), sys.argv[3]

def wait_for_the_test():
    if sys.stdin.readline():
        go_on.set()

async def asynchronous(event):
    say("begun", event.payload)
    while not go_on.is_set():
        await asyncio.sleep(0.01)
    say("ended", event.payload)

def plain(event):
    say("begun", event.payload)
    go_on.wait()
    say("ended", event.payload)

async def main():
    async def watch():
        while not bus._native.closed:
            await asyncio.sleep(0.01)
        say("closing")
    watching = asyncio.ensure_future(watch())
    threading.Thread(target=wait_for_the_test, daemon=True).start()
    await serve(bus, drain=drain)
    await watching
    say("closed", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

bus.on("x", name="x", concurrency=1)(plain if kind == "plain" else asynchronous)
asyncio.run(main())
"""

TAKE = """
bus = Bus(URL, service="shop", lease=30.0)
bus.blocking.publish("x", "last")
for event in bus.blocking.events("x", name="x"):
    say(event.payload, event.delivery.attempt)
    if event.payload == "last":
        break
"""


Begin = Callable[[float, str], Program]


@pytest.fixture
def url(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEST_BUS", store.name)
    return store.url


@pytest.fixture
def begin(url: str, store: Store) -> Iterator[Begin]:
    """Starts a worker whose handler runs."""
    workers = []

    def begin(drain: float, kind: str) -> Program:
        workers.append(Program(WORKER, url, str(drain), kind, stdin=True))
        return working(workers[-1], store)

    yield begin
    for worker in workers:
        worker.process.kill()  # nothing happens if it has ended
        worker.process.communicate()


def working(worker: Program, store: Store) -> Program:
    with store.bus(lease=30.0).blocking as bus:
        bus.subscribe("x", print, name="x").unsubscribe()  # the group is there
        bus.publish("x", "first")
    assert worker.line() == "begun first"
    return worker


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "plain"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_handler_that_ends_in_time_is_done(url: str, begin: Begin, kind: str, number: signal.Signals) -> None:
    worker = begin(60, kind)
    worker.process.send_signal(number)
    assert worker.line() == "closing"
    worker.tell("go on")
    assert worker.line() == "ended first"
    assert worker.line() == "closed True"
    assert worker.end() == (0, "", "")
    assert run(TAKE, url) == "last 1\n"


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_one_that_does_not_is_handed_back_and_its_attempt_does_not_count(url: str, begin: Begin, kind: str) -> None:
    worker = begin(0.05, kind)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.line() == "closing"
    assert worker.line() == "closed True"
    assert worker.end() == (0, "", "")
    assert sorted(run(TAKE, url).splitlines()) == ["first 1", "last 1"]  # long before the lease of 30 s ran out


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_a_second_signal_hands_back_at_once(url: str, begin: Begin, kind: str) -> None:
    worker = begin(3600, kind)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.line() == "closing"
    worker.process.send_signal(signal.SIGINT)
    assert worker.line() == "closed True"
    assert worker.end() == (0, "", "")
    assert sorted(run(TAKE, url).splitlines()) == ["first 1", "last 1"]


def test_a_store_that_cannot_be_opened_is_told() -> None:
    out = run(
        """
        try:
            run(Bus(URL, service="shop"))
        except ConnectionFailed:
            say("told")
        """,
        "sqlite:////no/such/folder/bus.db",
    )
    assert out == "told\n"


async def test_cancelling_closes_too_and_a_bus_that_cannot_start_closes_the_others() -> None:
    bus = Bus("memory://", service="shop")
    started = asyncio.Event()

    @bus.on("a", name="h")
    async def handle(event: Event[Any]) -> None:
        started.set()

    serving = asyncio.ensure_future(polybus.serve(bus))
    while not bus.subscriptions:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await bus.publish("a")
    await asyncio.wait_for(started.wait(), 10)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    with pytest.raises(BusClosed):
        await bus.publish("a")
    with pytest.raises(ConnectionFailed):
        await polybus.serve(bus, Bus("sqlite:////no/such/folder/bus.db", service="shop"))
    with pytest.raises(BusClosed):
        await bus.publish("a")


async def test_lifespan_of_an_application() -> None:
    bus = Bus("memory://", service="shop")
    app = object()

    async def own(app: object) -> AsyncIterator[None]:
        async with polybus.lifespan(bus, drain=1)(app):
            yield

    seen = threading.Event()
    bus.on("a", name="h")(lambda event: seen.set())
    async for _ in own(app):
        await bus.publish("a")
        assert await asyncio.to_thread(seen.wait, 10)
    with pytest.raises(BusClosed):
        await bus.publish("a")
