"""The relay, from Python: on a real PostgreSQL and MariaDB, and through drivers of the application."""

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
import pymysql
import pytest

from database_server import SERVERS, DatabaseServer, MariaServer
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


@pytest.fixture(scope="module", params=["postgres", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    with SERVERS[request.param]() as running:
        yield running


class Shop:
    """A database with an outbox, and a bus whose handler notes what comes."""

    dialect = "postgres"
    admin = "postgres"
    """A database that every server has."""

    def __init__(self, server: DatabaseServer, name: str) -> None:
        self.port = server.port
        self.url = self.url_of(name)
        self.bus = Bus(f"memory://{name}", service="shop")
        self.seen: list[Event] = []
        self.outbox = Outbox()

    def url_of(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    async def open(self, name: str) -> None:
        admin = await asyncpg.connect(self.url_of("postgres"))
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        self.connection: Any = await asyncpg.connect(self.url)

    async def close(self) -> None:
        await self.connection.close()

    async def execute(self, sql: str) -> None:
        await self.connection.execute(sql)

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


class MariaShop(Shop):
    dialect = "mysql"
    admin = "mysql"

    def url_of(self, name: str) -> str:
        return f"mysql+pymysql://root@127.0.0.1:{self.port}/{name}?charset=utf8mb4"

    async def open(self, name: str) -> None:
        self.connection = pymysql.connect(host="127.0.0.1", port=self.port, user="root", autocommit=True)
        await self.execute(f"CREATE DATABASE {name}")
        self.connection.select_db(name)

    async def close(self) -> None:
        self.connection.close()

    async def execute(self, sql: str) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)

    async def store(self, *payloads: Any, **meta: Any) -> list[Event]:
        events = [Event.create("order.placed", payload, **meta) for payload in payloads]
        self.connection.begin()
        self.outbox.store(events, session=self.connection)
        self.connection.commit()
        return events


@pytest.fixture
async def shop(server: DatabaseServer, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    name = f"relay_{abs(hash(request.node.nodeid)) % 10**9}"
    made = MariaShop(server, name) if isinstance(server, MariaServer) else Shop(server, name)
    await made.open(name)
    for statement in made.outbox.ddl(made.dialect):
        await made.execute(statement)

    @made.bus.on("**", name="all")
    async def note(event: Event) -> None:
        made.seen.append(event)

    async with made.bus:
        yield made
    await made.close()


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
    await shop.execute(f"INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'order.placed', '{wire}')")
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
    await shop.execute("INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'a', 'no event')")
    relay = Relay(shop.url, shop.bus, RetryPolicy(max_retries=0))
    assert await relay.relay_batch() == RelayBatch(attempted=1, malformed=1, dead_lettered=1)
    [dead] = await relay.dead_letters()
    with pytest.raises(InvalidEvent):
        _ = dead.event
    assert await relay.purge_dead() == 1


async def test_bad_input(shop: Shop) -> None:
    for wrong, words in [
        (lambda: Relay("mysql://u:secret@h/d?ssl-mod=x", shop.bus), "did you mean ssl-mode"),
        (lambda: Relay("mariadb://u:secret@h/d", shop.bus, listen_url="postgres://h/d"), "PostgreSQL"),
        (lambda: Relay("oracle://u:secret@h/d", shop.bus), "mysql://"),
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
    with pytest.raises(InvalidConfig, match=f"polybus outbox ddl --dialect {shop.dialect}"):
        await Relay(shop.url_of(shop.admin), shop.bus).run()
    with pytest.raises(InvalidConfig, match="last part of the URL"):
        await Relay(shop.url_of("nowhere"), shop.bus).run()
    shop.port = 1
    with pytest.raises((AuthFailed, ConnectionFailed)):
        await Relay(shop.url_of("nowhere"), shop.bus).relay_batch()


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


async def test_an_outbox_in_mariadb_goes_through_the_applications_driver(tmp_path: Any) -> None:
    with MariaServer() as server:
        shop = MariaShop(server, "shop")
        await shop.open("shop")
        for statement in shop.outbox.ddl("mysql"):
            await shop.execute(statement)
        mine = pymysql.connect(host="127.0.0.1", port=server.port, user="root", database="shop", autocommit=True)

        def execute(sql: str, params: Any) -> Any:
            with mine.cursor() as cursor:
                cursor.execute(sql, params)
                return cursor.fetchall(), cursor.rowcount

        numbers: list[Any] = []

        @shop.bus.on("**", name="all", concurrency=1)
        async def note(event: Event) -> None:
            numbers.append(event.payload)

        async with shop.bus:
            for number in range(30):
                await shop.store(number, partition_key=f"k{number % 3}")
            await shop.execute("INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'a', 'no event')")
            relay = Relay(execute, shop.bus, dialect="mysql", batch=7)
            running = asyncio.create_task(relay.run())
            await shop.until(lambda: len(numbers) == 30)
            relay.stop()
            await running
            while (await relay.relay_batch()).attempted:
                pass
            assert sorted(numbers) == list(range(30))
            assert (await relay.stats()).dead == 1
            [dead] = await relay.dead_letters()
            assert (dead.event_id, dead.raw, dead.attempts) == ("x", "no event", 1)
            assert await relay.replay() == 1
            assert (await relay.relay_batch()).malformed == 1
            assert await relay.purge_dead("x") == 1
            await shop.execute("UPDATE polybus_outbox SET created_at = '2020-01-01', delivered_at = '2020-01-01'")
            assert await relay.purge(timedelta(days=1)) == 30
            await shop.execute("DROP TABLE polybus_outbox")
            with pytest.raises(InvalidConfig, match="polybus outbox ddl --dialect mysql"):
                await relay.relay_batch()
        mine.close()
        await shop.close()


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
