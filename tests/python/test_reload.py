"""Modules that are loaded again: the same name means the new handler, and nothing is lost or left running."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from polybus import Bus, DuplicateSubscription, Event, InvalidConfig
from store import Store

MODULE = """
from polybus import Bus

bus = Bus.shared(URL, service="shop", bus=NAME, on_duplicate="replace")

@bus.use
async def log(event, call_next):
    WORDS.append("log")
    return await call_next()

@bus.on("a", name="h")
async def handle(event):
    await HANDLED(VERSION, event)
"""


@pytest.mark.every_transport
async def test_a_module_that_is_loaded_again(store: Store) -> None:
    """The running handler ends, the next event goes to the new one; middleware of the same name is replaced, too."""
    words: list[Any] = []
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handled(version: int, event: Event[Any]) -> None:
        words.append(("begin", version, event.payload))
        if event.payload == 1:
            begun.set()
            await go_on.wait()
            words.append(("end", version, event.payload))
        if event.payload == 3:
            done.set()

    facts = {"URL": store.url, "NAME": store.name, "WORDS": words, "HANDLED": handled}

    def load(version: int) -> Bus:
        names: dict[str, Any] = {**facts, "VERSION": version}
        exec(MODULE, names)  # as importlib.reload does
        bus: Bus = names["bus"]
        return bus

    bus = load(1)
    async with bus:
        await bus.publish("a", 1)
        await asyncio.wait_for(begun.wait(), 10)
        assert load(2) is bus
        assert len(bus.subscriptions) == 1
        await bus.publish("a", 2)
        await bus.publish("a", 3)
        await asyncio.wait_for(done.wait(), 10)
        go_on.set()
        await bus.subscriptions[0].drain()
    assert words == ["log", ("begin", 1, 1), "log", ("begin", 2, 2), "log", ("begin", 2, 3), ("end", 1, 1)]


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["other pattern", "plain", "other options"])
async def test_more_than_the_handler_changed(store: Store, kind: str) -> None:
    """The old one is drained first: what it runs ends, and what comes meanwhile waits for the new one."""
    seen: list[Any] = []
    begun, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def old(event: Event[Any]) -> None:
        begun.set()
        await go_on.wait()
        seen.append(("old", event.payload))

    def new(event: Event[Any]) -> None:
        seen.append(("new", event.payload))
        loop.call_soon_threadsafe(done.set)

    async def new_async(event: Event[Any]) -> None:
        new(event)

    async with store.bus(on_duplicate="replace") as bus:
        first = await bus.subscribe("a.*", old, name="h", concurrency=1)
        await bus.publish("a.b", 1)
        await asyncio.wait_for(begun.wait(), 10)
        pattern = "a.**" if kind == "other pattern" else "a.*"
        handler = new if kind == "plain" else new_async
        concurrency = 2 if kind == "other options" else 1
        swap = asyncio.ensure_future(bus.subscribe(pattern, handler, name="h", concurrency=concurrency))
        await bus.publish("a.b", 2)
        go_on.set()
        second = await asyncio.wait_for(swap, 10)
        assert (first.active, second.active) == (False, True)
        await asyncio.wait_for(done.wait(), 10)
    assert seen == [("old", 1), ("new", 2)]


async def test_the_same_subscription_goes_on() -> None:
    async with Bus("memory://", service="shop", on_duplicate="replace") as bus:
        first = await bus.subscribe("a", print, name="h")
        assert await bus.subscribe("a", repr, name="h") is first
        bus.on("a", name="h")(str)
        assert bus.subscriptions == [first]


async def test_of_many_at_once_the_last_one_has_the_name() -> None:
    async with Bus("memory://", service="shop", on_duplicate="replace") as bus:
        seen: list[Any] = []
        done = asyncio.Event()

        async def handle(number: int, event: Event[Any]) -> None:
            seen.append(number)
            done.set()

        for number in range(1, 6):
            bus.on("a", name="h", concurrency=number)(functools.partial(handle, number))
        await bus.publish("a")
        await asyncio.wait_for(done.wait(), 10)
        assert seen == [5]


async def test_by_default_it_is_an_error() -> None:
    async with Bus("memory://", service="shop") as bus:
        bus.on("a", name="h")(print)
        with pytest.raises(DuplicateSubscription, match="on_duplicate"):
            bus.on("a", name="h")(repr)
        await bus.subscribe("a", print, name="other")
        with pytest.raises(DuplicateSubscription):
            await bus.subscribe("a", print, name="other")
    with pytest.raises(InvalidConfig, match="replace"):
        Bus("memory://", service="shop", on_duplicate="replce")  # type: ignore[arg-type]


def test_without_a_loop(store: Store) -> None:
    seen: list[Any] = []
    done = threading.Event()
    bus = store.bus(on_duplicate="replace")
    with bus.blocking:
        bus.blocking.subscribe("a", lambda event: seen.append("old"), name="h")

        @bus.on("a", name="h")
        def new(event: Event[Any]) -> None:
            seen.append("new")
            done.set()

        bus.blocking.publish("a")
        assert done.wait(10)
    assert seen == ["new"]


def test_shared_is_by_url_bus_and_service() -> None:
    one = Bus.shared("memory://shared", service="shop")
    assert Bus.shared("memory://shared", service="shop", worker_count=2) is one
    assert Bus.shared("memory://shared", service="other") is not one
    assert Bus.shared("memory://shared", service="shop", bus="b") is not one


@pytest.mark.parametrize(
    ("code", "argv", "env", "replaces"),
    [
        ("", ["app.py"], {}, False),
        ("", ["manage.py", "runserver"], {"RUN_MAIN": "true"}, True),
        ("", ["/venv/bin/uvicorn", "app:app", "--reload"], {}, True),
        ("", ["/venv/lib/uvicorn/__main__.py", "app:app", "--reload"], {}, True),
        ("", ["/venv/bin/uvicorn", "app:app"], {}, False),
        ("", ["cli.py", "--reload"], {}, False),
        ("", ["/venv/bin/fastapi", "dev", "app.py"], {}, True),
        ("", ["/venv/bin/fastapi", "run", "app.py"], {}, False),
        ("sys.ps1 = '>>> '", [""], {}, True),
        ("", ["app.py"], {"RUN_MAIN": "true", "POLYBUS_ON_DUPLICATE": "error"}, False),
        ("", ["app.py"], {"POLYBUS_ON_DUPLICATE": "replace"}, True),
    ],
)
def test_what_counts_as_development(code: str, argv: list[str], env: dict[str, str], replaces: bool) -> None:
    program = f"""
import sys
{code}
sys.argv = {argv!r}
from polybus import Bus
bus = Bus.from_env()
bus.on("a", name="h")(print)
try:
    bus.on("a", name="h")(repr)
    print(True)
except Exception as error:
    print(False)
"""
    given = {**os.environ, "POLYBUS_SERVICE": "shop", **env}
    out = subprocess.run([sys.executable, "-c", program], env=given, capture_output=True, text=True, check=True)
    assert out.stdout == f"{replaces}\n"
