"""A service that dies, or stands still, where it is told to: `service.py <role> <database> <bus> <what to do>…`.

While `points.armed` it passes named points: before and after each statement, and between other things that it does. The
file that PASSED names is told each. At the one that DIE_AT names the process ends itself as `kill -9` does, or with
`STOP=1` stands still until somebody lets it go on. `service.mjs` is the same in JavaScript.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import psycopg

from polybus import Bus, Event
from polybus.outbox import Outbox, Relay, inbox

Connection: TypeAlias = "psycopg.Connection[Any]"
outbox = Outbox(service="python")


class Points:
    """Where the process is. Each has a number, because a statement may come several times."""

    armed = False

    def __init__(self) -> None:
        self._file = os.open(os.environ["PASSED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._passed = 0

    def __call__(self, name: str) -> None:
        if not self.armed:
            return
        self._passed += 1
        name = f"{self._passed} {name}"
        os.write(self._file, f"{name}\n".encode())
        if name == os.environ.get("DIE_AT"):
            os.kill(os.getpid(), signal.SIGSTOP if "STOP" in os.environ else signal.SIGKILL)


points = Points()


def short(sql: str) -> str:
    """The verb and the table of a statement, or what there is."""
    found = re.match(r"\s*(\w+)(?:.*?\b(?:INTO|FROM|UPDATE)\s+\"?(\w+))?", sql, re.DOTALL)
    assert found is not None, sql
    return " ".join(filter(None, found.groups()))


def watched(execute: Any) -> Any:
    def run(cursor: Any, sql: Any, *more: Any, **options: Any) -> Any:
        name = short(sql.decode() if isinstance(sql, bytes) else sql)
        points(f"before {name}")
        result = execute(cursor, sql, *more, **options)
        points(f"after {name}")
        return result

    return run


psycopg.Cursor.execute = watched(psycopg.Cursor.execute)  # type: ignore[method-assign]


def connect() -> Connection:
    return psycopg.connect(database, autocommit=True)


def fact(db: Connection, order: str, number: int) -> Event:
    """A row, and the event that tells of it; not stored yet."""
    made = Event.create("fact.placed", {"order": order, "number": number}, partition_key=order)
    db.execute("INSERT INTO facts VALUES (%s, %s)", (made.meta.id, order))
    return made


def write(orders: Sequence[str]) -> None:
    """Write each order that is not there: three facts, and one that is rolled back. Armed in the last one."""
    db = connect()
    for order in orders:
        if db.execute("SELECT 1 FROM facts WHERE of = %s", (order,)).fetchone():
            continue
        points.armed = order == orders[-1]
        points("begins")
        db.execute("BEGIN")
        outbox.store([fact(db, order, 0), fact(db, order, 1)], db)
        db.execute("SAVEPOINT s")
        outbox.store(fact(db, order, 2), db)
        db.execute("RELEASE s")
        db.execute("SAVEPOINT s")
        outbox.store(fact(db, order, 3), db)
        db.execute("ROLLBACK TO s")
        db.execute("COMMIT")
        points("ends")


def handle(numbers: Sequence[str]) -> None:
    """Handle facts: an effect, the mark, and another event. Armed for that number, and ends after it."""
    handled = threading.Event()

    def book(given: Event) -> None:
        mine = given.payload["number"] == int(numbers[0])
        points.armed = mine
        points("arrived")
        db.execute("BEGIN")
        with inbox.once(db, given) as first:
            if first:
                child = given.child("fact.booked", {"of": given.meta.id}, partition_key=given.payload["order"])
                db.execute("INSERT INTO effects VALUES ('python', %s)", (given.meta.id,))
                outbox.store(child, db)
            else:
                db.execute("INSERT INTO suppressed VALUES ('python', %s)", (given.meta.id,))
        db.execute("COMMIT")
        points("handled, and not acknowledged")
        if mine:
            handled.set()

    with connect() as db, Bus(url, service="python", lease=1.0).blocking as bus:
        subscription = bus.subscribe("fact.placed", book, name="book", group="python", concurrency=1)
        print("ready", flush=True)
        if numbers[0] == "-1":
            sys.stdin.read()
            return
        handled.wait()
        subscription.unsubscribe()  # waits until the verdict is stored
        points("acknowledged")


async def relay(_: Sequence[str]) -> None:
    """At each line, relay what there is through a connection of the service's own, and tell what became of it."""
    with connect() as db:
        db.cursor_factory = psycopg.RawCursor  # which takes the relay's $1

        def execute(sql: str, params: Sequence[Any]) -> Any:
            cursor = db.execute(sql.encode(), params)
            return cursor.fetchall() if cursor.description else [], cursor.rowcount

        async with Bus(url, service="python") as bus:
            carrier = Relay(execute, bus, dialect="postgres")
            print("ready", flush=True)
            while await asyncio.to_thread(sys.stdin.readline):
                points.armed = True
                batch = await carrier.relay_batch()
                points("relayed")
                points.armed = False
                print(batch.attempted, batch.relayed, batch.ownership_mismatches, flush=True)


role, database, url, *rest = sys.argv[1:]
if role == "relay":
    asyncio.run(relay(rest))
else:
    {"write": write, "handle": handle}[role](rest)
