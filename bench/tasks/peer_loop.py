"""A hand-written queue on `sqlite3`: batches of 100 in a transaction; claim, handle, delete; polls when it is empty."""

import asyncio
import json
import sqlite3
import time

from common import BATCH, ask, batches, now, payload, say, wait_for_go

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, body TEXT NOT NULL, owned_until REAL NOT NULL DEFAULT 0)
"""
CLAIM = """
UPDATE events SET owned_until = :now + 30
WHERE id IN (SELECT id FROM events WHERE owned_until < :now ORDER BY id LIMIT 100) RETURNING id, body
"""


def connect() -> sqlite3.Connection:
    connection = sqlite3.connect(ask.path, isolation_level=None, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(SCHEMA)
    return connection


def produce() -> None:
    connection = connect()
    wait_for_go()
    started = now()
    for batch in batches(ask.events, BATCH):
        rows = [(json.dumps(payload(i)),) for i in batch]
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO events (body) VALUES (?)", rows)
        connection.execute("COMMIT")
    say(started=started, ended=now())


async def consume() -> None:
    connection, handled = connect(), 0

    async def handler(body: str) -> None:
        nonlocal handled
        handled += 1

    say(ready=True)
    while handled < ask.events:
        claimed = connection.execute(CLAIM, {"now": time.time()}).fetchall()
        if not claimed:
            await asyncio.sleep(0.001)
            continue
        for _, body in claimed:
            await handler(body)
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("DELETE FROM events WHERE id = ?", [(id_,) for id_, _ in claimed])
        connection.execute("COMMIT")
    say(ended=now(), handled=handled)


if ask.part == "produce":
    produce()
else:
    asyncio.run(consume())
