"""Transactions of one business row and one event: through `outbox.store` and with an INSERT by hand, in turn."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any

from common import ask, payload, say

from polybus import Event
from polybus.outbox import Outbox

ORDER = "INSERT INTO orders (id, customer, total) VALUES ({})"
EVENT = "INSERT INTO polybus_outbox (event_id, type, event, partition_key, dedupe_key) VALUES ({})"
PSYCOPG = (ORDER.format("%s, %s, %s"), EVENT.format("%s, %s, %s, %s, %s"))
ASYNCPG = (ORDER.format("$1, $2, $3"), EVENT.format("$1, $2, $3, $4, $5"))

outbox = Outbox(service="bench")
_count = 0


def order() -> tuple[str, str, int]:
    global _count
    _count += 1
    return uuid.uuid4().hex, f"customer-{_count % 1000}", _count


def made(i: int) -> Event[Any]:
    return Event.create("order.placed", payload(i), partition_key=f"order-{i}")


def by_hand(i: int) -> tuple[str, str, str, str, str | None]:
    """The same row, as one would write it without polybus."""
    event_id, key = str(uuid.uuid4()), f"order-{i}"
    meta = {"id": event_id, "timestamp": datetime.now(timezone.utc).isoformat(), "source": "bench", "partitionKey": key}
    wire = json.dumps({"type": "order.placed", "payload": payload(i), "meta": meta})
    return event_id, "order.placed", wire, key, None


Ask = Callable[[], Awaitable[Any]]


async def asyncpg_connection() -> tuple[Ask, Ask, int, Ask]:
    import asyncpg

    connection = await asyncpg.connect(ask.url)
    insert, store = ASYNCPG

    async def ours() -> None:
        async with connection.transaction():
            row = order()
            await connection.execute(insert, *row)
            assert await outbox.store_async(made(row[2]), connection)

    async def hand() -> None:
        async with connection.transaction():
            row = order()
            await connection.execute(insert, *row)
            await connection.execute(store, *by_hand(row[2]))

    return ours, hand, connection.get_server_pid(), connection.close


async def psycopg_async_connection() -> tuple[Ask, Ask, int, Ask]:
    import psycopg

    connection = await psycopg.AsyncConnection.connect(ask.url)
    insert, store = PSYCOPG

    async def ours() -> None:
        row = order()
        await connection.execute(insert, row)
        assert await outbox.store_async(made(row[2]), connection)
        await connection.commit()

    async def hand() -> None:
        row = order()
        await connection.execute(insert, row)
        await connection.execute(store, by_hand(row[2]))
        await connection.commit()

    return ours, hand, connection.info.backend_pid, connection.close


def psycopg_connection() -> tuple[Callable[[], None], Callable[[], None], int, Callable[[], None]]:
    import psycopg

    connection = psycopg.connect(ask.url)
    insert, store = PSYCOPG

    def ours() -> None:
        row = order()
        connection.execute(insert, row)
        assert outbox.store(made(row[2]), connection)
        connection.commit()

    def hand() -> None:
        row = order()
        connection.execute(insert, row)
        connection.execute(store, by_hand(row[2]))
        connection.commit()

    return ours, hand, connection.info.backend_pid, connection.close


def server_cpu(pids: list[int]) -> float:
    """Seconds of CPU that these backends have used."""
    used = 0
    for pid in pids:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
            used += int(file.read().split()[0])
    return used / 1e9


class Slice:
    """One run: transactions per second, and microseconds of CPU per transaction here and there."""

    def __init__(self, pids: list[int], seconds: float) -> None:
        self.pids, self.count = pids, 0
        self.server, self.client, self.started = server_cpu(pids), time.process_time(), time.perf_counter()
        self.until = self.started + seconds

    def facts(self) -> dict[str, float]:
        spent, client = time.perf_counter() - self.started, time.process_time() - self.client
        server = server_cpu(self.pids) - self.server
        each = 1e6 / self.count
        return {"rate": self.count / spent, "client": client * each, "server": server * each}


#: Ours and by hand, each as often first as second.
TURNS = (0, 1, 1, 0)


async def awaited(connect: Callable[[], Awaitable[tuple[Ask, Ask, int, Ask]]]) -> None:
    opened = [await connect() for _ in range(ask.connections)]
    pids = [pid for _, _, pid, _ in opened]

    async def work(run: Ask, slice_: Slice) -> None:
        while time.perf_counter() < slice_.until:
            await run()
            slice_.count += 1

    for number in range(ask.rounds + 1):
        for turn in TURNS:
            slice_ = Slice(pids, ask.seconds if number else 1)
            await asyncio.gather(*[work(each[turn], slice_) for each in opened])
            if number:  # the first round pays for caches
                say(how=turn, **slice_.facts())
    for *_, close in opened:
        await close()


def threaded() -> None:
    opened = [psycopg_connection() for _ in range(ask.connections)]
    pids = [pid for _, _, pid, _ in opened]

    def work(run: Callable[[], None], slice_: Slice, counts: list[int]) -> None:
        count = 0
        while time.perf_counter() < slice_.until:
            run()
            count += 1
        counts.append(count)

    for number in range(ask.rounds + 1):
        for turn in TURNS:
            slice_, counts = Slice(pids, ask.seconds if number else 1), []  # type: ignore[var-annotated]
            threads = [threading.Thread(target=work, args=(each[turn], slice_, counts)) for each in opened]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            slice_.count = sum(counts)
            if number:
                say(how=turn, **slice_.facts())
    for *_, close in opened:
        close()


if ask.driver == "psycopg":
    threaded()
else:
    connect = {"asyncpg": asyncpg_connection, "psycopg async": psycopg_async_connection}[ask.driver]
    asyncio.run(awaited(connect))
say(done=True)
