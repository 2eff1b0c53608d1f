"""Redis as a Python program sees it: what is refused, what is promised. Who harms a server starts one of its own."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from polybus import (
    AuthFailed,
    Bus,
    BusClosed,
    ConnectionFailed,
    Event,
    InvalidConfig,
    PayloadTooLarge,
    PolybusError,
    Unsupported,
)
from redis_server import RedisServer
from store import Store


@pytest.fixture
def place(redis_server: RedisServer) -> Store:
    return Store("redis", redis_server.url)


@pytest.fixture
def pubsub(redis_server: RedisServer) -> Store:
    return Store("redis+pubsub", redis_server.url.replace("redis://", "redis+pubsub://"))


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("redi://:secret@localhost", "did you mean redis://"),
        ("redis+pubsb://:secret@localhost", r"did you mean redis\+pubsub://"),
        ("redis://:secret@localhost:99999", "port"),
        ("redis://:secret@localhost/events", "events"),
        ("rediss://:secret@localhost?ca_fil=ca.pem", "ca_file"),
        ("redis+sentinel://:secret@localhost:26379", "master"),
    ],
)
def test_urls_that_can_never_work(url: str, word: str) -> None:
    with pytest.raises(InvalidConfig, match=word) as refused:
        Bus(url, service="shop")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"confirm": "dsk"}, ["confirm", "disk"]),
        ({"partitions": 0}, ["partitions=0"]),
        ({"partitions": "two"}, ["partitions"]),
    ],
)
def test_options_that_can_never_work(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as refused:
        Bus("redis://localhost", service="shop", **options)
    for word in words:
        assert word in str(refused.value)


async def test_a_server_that_is_not_there_and_then_is() -> None:
    with RedisServer() as server:
        server.stop()
        bus = Bus(server.url, service="shop")
        uses: list[Callable[[], Coroutine[Any, Any, Any]]] = [bus.start, lambda: bus.publish("x")]
        for use in uses:
            with pytest.raises(ConnectionFailed, match=re.escape(server.address)) as failed:
                await asyncio.wait_for(use(), 20)
            assert failed.value.retryable
        server.restart()
        await bus.publish("x")
        await bus.close()


async def test_a_wrong_password_is_refused_and_told_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with RedisServer(password="right-secret") as server:
        for url in (f"redis://:wrong-secret@{server.address}", f"redis://{server.address}"):
            bus = Bus(url, service="shop")
            with caplog.at_level(logging.DEBUG), pytest.raises(AuthFailed) as refused:
                await bus.start()
            told = "".join(traceback.format_exception(refused.value))
            for text in (told, repr(refused.value), repr(bus), bus.url, caplog.text):
                assert "secret" not in text
        async with Bus(server.url, service="shop") as bus:
            await bus.publish("x")
            assert bus.url == f"redis://:***@{server.address}"


async def test_a_closed_bus_and_a_huge_payload(place: Store) -> None:
    bus = place.bus(max_payload_bytes=100)
    with pytest.raises(PayloadTooLarge, match="100"):
        await bus.publish("x", "y" * 100)
    receipt = await bus.publish("x", "y" * 98)
    assert re.fullmatch(r"\d+-\d+", str(receipt.position))
    await bus.close()
    with pytest.raises(BusClosed):
        await bus.publish("x")
    with pytest.raises(BusClosed):
        await bus.guarantees()


@pytest.mark.parametrize(("appendfsync", "durability"), [(None, "memory"), ("everysec", "process"), ("always", "disk")])
async def test_guarantees_are_those_of_the_server(appendfsync: str | None, durability: str) -> None:
    with RedisServer(appendfsync=appendfsync) as server:
        async with Bus(server.url, service="shop", durability="off") as bus:
            told = await bus.guarantees()
        version = ".".join(map(str, server.version()))
    assert (told.transport, told.delivery, told.durability) == ("redis", "at-least-once", durability)
    assert told.ack
    assert told.cross_process
    assert told.delayed_publish
    assert told.dead_letters
    assert told.start_position
    assert told.broadcast
    assert told.details["version"] == version
    assert told.details["appendonly"] == ("yes" if appendfsync else "no")
    assert told.details["maxmemory_policy"] == "noeviction"
    if appendfsync is None:
        assert any("append" in warning for warning in told.warnings)


async def test_a_server_that_evicts_is_warned_about() -> None:
    with RedisServer(appendfsync="always", maxmemory="100mb", maxmemory_policy="allkeys-lru") as server:
        async with Bus(server.url, service="shop", durability="off") as bus:
            told = await bus.guarantees()
    assert told.details["maxmemory_policy"] == "allkeys-lru"
    assert any("maxmemory" in warning for warning in told.warnings)


@pytest.mark.parametrize(("durability", "warnings"), [("warn", 1), ("off", 0)])
async def test_a_weak_server_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, durability: Any, warnings: int
) -> None:
    with RedisServer() as server, caplog.at_level(logging.WARNING, "polybus"):
        async with Bus(server.url, service="shop", durability=durability) as bus:
            await bus.publish("x")
    assert len(caplog.records) == warnings


async def test_durability_can_be_required() -> None:
    with RedisServer() as weak, RedisServer(appendfsync="always") as strong:
        with pytest.raises(Unsupported, match="append"):
            await Bus(weak.url, service="shop", durability="required").start()
        async with Bus(strong.url, service="shop", durability="required") as bus:
            await bus.publish("x")


async def test_confirm_disk_needs_a_server_that_can(place: Store, redis_server: RedisServer) -> None:
    bus = place.bus(confirm="disk")
    if redis_server.version() < (7, 2):
        with pytest.raises(Unsupported, match=r"7\.2"):
            await bus.publish("x")
    else:
        await bus.publish("x")
    await bus.close()


async def test_confirm_disk_is_free_where_every_write_is_synced() -> None:
    with RedisServer(appendfsync="always") as server:
        async with Bus(server.url, service="shop", confirm="disk") as bus:
            await bus.publish("x")


async def test_partitions_are_fixed_by_the_first(place: Store) -> None:
    async with place.bus(partitions=2) as bus:
        await bus.publish("x")
        for other in (4, 1):
            with pytest.raises(InvalidConfig, match="partitions"):
                await place.bus(partitions=other).start()
        async with place.bus(partitions=2) as same:
            await same.publish("x")


async def test_pubsub_only_broadcasts(pubsub: Store) -> None:
    seen: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(event: Event[Any]) -> None:
        seen.put_nowait(event.payload)

    async with pubsub.bus() as bus:
        told = await bus.guarantees()
        assert (told.transport, told.delivery) == ("redis+pubsub", "at-most-once")
        can = [name for name in CAPABILITIES if getattr(told, name)]
        assert can == ["cross_process", "broadcast"]
        refused: list[Callable[[], Coroutine[Any, Any, Any]]] = [
            lambda: bus.subscribe("x", handler),
            lambda: bus.subscribe("x", handler, broadcast=True, start="beginning"),
            lambda: bus.publish("x", delay=1.0),
            lambda: bus.dead_letters.list(),
        ]
        for use in refused:
            with pytest.raises(Unsupported):
                await use()
        await bus.subscribe("x", handler, broadcast=True)
        async with pubsub.bus() as other:
            await other.publish("x", 7)
        assert await asyncio.wait_for(seen.get(), 10) == 7


CAPABILITIES = (
    *("durable", "cross_process", "ack", "delayed_retry", "delayed_publish"),
    *("dead_letters", "start_position", "broadcast", "ordered", "idempotent", "publish_dedupe"),
)


async def test_a_server_that_dies_comes_back_with_what_it_had() -> None:
    """Killed while a subscription waits: it goes on by itself, and what was published before is there."""
    seen: asyncio.Queue[Any] = asyncio.Queue()

    async def handler(event: Event[Any]) -> None:
        seen.put_nowait(event.payload)

    with RedisServer(appendfsync="always") as server:
        async with Bus(server.url, service="shop", lease=1.0) as bus:
            subscription = await bus.subscribe("x", handler, name="x")
            subscription.pause()
            await bus.publish("x", 1)
            server.kill()
            with pytest.raises(PolybusError) as failed:
                await asyncio.wait_for(bus.publish("x", 2), 20)
            assert failed.value.retryable
            server.restart()
            subscription.resume()
            assert await asyncio.wait_for(seen.get(), 20) == 1
            await bus.publish("x", 3)
            while await asyncio.wait_for(seen.get(), 20) != 3:  # 2 may have been stored: publish_unknown
                pass
