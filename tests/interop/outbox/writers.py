"""Four writers through SQLAlchemy, until the input ends: see `test_outbox_storm.py`. `writers.ts` has four more."""

from __future__ import annotations

import random
import sys
import threading
import time

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from polybus import Event
from polybus.outbox import Outbox

engine = create_engine(sys.argv[1].replace("postgresql://", "postgresql+psycopg://"))
outbox = Outbox(service="python")
done = threading.Event()


def write(key: str) -> None:
    """Transactions, one after the other. What becomes of one whose connection is lost, the database knows."""
    number = 0

    def fact(session: Session) -> None:
        nonlocal number
        made = Event.create("fact.placed", {"number": number}, partition_key=key)
        number += 1
        session.execute(text("INSERT INTO facts VALUES (:id, :of)"), {"id": made.meta.id, "of": key})
        outbox.store(made, session)

    while not done.is_set():
        try:
            with Session(engine) as session, session.begin() as whole:
                fact(session)
                time.sleep(random.random() / 50)  # they commit in any order
                with session.begin_nested() as part:
                    fact(session)
                    if random.random() < 0.5:
                        part.rollback()
                if random.random() < 0.1:
                    whole.rollback()
        except DBAPIError:  # noqa: PERF203 (each time)
            time.sleep(0.02)  # the database is away


threads = [threading.Thread(target=write, args=[f"python-{number}"]) for number in range(4)]
for thread in threads:
    thread.start()
sys.stdin.read()
done.set()
for thread in threads:
    thread.join()
