"""What an outbox meets in operation: a pool of sessions, missing rights, servers that only read, other clocks."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import psycopg2
import pytest
import sqlalchemy.orm

from database_server import PgBouncer, PostgresServer
from outbox_drivers import DRIVERS, Driver, Play, Postgres, database
from polybus import AuthFailed, Bus, ConnectionFailed, Event, InvalidConfig
from polybus.outbox import Inbox, Outbox, Relay
from relay_command import relay

DAY = 86_400


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


@pytest.fixture(scope="module")
def pool(server: PostgresServer) -> Iterator[PgBouncer]:
    with PgBouncer(server) as running:
        yield running


@pytest.fixture
def db(server: PostgresServer, tmp_path: Path) -> Iterator[Postgres]:
    with database("postgres", server, tmp_path) as made:
        assert isinstance(made, Postgres)
        yield made


def placed(number: int = 0, **meta: Any) -> Event:
    return Event.create("order.placed", number, **meta)


def numbers(db: Postgres) -> list[int]:
    return [event.payload for event in db.events()]


# ---- PgBouncer -----------------------------------------------------------------------------------------------------

ROUNDS = 20
"""More than the executions after which drivers prepare a statement."""


def through(pool: PgBouncer, db: Postgres, scheme: str = "postgresql") -> str:
    return db.dsn(scheme).replace(f":{db.port}/", f":{pool.port}/")


async def test_psycopg_stores_through_pgbouncer(pool: PgBouncer, db: Postgres) -> None:
    outbox, url = Outbox(), through(pool, db)
    # Four connections on two sessions. Without this setting psycopg prepares what it runs often.
    connections = [psycopg.connect(url, prepare_threshold=None) for _ in range(4)]
    for number in range(ROUNDS):
        for connection in connections:
            assert outbox.store(placed(number), connection) is True
            connection.commit()
    for connection in connections:
        connection.close()
    other = await psycopg.AsyncConnection.connect(url, prepare_threshold=None)
    for _ in range(ROUNDS):
        async with other.transaction():
            assert await outbox.store_async([placed(), placed()], other) == [True, True]
    await other.close()
    plain = psycopg2.connect(url)
    assert outbox.store(placed(idempotency_key="k"), plain) is True
    assert outbox.store(placed(idempotency_key="k"), plain) is False
    plain.commit()
    plain.close()
    assert len(db.events()) == 6 * ROUNDS + 1


async def test_asyncpg_stores_through_pgbouncer(pool: PgBouncer, db: Postgres) -> None:
    outbox, inbox, url = Outbox(), Inbox(), through(pool, db)

    async def one() -> None:
        connection = await asyncpg.connect(url, statement_cache_size=0)
        for number in range(ROUNDS):
            async with connection.transaction():
                event = placed(number)
                assert await outbox.store_async(event, connection) is True
                async with inbox.once(connection, event, consumer="c") as first:
                    assert first is True
        await connection.close()

    # At the same time, so that each of them is on one session now and on the other then.
    await asyncio.gather(*(one() for _ in range(4)))
    assert len(db.events()) == len(db.marks()) == 4 * ROUNDS


def test_sqlalchemy_stores_through_pgbouncer(pool: PgBouncer, db: Postgres) -> None:
    engine = sqlalchemy.create_engine(
        through(pool, db, "postgresql+psycopg"), poolclass=sqlalchemy.NullPool, connect_args={"prepare_threshold": None}
    )
    for number in range(ROUNDS):
        with engine.begin() as connection:
            assert Outbox().store(placed(number), connection) is True
    assert numbers(db) == list(range(ROUNDS))


async def test_a_relay_works_through_pgbouncer(pool: PgBouncer, db: Postgres, tmp_path: Path) -> None:
    with db.connection.transaction():
        Outbox().store([placed(number, partition_key="k") for number in range(30)], db.connection)
    async with Bus(f"sqlite:///{tmp_path / 'bus.db'}", service="shop") as bus:
        relay = Relay(through(pool, db), bus, batch=7)
        assert [(await relay.relay_batch()).relayed for _ in range(5)] == [7, 7, 7, 7, 2]
        assert [entry.event.payload for entry in await bus.history()] == list(range(30))


# ---- rights --------------------------------------------------------------------------------------------------------

POSTGRES = DRIVERS["postgres"]


@pytest.fixture(params=POSTGRES, ids=lambda driver: driver.__name__)
async def play(request: pytest.FixtureRequest, db: Postgres) -> Any:
    play = Play(request.param(db))
    await play.open()
    yield play
    await play.end()


@pytest.fixture
def role(db: Postgres) -> Iterator[str]:
    db.query("CREATE ROLE limited")
    yield "limited"
    db.query("DROP OWNED BY limited")
    db.query("DROP ROLE limited")


async def test_a_user_who_lacks_a_right_is_told_what_to_grant(play: Driver, db: Postgres, role: str) -> None:
    grant = 'GRANT SELECT, INSERT ON "polybus_outbox" TO the_user'
    for given in ("SELECT", "INSERT", "both"):
        db.query("REVOKE ALL ON polybus_outbox FROM limited")
        db.query(
            (grant if given == "both" else f"GRANT {given} ON polybus_outbox TO the_user").replace("the_user", role)
        )
        await play.begin()
        await play.execute("SET LOCAL ROLE limited")
        if given == "both":
            assert await play.store(placed(1)) is True
            await play.commit()
        else:
            with pytest.raises(AuthFailed) as raised:
                # Several, because one needs no SELECT with a driver that counts.
                await play.store([placed(), placed()])
            assert grant in str(raised.value)
            assert "polybus_outbox" in str(raised.value)
            assert raised.value.__cause__ is not None
            await play.rollback()
    assert numbers(db) == [1]
    await play.begin()
    await play.execute("SET LOCAL ROLE limited")
    with pytest.raises(AuthFailed, match='GRANT SELECT, INSERT, DELETE ON "polybus_inbox" TO the_user'):
        await play.once(placed())
    await play.rollback()


async def test_a_schema_that_may_not_be_used_is_named(db: Postgres, role: str) -> None:
    db.query("CREATE SCHEMA app")
    outbox = Outbox(table="app.events")
    for statement in outbox.ddl("postgres"):
        db.query(statement)
    words = 'GRANT USAGE ON SCHEMA "app" TO the_user; GRANT SELECT, INSERT ON "app"."events" TO the_user'
    with psycopg.connect(db.dsn("postgresql")) as connection:
        connection.execute("SET ROLE limited")
        connection.commit()
        with pytest.raises(AuthFailed) as raised:
            outbox.store(placed(), connection)
        assert words in str(raised.value)
        connection.rollback()
        for statement in words.replace("the_user", role).split("; "):
            db.query(statement)
        assert outbox.store(placed(), connection) is True


async def test_a_database_that_only_reads_is_told_and_may_take_it_later(play: Driver, db: Postgres) -> None:
    await play.begin()
    await play.execute("SET TRANSACTION READ ONLY")
    with pytest.raises(ConnectionFailed, match=r"takes no writes.*primary") as raised:
        await play.store(placed())
    assert raised.value.retryable
    assert raised.value.__cause__ is not None
    await play.rollback()
    await play.begin()
    assert await play.store(placed(2)) is True
    await play.commit()
    assert numbers(db) == [2]


def test_a_sqlite_file_that_may_not_be_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "app.db"
    made = sqlite3.connect(path)
    for statement in Outbox().ddl("sqlite"):
        made.execute(statement)
    made.close()
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(AuthFailed, match="takes no writes on this connection"):
        Outbox().store(placed(), reader)
    reader.close()


# ---- the wrong object ----------------------------------------------------------------------------------------------


async def test_each_family_says_what_it_got_and_what_is_taken(db: Postgres, tmp_path: Path) -> None:
    outbox, url = Outbox(), db.dsn("postgresql")
    takes = "give a Django connection.*SQLAlchemy Session.*psycopg.*asyncpg.*sqlite3.*PyMySQL"
    engine = sqlalchemy.create_engine(db.dsn("postgresql+psycopg"))
    with psycopg.connect(url) as three, psycopg2.connect(url) as two, sqlite3.connect(tmp_path / "a.db") as lite:
        for wrong, name in [
            (three.cursor(), "psycopg.Cursor"),
            (two.cursor(), "psycopg2.extensions.cursor"),
            (lite.cursor(), "sqlite3.Cursor"),
            (engine, "sqlalchemy.engine.base.Engine"),
            (sqlalchemy.orm.sessionmaker(engine), "sqlalchemy.orm.session.sessionmaker"),
            (f"{url}?password=s3cret", "builtins.str"),
            ({"url": url}, "builtins.dict"),
        ]:
            with pytest.raises(InvalidConfig, match=takes) as raised:
                outbox.store(placed(), wrong)
            assert name in str(raised.value)
            assert "s3cret" not in str(raised.value)
    two.close()
    lite.close()
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as several:
        with pytest.raises(InvalidConfig, match=takes) as raised:
            await outbox.store_async(placed(), several)
        assert "asyncpg.pool.Pool" in str(raised.value)
    assert db.events() == []
    engine.dispose()


# ---- clocks --------------------------------------------------------------------------------------------------------

PROGRAM = """
import asyncio, json, sys, time
from datetime import datetime, timedelta, timezone
import psycopg
from polybus import Bus, Event
from polybus.outbox import Outbox, Relay

url, bus_url = sys.argv[1:]
outbox = Outbox()
db = psycopg.connect(url, autocommit=True)
# It can be read, and no bus takes it: the policy is asked.
wire = json.dumps(Event.create("order.placed", 1, headers={"h": "x" * 65_300}).to_dict())
wire = wire.replace('"h": "', '"h": "' + "y" * 300)
for id in ("seconds", "datetime"):
    db.execute("INSERT INTO polybus_outbox (event_id, type, event) VALUES (%s, 'order.placed', %s)", (id, wire))
ours = Event.create("order.placed", 1, idempotency_key="k")
with db.transaction():
    stored = [outbox.store(ours, db), outbox.store(Event.create("order.placed", 2, idempotency_key="k"), db)]
leases, answers = [], iter([100.0, datetime.now(timezone.utc) + timedelta(seconds=100)])

def policy(attempts, error):
    # At this moment the rows are claimed.
    left = "SELECT extract(epoch FROM lease_until - now())::float FROM polybus_outbox WHERE status = 'claimed'"
    leases.extend(row[0] for row in db.execute(left))
    return next(answers)

async def main():
    async with Bus(bus_url, service="shop") as bus:
        relay = Relay(url, bus, policy)
        batch = await relay.relay_batch()
        stats = await relay.stats()
        purged = await relay.purge(timedelta(hours=1))
        again = await relay.relay_batch()
    print(json.dumps({
        "now": time.time(), "event": ours.meta.timestamp, "stored": stored, "leases": leases,
        "relayed": batch.relayed, "refused": batch.publish_failed, "oldest": stats.oldest,
        "retrying": stats.retrying, "purged": purged, "again": again.attempted,
    }))

asyncio.run(main())
"""


@pytest.mark.parametrize("days", [-2, 2])
def test_the_clock_of_the_application_does_not_matter(db: Postgres, tmp_path: Path, days: int) -> None:
    """A process that lives two days before, or after, the database. Whatever is compared there is its time alone."""
    db.query("INSERT INTO polybus_outbox (event_id, type, event, status, created_at, delivered_at) SELECT id, 'a', 'b',"
             " 'delivered', now() - age, now() - age FROM (VALUES ('old', interval '61 minutes'), ('young', interval"
             " '59 minutes')) AS rows (id, age)")  # fmt: skip
    began = time.time()
    said = subprocess.run(
        ["faketime", "-f", f"{days:+}d", sys.executable, "-c", textwrap.dedent(PROGRAM), db.dsn("postgresql"),
         f"sqlite:///{tmp_path / 'bus.db'}"],
        env={**os.environ, "FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert abs(told["now"] - began - days * DAY) < DAY / 2, "it does not live in another time"
    assert told["stored"] == [True, False]
    assert (told["relayed"], told["refused"], told["retrying"]) == (1, 2, 2)
    assert told["leases"]
    assert all(0 < left <= 30 for left in told["leases"])
    assert 0 <= told["oldest"] < DAY / 2
    assert (told["purged"], told["again"]) == (1, 0)
    rows = db.query(
        "SELECT event_id, extract(epoch FROM visible_at - now())::float, status, "
        "abs(extract(epoch FROM created_at - now())) < 3600 FROM polybus_outbox"
    )
    found = {row[0]: row[1:] for row in rows}
    assert "old" not in found
    assert found["young"][1] == "delivered"
    for name in ("seconds", "datetime"):
        wait, state, made_now = found[name]
        assert (state, made_now) == ("pending", True)
        assert 0 < wait <= 100.5
    # What the event says of its time is the application's, and stays.
    event = Event._from_wire(db.query("SELECT event FROM polybus_outbox WHERE dedupe_key = 'k'")[0][0].encode())
    assert event.meta.timestamp == told["event"]
    made = datetime.fromisoformat(event.meta.timestamp.replace("Z", "+00:00")).timestamp()
    assert abs(made - began - days * DAY) < DAY / 2


@pytest.mark.parametrize("days", [-2, 2])
def test_the_clock_of_a_relay_that_runs_alone_does_not_matter(db: Postgres, tmp_path: Path, days: int) -> None:
    bus = f"sqlite:///{tmp_path / 'bus.db'}"
    for name, state in [("held", "now() + interval '1 minute'"), ("left", "now() - interval '1 minute'")]:
        event = placed(partition_key=name)
        with db.connection.transaction():
            Outbox().store(event, db.connection)
        db.query(f"UPDATE polybus_outbox SET status = 'claimed', lease_token = 'x', lease_until = {state}"
                 f" WHERE event_id = '{event.meta.id}'")  # fmt: skip
    skewed = ("env", "FAKETIME_DONT_FAKE_MONOTONIC=1", "faketime", "-f", f"{days:+}d")
    # What another relay holds is its own, whatever time it is here; what it has left is ours.
    assert relay("--db", db.dsn("postgres"), "--bus", bus, "--once", prefix=skewed)[:2] == (
        0,
        "1 events relayed, 0 dead letters\n",
    )
    assert db.query("SELECT partition_key, status FROM polybus_outbox ORDER BY seq") == [
        ("held", "claimed"),
        ("left", "delivered"),
    ]
