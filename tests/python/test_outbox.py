"""The outbox and the inbox on real databases, through every driver that they know."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiosqlite
import asyncpg
import pytest
import sqlalchemy.orm
from asgiref.sync import sync_to_async

from database_server import SERVERS, DatabaseServer
from outbox_drivers import DRIVERS, Database, Django, Driver, Play, database
from polybus import Event, InvalidConfig, InvalidEvent, PayloadTooLarge
from polybus.outbox import Inbox, Outbox

PAYLOAD = {"nul": "\0", "huge": 2**70, "signs": "100 % %s ? $1 :p1 ' \" \\ ` \\'", "words": "größer 🚌 日本"}


def placed(**meta: Any) -> Event:
    return Event.create("order.placed", PAYLOAD, **meta)


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], DatabaseServer | None]]:
    running: dict[str, DatabaseServer] = {}

    def server(dialect: str) -> DatabaseServer | None:
        if dialect not in running and dialect in SERVERS:
            running[dialect] = SERVERS[dialect]()
        return running.get(dialect)

    yield server
    for each in running.values():
        each.close()


Open = Callable[[], Any]
CASES = [(dialect, driver) for dialect, drivers in DRIVERS.items() for driver in drivers]


@pytest.fixture(params=CASES, ids=[f"{dialect}-{driver.__name__}" for dialect, driver in CASES])
def case(request: pytest.FixtureRequest) -> tuple[str, type[Driver]]:
    return request.param


@pytest.fixture(scope="session")
def databases(
    servers: Callable[[str], DatabaseServer | None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Database]]:
    """One of each dialect, shared by all tests, which run one after the other."""
    with ExitStack() as stack:
        made: dict[str, Database] = {}

        def one(dialect: str) -> Database:
            if dialect not in made:
                folder = tmp_path_factory.mktemp("outbox")
                made[dialect] = stack.enter_context(database(dialect, servers(dialect), folder))
            made[dialect].reset()
            return made[dialect]

        yield one


@pytest.fixture
def db(case: tuple[str, type[Driver]], databases: Callable[[str], Database]) -> Database:
    return databases(case[0])


@pytest.fixture
async def open_one(case: tuple[str, type[Driver]], db: Database) -> AsyncIterator[Open]:
    """Opens a connection of the driver under test, as often as it is called."""
    async with AsyncExitStack() as stack:

        async def one() -> Play:
            play = Play(case[1](db))
            stack.push_async_callback(play.end)
            await play.open()
            return play

        yield one


@pytest.fixture
async def play(open_one: Open) -> Play:
    return await open_one()


async def until_it_waits(db: Database, task: asyncio.Task[Any]) -> None:
    """Until a statement of `task` waits for another transaction."""
    deadline = time.monotonic() + 20
    while not db.waits():
        assert not task.done(), "it did not wait"
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_the_row_and_its_event_commit_together(play: Play, db: Database) -> None:
    event = placed(partition_key="o-1", idempotency_key="order:o-1", headers={"h": "ö"})
    await play.begin()
    await play.insert("o-1")
    assert await play.store(event) is True
    assert db.events() == [], "it was committed before its transaction"
    await play.commit()
    [stored] = db.events()
    assert (stored, stored.raw, stored.payload) == (event, event.raw, PAYLOAD)
    assert stored.meta.source == "shop"
    row = db.query("SELECT event_id, type, partition_key, dedupe_key, status, attempts FROM polybus_outbox")[0]
    dedupe = row[3].decode() if isinstance(row[3], bytes) else row[3]
    assert (*row[:3], dedupe, *row[4:]) == (event.meta.id, "order.placed", "o-1", "order:o-1", "pending", 0)
    assert db.orders() == ["o-1"]


async def test_what_is_rolled_back_was_never_there(play: Play, db: Database) -> None:
    event = placed(idempotency_key="k")
    await play.begin()
    await play.insert("o-1")
    assert await play.store(event) is True
    await play.rollback()
    assert (db.events(), db.orders()) == ([], [])
    await play.begin()
    assert await play.store(event) is True, "nothing is left of its key"
    await play.commit()
    assert db.events() == [event]


async def test_a_savepoint_takes_its_events_with_it(play: Play, db: Database) -> None:
    kept, dropped, last = placed(), placed(), placed()
    await play.begin()
    await play.insert("o-1")
    assert await play.store(kept)
    await play.savepoint()
    await play.insert("o-2")
    assert await play.store(dropped)
    await play.rollback_to()
    assert await play.store(last)
    await play.commit()
    assert (db.events(), db.orders()) == ([kept, last], ["o-1"])


async def test_what_is_there_is_absorbed(play: Play, db: Database) -> None:
    first, other = placed(idempotency_key="k"), placed(idempotency_key="k")
    await play.begin()
    assert await play.store(first) is True
    assert await play.store(other) is False, "the same key"
    assert await play.store(first) is False, "the same event"
    assert await play.store(placed(), dedupe_key="k") is False
    assert await play.store(placed(idempotency_key="k"), dedupe_key="k ") is True, "another key"
    plain = placed()
    assert await play.store([plain, other, plain, placed(idempotency_key="k2"), placed(idempotency_key="k2")]) == [
        True,
        False,
        False,
        True,
        False,
    ]
    await play.commit()
    await play.begin()
    assert await play.store([other, placed()]) == [False, True]
    assert await play.store([]) == []
    await play.commit()
    assert len(db.events()) == 5


async def test_many_events_are_one_statement(play: Play, db: Database) -> None:
    events = [placed(partition_key=f"o-{index}") for index in range(300)]
    inserts = "SHOW GLOBAL STATUS WHERE Variable_name IN ('Com_insert')"
    before = int(db.query(inserts)[0][1]) if db.dialect == "mysql" else 0
    await play.begin()
    assert await play.store(events) == [True] * 300
    await play.commit()
    assert db.events() == events, "in their order"
    if db.dialect == "mysql":
        assert int(db.query(inserts)[0][1]) - before == 1
    if db.dialect == "postgres":
        assert db.query("SELECT count(DISTINCT cmin::text || ' ' || xmin::text) FROM polybus_outbox") == [(1,)]


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
async def test_of_two_writers_at_once_one_is_absorbed(open_one: Open, db: Database, commits: bool) -> None:
    one, two = await open_one(), await open_one()
    await one.begin()
    assert await one.store(placed(idempotency_key="k")) is True
    if db.dialect != "sqlite":
        await two.begin()
        task = asyncio.ensure_future(two.store(placed(idempotency_key="k")))
        await until_it_waits(db, task)
    await (one.commit() if commits else one.rollback())
    if db.dialect == "sqlite":  # which has one writer at a time
        await two.begin()
        task = asyncio.ensure_future(two.store(placed(idempotency_key="k")))
    assert await task is not commits
    await two.commit()
    assert len(db.events()) == 1


async def test_without_a_transaction_it_says_so(play: Play, db: Database) -> None:
    await play.autocommit()
    with pytest.raises(InvalidConfig, match=r"no open transaction.*allow_autocommit=True"):
        await play.store(placed())
    with pytest.raises(InvalidConfig, match="no open transaction"):
        await play.once(placed())
    assert (db.events(), db.marks()) == ([], [])
    assert await play.store([placed(), placed()], allow_autocommit=True) == [True, True]
    assert await play.once(placed(), allow_autocommit=True) is True
    assert len(db.events()) == 2
    assert len(db.marks()) == 1


@pytest.mark.parametrize(
    "change", ["DROP TABLE polybus_outbox", "ALTER TABLE polybus_outbox DROP COLUMN partition_key"]
)
async def test_a_table_that_is_missing_or_of_another_version(play: Play, db: Database, change: str) -> None:
    db.query(change)
    await play.begin()
    with pytest.raises(InvalidConfig, match=rf'Outbox\.ddl\("{db.dialect}"\)') as raised:
        await play.store(placed())
    assert raised.value.__cause__ is not None
    await play.rollback()
    db.query("DROP TABLE IF EXISTS polybus_outbox")


async def test_an_event_takes_effect_once(play: Play, db: Database) -> None:
    event = placed()
    await play.begin()
    assert await play.once(event) is True
    assert await play.once(event) is False
    assert await play.once(event.meta.id, consumer="mail") is True, "another consumer"
    await play.rollback()
    assert db.marks() == []
    await play.begin()
    assert await play.once(event) is True, "the effects were rolled back, and the mark with them"
    await play.commit()
    await play.begin()
    assert await play.once(event) is False
    await play.commit()
    assert db.marks() == [("billing", event.meta.id)]


async def test_an_effect_that_fails_takes_its_mark_back(play: Play, db: Database) -> None:
    def effect() -> None:
        raise RuntimeError("the effect failed")

    event = placed()
    await play.begin()
    with pytest.raises(RuntimeError, match="the effect failed"):
        await play.once(event, effect)
    await play.commit()  # by somebody who swallowed the error
    assert db.marks() == []
    await play.begin()
    await play.once(event)
    await play.commit()
    await play.begin()
    assert await play.once(event, effect) is False
    await play.commit()
    assert len(db.marks()) == 1, "a mark of an earlier time stays"


@pytest.mark.parametrize("commits", [True, False], ids=["commit", "rollback"])
async def test_of_two_handlers_at_once_one_is_first(open_one: Open, db: Database, commits: bool) -> None:
    event = placed()
    one, two = await open_one(), await open_one()
    await one.begin()
    assert await one.once(event) is True
    if db.dialect != "sqlite":
        await two.begin()
        task = asyncio.ensure_future(two.once(event))
        await until_it_waits(db, task)
    await (one.commit() if commits else one.rollback())
    if db.dialect == "sqlite":
        await two.begin()
        task = asyncio.ensure_future(two.once(event))
    assert await task is not commits
    await two.commit()
    assert len(db.marks()) == 1


async def test_old_marks_are_purged_in_parts(play: Play, db: Database) -> None:
    await play.begin()
    for index in range(5):
        await play.once(f"e-{index}")
    await play.commit()
    hour = {
        "postgres": "- interval '1 hour'",
        "sqlite": "- 3600000",
        "mysql": "- interval 1 hour",
    }[db.dialect]
    db.query(f"UPDATE polybus_inbox SET processed_at = processed_at {hour} WHERE event_id <> 'e-4'")
    counts = []
    for _ in range(3):
        await play.begin()
        counts.append(await play.purge(older_than=timedelta(minutes=30), limit=3))
        await play.commit()
    assert counts == [3, 1, 0]
    assert db.marks() == [("billing", "e-4")]


async def test_what_is_too_large_is_refused_before_anything_is_sent(play: Play, db: Database) -> None:
    await play.begin()
    with pytest.raises(PayloadTooLarge):
        await play.store([placed(), Event.create("order.placed", "x" * (1 << 20))])
    assert await play.store(Event.create("order.placed", "x" * ((1 << 20) - 2))) is True, "the transaction goes on"
    await play.commit()
    assert len(db.events()) == 1


# ---- without a driver under test ---------------------------------------------------------------------------------


async def test_what_is_no_connection_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "app.db")
    engine = sqlalchemy.create_engine("sqlite://")
    outbox, inbox = Outbox(), Inbox()
    for wrong in [
        None,
        3,
        object(),
        connection.cursor(),
        engine,
        sqlalchemy.orm.sessionmaker(engine),
        asyncpg.create_pool,
    ]:
        for call in [outbox.store, lambda event, session: inbox.once(session, event, consumer="c").__enter__()]:
            with pytest.raises(InvalidConfig, match=r"give a Django connection.*asyncpg.*PyMySQL.*outbox\.statement"):
                call(placed(), wrong)
        with pytest.raises(InvalidConfig, match="give a Django connection"):
            await outbox.store_async(placed(), wrong)
    async with aiosqlite.connect(tmp_path / "app.db") as awaited:
        with pytest.raises(InvalidConfig, match="to be awaited"):
            outbox.store(placed(), awaited)
    with pytest.raises(InvalidConfig, match="blocks"):
        await outbox.store_async(placed(), connection)
    with sqlalchemy.create_engine("sqlite://").connect() as other:
        other.dialect.name = "oracle"
        with pytest.raises(InvalidConfig, match="oracle is not among"):
            outbox.store(placed(), other)
    connection.close()


async def test_django_from_async_code(tmp_path: Path) -> None:
    with database("sqlite", None, tmp_path) as db:
        django = Django(db)
        django.open()

        def place(event: Event) -> bool:
            from django.db import connections

            django.begin()
            django.insert("o-1")
            stored = Outbox().store(event, session=django.alias)
            django.commit()
            connections[django.alias].close()
            return stored

        event = placed()
        assert await sync_to_async(place)(event) is True
        assert (db.events(), db.orders()) == ([event], ["o-1"])
        with pytest.raises(InvalidConfig, match=r"sync_to_async, together with the atomic block"):
            await Outbox().store_async(event, django.session)


def test_the_statement_for_any_other_driver(tmp_path: Path) -> None:
    with database("sqlite", None, tmp_path) as db:
        event, again = placed(idempotency_key="k"), placed(idempotency_key="k")
        statement = Outbox().statement([event, again], style="?")
        assert [row[0] for row in db.connection.execute(*statement)] == [event.meta.id]
        named = Outbox().statement(placed(), style=":name", dialect="sqlite", dedupe_key="other")
        assert set(named.params) == {"p1", "p2", "p3", "p4", "p5"}
        assert len(db.connection.execute(named.sql, named.params).fetchall()) == 1
        assert len(db.events()) == 2
    sql, params = Outbox(table="app.outbox").statement(placed(), style="$")
    assert sql.startswith('INSERT INTO "app"."outbox" (')
    assert "$5) ON CONFLICT DO NOTHING RETURNING event_id" in sql
    assert len(params) == 5
    for events in ([], [placed() for _ in range(1001)]):
        with pytest.raises(InvalidConfig, match="from 1 to 1,000 events"):
            Outbox().statement(events, style="?")


def test_bad_arguments_name_what_is_right(tmp_path: Path) -> None:
    for table in ["", "a b", 'a"b', "a.b.c", "x" * 49, 3]:
        with pytest.raises(InvalidConfig, match="table"):
            Outbox(table=table)  # type: ignore[arg-type]
        with pytest.raises(InvalidConfig, match="table"):
            Inbox(table=table)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean table"):
        Outbox(tabel="x")
    with pytest.raises(InvalidConfig, match="max_payload_bytes=0"):
        Outbox(max_payload_bytes=0)
    with pytest.raises(InvalidConfig, match='did you mean "postgres"'):
        Outbox().ddl("postgress")  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="unknown style"):
        Outbox().statement(placed(), style="%d")  # type: ignore[arg-type]
    connection = sqlite3.connect(tmp_path / "app.db")
    with pytest.raises(TypeError, match=r"Event\.create"):
        Outbox().store("order.placed", connection)
    with pytest.raises(TypeError, match="belongs to one event"):
        Outbox().store([placed()], connection, dedupe_key="k")  # type: ignore[call-overload]
    with pytest.raises(InvalidConfig, match="consumer="):
        Inbox().once(connection, placed())
    with pytest.raises(InvalidEvent, match="partition key has 600 bytes"):
        Outbox().store(placed(partition_key="k" * 600), connection)
    with pytest.raises(InvalidEvent, match="NUL"):
        Outbox().store(placed(idempotency_key="a\0b"), connection)
    connection.close()
