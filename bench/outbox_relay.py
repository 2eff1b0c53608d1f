"""How fast a backlog of the outbox is relayed from PostgreSQL to Redis Streams, beside a relay written by hand.

    python bench/outbox_relay.py [rows] [--snapshot]

Starts a PostgreSQL (default durability) and a redis-server (append-only file) of its own. `--snapshot` keeps a
transaction open that began before the rows were relayed, so that vacuum can remove nothing. Wants psycopg and redis.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psycopg
import redis

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from database_server import PostgresServer
from polybus import Bus, Event
from polybus.outbox import Outbox, Relay

BATCH = 1000


class DurablePostgres(PostgresServer):
    def _serve(self) -> list[str]:
        return [*super()._serve(), "-c", "fsync=on", "-c", "shared_buffers=256MB", "-c", "max_wal_size=4GB"]


def fill(db: psycopg.Connection, rows: int, keys: int) -> None:
    db.execute("TRUNCATE polybus_outbox")
    event = Event.create("order.placed", {"orderId": "o-1", "total": 99.99, "note": "x" * 100})
    wire = json.dumps(event.to_dict())
    with db.cursor().copy("COPY polybus_outbox (event_id, type, event, partition_key) FROM STDIN") as copy:
        for number in range(rows):
            number_id = f"0193a000-0000-7000-8000-{number:012x}"
            key = f"key-{number % keys}" if keys else None
            copy.write_row((number_id, "order.placed", wire.replace(event.meta.id, number_id), key))
    db.commit()
    db.autocommit = True
    db.execute("VACUUM ANALYZE polybus_outbox")
    db.autocommit = False


def by_hand(url: str, redis_url: str, rows: int) -> float:
    """What one writes in an afternoon: no leases, no order of keys, no floor."""
    db, store = psycopg.connect(url, autocommit=True), redis.Redis.from_url(redis_url)
    started = time.perf_counter()
    done = 0
    while done < rows:
        found = db.execute(
            "WITH c AS (SELECT seq FROM polybus_outbox WHERE status = 'pending' ORDER BY seq LIMIT %s "
            "FOR UPDATE SKIP LOCKED) UPDATE polybus_outbox o SET status = 'claimed', lease_until = now() + "
            "interval '30 s' FROM c WHERE o.seq = c.seq RETURNING o.seq, o.type, o.event",
            [BATCH],
        ).fetchall()
        pipe = store.pipeline(transaction=False)
        for _, kind, event in sorted(found):
            pipe.xadd("events", {"t": kind, "e": event})
        pipe.execute()
        seqs = [row[0] for row in found]
        db.execute("UPDATE polybus_outbox SET status = 'delivered', delivered_at = now() WHERE seq = ANY(%s)", [seqs])
        done += len(found)
    spent = time.perf_counter() - started
    db.close()
    return rows / spent


async def polybus(url: str, redis_url: str, rows: int, workers: int) -> float:
    async with Bus(redis_url, service="bench", bus=f"b{time.monotonic_ns()}") as bus:
        relay = Relay(url, bus, batch=BATCH, workers=workers)
        await relay.check()
        await bus.publish("warm.up", 1)
        started = time.perf_counter()
        running = asyncio.create_task(relay.run())
        text = f'polybus_relay_relayed_total{{table="polybus_outbox"}} {rows}'
        await relay.metrics()
        with psycopg.connect(url, autocommit=True) as db:
            # Asks for the last row only, which costs the server next to nothing.
            last = "SELECT status FROM polybus_outbox ORDER BY seq DESC LIMIT 1"
            while db.execute(last).fetchone() != ("delivered",):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            spent = time.perf_counter() - started
            relay.stop()
            await running
            left = db.execute("SELECT count(*) FROM polybus_outbox WHERE status <> 'delivered'").fetchone()
            assert left == (0,), left
        assert text in await relay.metrics()
    return rows / spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int, nargs="?", default=100_000)
    parser.add_argument("--snapshot", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="polybus-bench-")
    port = 16_379
    command = ["redis-server", "--port", str(port), "--appendonly", "yes", "--dir", folder, "--save", ""]
    store = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    redis_url = f"redis://127.0.0.1:{port}"
    try:
        with DurablePostgres() as server:
            url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
            db = psycopg.connect(url)
            for statement in Outbox().ddl("postgres"):
                db.execute(statement)
            db.commit()
            cases = {
                "by hand, psycopg + redis-py": lambda: by_hand(url, redis_url, asked.rows),
                "polybus, one worker": lambda: asyncio.run(polybus(url, redis_url, asked.rows, 1)),
                "polybus, two workers": lambda: asyncio.run(polybus(url, redis_url, asked.rows, 2)),
                "polybus, 1000 keys": lambda: asyncio.run(polybus(url, redis_url, asked.rows, 1)),
            }
            figures: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(asked.runs):
                for name, run in cases.items():
                    fill(db, asked.rows, 1000 if "keys" in name else 0)
                    redis.Redis.from_url(redis_url).flushall()
                    old = psycopg.connect(url)
                    if asked.snapshot:
                        old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                        old.execute("SELECT 1 FROM polybus_outbox LIMIT 1")
                    figures[name].append(run())
                    old.close()
            for name, rates in figures.items():
                print(f"{name:30} {statistics.median(rates):10,.0f} rows/s  ({min(rates):,.0f} - {max(rates):,.0f})")
    finally:
        store.kill()
        store.wait()


if __name__ == "__main__":
    main()
