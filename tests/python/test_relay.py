"""The relay, from Python: on a real PostgreSQL, and through a driver of the application."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import asyncpg
import pytest

from database_server import PostgresServer
from polybus import (
    AuthFailed,
    Bus,
    ConnectionFailed,
    Event,
    InvalidConfig,
    InvalidEvent,
    NotFound,
    PayloadTooLarge,
    RetryPolicy,
)
from polybus.outbox import Outbox, Relay, RelayBatch

DEADLINE = 20


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


class Shop:
    """A database with an outbox, and a bus whose handler notes what comes."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.url = f"postgresql://postgres@127.0.0.1:{server.port}/{name}"
        self.bus = Bus(f"memory://{name}", service="shop")
        self.seen: list[Event] = []
        self.outbox = Outbox()

    async def store(self, *payloads: Any, **meta: Any) -> list[Event]:
        events = [Event.create("order.placed", payload, **meta) for payload in payloads]
        async with self.connection.transaction():
            await self.outbox.store_async(events, session=self.connection)
        return events

    async def until(self, condition: Callable[[], Awaitable[bool] | bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not (done := condition()) or (not isinstance(done, bool) and not await done):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)


@pytest.fixture
async def shop(server: PostgresServer, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    name = f"relay_{abs(hash(request.node.nodeid)) % 10**9}"
    admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{server.port}/postgres")
    await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    made = Shop(server, name)
    made.connection = await asyncpg.connect(made.url)
    for statement in made.outbox.ddl("postgres"):
        await made.connection.execute(statement)

    @made.bus.on("**", name="all")
    async def note(event: Event) -> None:
        made.seen.append(event)

    async with made.bus:
        yield made
    await made.connection.close()


async def test_what_was_committed_is_published(shop: Shop) -> None:
    events = await shop.store(1, 2**70, "größer")
    relay = Relay(shop.url, shop.bus)
    assert await relay.relay_batch() == RelayBatch(attempted=3, relayed=3)
    await shop.until(lambda: len(shop.seen) == 3)
    assert {event.meta.id: event.payload for event in shop.seen} == {event.meta.id: event.payload for event in events}
    stats = await relay.stats()
    assert (stats.pending, stats.dead, stats.oldest) == (0, 0, None)
    assert await relay.purge(timedelta(days=1)) == 0
    assert 'polybus_relay_relayed_total{table="polybus_outbox"} 3' in await relay.metrics()


async def test_it_runs_until_it_is_stopped_or_cancelled(shop: Shop) -> None:
    relay = Relay(shop.url, shop.bus, poll_interval=0.01)
    for number, end in enumerate((relay.stop, None)):
        running = asyncio.create_task(relay.run())
        await shop.store(number)
        await shop.until(lambda number=number: len(shop.seen) == number + 1)
        assert relay.health().healthy
        if end is None:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        else:
            end()
            await running
        assert relay.health().workers == 0


async def test_what_is_too_large_for_this_bus_is_dead_and_can_be_replayed_into_another(shop: Shop) -> None:
    small = Bus(f"{shop.bus.url}-small", service="shop", max_payload_bytes=10)
    [large] = await shop.store("x" * 20)
    assert (await Relay(shop.url, small).relay_batch()).malformed == 1
    relay = Relay(shop.url, shop.bus)
    [dead] = await relay.dead_letters()
    assert (dead.event_id, dead.event.payload, dead.attempts) == (large.meta.id, "x" * 20, 1)
    assert dead.last_error.startswith("payload_too_large: ")
    assert dead.dead_at >= dead.created_at
    assert await relay.dead_letters(after=dead) == []
    with pytest.raises(NotFound):
        await relay.replay("nobody")
    assert await relay.replay(dead) == 1
    assert (await relay.relay_batch()).relayed == 1
    await small.close()


async def test_a_policy_decides_about_what_the_bus_refuses(shop: Shop, tmp_path: Any) -> None:
    # Too much around its payload: it can be read, and no bus takes it.
    wire = json.dumps(Event.create("order.placed", 1, headers={"h": "x" * 65_300}).to_dict())
    wire = wire.replace('"h": "', '"h": "' + "y" * 300)
    insert = "INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'order.placed', $1)"
    await shop.connection.execute(insert, wire)
    asked: list[tuple[int, type[BaseException]]] = []
    answers = iter([0, timedelta(0), datetime.now(timezone.utc), "nonsense", None])

    async def policy(attempts: int, error: Exception) -> Any:
        asked.append((attempts, type(error)))
        return next(answers)

    async with Bus(f"sqlite:///{tmp_path / 'bus.db'}", service="shop") as bus:
        relay = Relay(shop.url, bus, policy)
        # The default policy decides where this one says nonsense: no retry mends that error.
        for dead in (0, 0, 0, 1):
            batch = await relay.relay_batch()
            assert (batch.publish_failed, batch.dead_lettered) == (1, dead)
        assert asked == [(attempts, PayloadTooLarge) for attempts in (1, 2, 3, 4)]
        assert await relay.replay() == 1
        assert (await Relay(shop.url, bus, lambda attempts, error: None).relay_batch()).dead_lettered == 1


async def test_a_row_that_holds_no_event_is_dead(shop: Shop) -> None:
    await shop.connection.execute("INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'a', 'no event')")
    relay = Relay(shop.url, shop.bus, RetryPolicy(max_retries=0))
    assert await relay.relay_batch() == RelayBatch(attempted=1, malformed=1, dead_lettered=1)
    [dead] = await relay.dead_letters()
    with pytest.raises(InvalidEvent):
        _ = dead.event
    assert await relay.purge_dead() == 1


async def test_bad_input(shop: Shop, server: PostgresServer) -> None:
    for wrong, words in [
        (lambda: Relay("mysql://h/d", shop.bus), "MySQL"),
        (lambda: Relay("postgres://u:secret@h/d?sslmod=x", shop.bus), "did you mean sslmode"),
        (lambda: Relay(7, shop.bus), "int"),
        (lambda: Relay(shop.url, shop.bus, batch=0), "batch=0"),
        (lambda: Relay(shop.url, shop.bus, table="a;b"), "letters, digits"),
        (lambda: Relay(shop.url, Bus("memory://", service="s", fail_open=True)), "fail_open"),
    ]:
        with pytest.raises((InvalidConfig, Exception), match=words) as raised:
            wrong()
        assert "secret" not in str(raised.value)
    with pytest.raises(TypeError, match="workers"):
        Relay(shop.url, shop.bus, worker=2)  # type: ignore[call-arg]
    other = shop.url.rsplit("/", 1)[0]
    with pytest.raises(InvalidConfig, match="polybus outbox ddl --dialect postgres"):
        await Relay(f"{other}/postgres", shop.bus).run()
    with pytest.raises((AuthFailed, ConnectionFailed)):
        await Relay("postgres://postgres@127.0.0.1:1/postgres", shop.bus).relay_batch()


async def test_an_outbox_in_sqlite_goes_through_the_applications_driver(tmp_path: Any) -> None:
    outbox, path = Outbox(), tmp_path / "shop.db"
    writer, mine = sqlite3.connect(path), sqlite3.connect(path, isolation_level=None)
    for statement in outbox.ddl("sqlite"):
        writer.execute(statement)
    with writer:
        writer.execute("CREATE TABLE orders (id TEXT)")
        for number in range(30):
            outbox.store(Event.create("order.placed", number, partition_key=f"k{number % 3}"), session=writer)
    numbers: list[Any] = []
    bus = Bus(f"sqlite:///{tmp_path / 'bus.db'}", service="shop")

    @bus.on("**", name="all", concurrency=1)
    async def note(event: Event) -> None:
        numbers.append(event.payload)

    async def execute(sql: str, params: Any) -> Any:
        before = mine.total_changes
        rows = mine.execute(sql, params).fetchall()
        return rows, mine.total_changes - before

    async with bus:
        assert (await Relay(mine, bus, batch=10).relay_batch()).relayed == 10
        relay = Relay(execute, bus, dialect="sqlite")
        running = asyncio.create_task(relay.run())
        deadline = time.monotonic() + DEADLINE
        while len(numbers) < 30:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)
        relay.stop()
        await running
    assert numbers == list(range(30))
    mine.execute("DROP TABLE polybus_outbox")
    with pytest.raises(InvalidConfig, match="polybus outbox ddl --dialect sqlite"):
        await relay.relay_batch()


async def test_the_command_relays_and_serves_its_health(shop: Shop, tmp_path: Any) -> None:
    await shop.store(1, 2)
    bus = f"sqlite:///{tmp_path / 'bus.db'}"
    command = [sys.executable, "-m", "polybus", "relay", "--db", shop.url, "--bus", bus]
    said = await asyncio.to_thread(
        subprocess.run, [*command, "--once"], capture_output=True, text=True, check=False, timeout=30
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "2 events relayed, 0 dead letters\n", "")
    port = 20_000 + abs(hash(shop.url)) % 9_000
    with subprocess.Popen([*command, "--http", f"127.0.0.1:{port}"]) as running:  # noqa: ASYNC220 (starts at once)

        def page(path: str) -> str:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                    text: str = answer.read().decode()
                    return text
            except OSError:
                return ""

        await shop.store(3)

        async def relayed() -> bool:
            assert running.poll() is None
            return "polybus_relay_relayed_total" in (text := await asyncio.to_thread(page, "/metrics")) and (
                'relayed_total{table="polybus_outbox"} 1' in text
            )

        await shop.until(relayed)
        assert '"healthy":true' in await asyncio.to_thread(page, "/health")
        running.terminate()
        assert await asyncio.to_thread(running.wait, 20) == 0
