"""What wakes the relay after a commit, on a real PostgreSQL."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from database_server import PostgresServer
from outbox_drivers import DRIVERS, Driver, Play, Postgres, Sqlite, database
from polybus import Event, InvalidConfig
from polybus.outbox import Outbox, inbox

ALCHEMY_SESSIONS = {"Alchemy", "AlchemyScoped", "AlchemyAsync"}


def placed() -> Event:
    return Event.create("order.placed", {"orderId": "o-1"})


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with PostgresServer() as server, database("postgres", server, tmp_path_factory.mktemp("outbox")) as made:
        assert isinstance(made, Postgres)
        yield made


@pytest.fixture
def db(shared: Postgres) -> Postgres:
    shared.reset()
    return shared


class Listener:
    """Hears what is said on the outbox's channel."""

    def __init__(self, db: Postgres) -> None:
        self._db = db
        self.connection = psycopg.connect(db.dsn("postgresql"), autocommit=True)
        self.connection.execute("LISTEN polybus_outbox")

    def heard(self) -> int:
        """How many notifications were committed up to now, since the last call."""
        # They come in the order of their commits, so what comes before this one is all there is.
        self._db.query("SELECT pg_notify('polybus_outbox', 'end')")
        for count, said in enumerate(self.connection.notifies(timeout=60)):
            if said.payload == "end":
                return count
        raise AssertionError("nothing was heard")


@pytest.fixture
def listener(db: Postgres) -> Iterator[Listener]:
    made = Listener(db)
    yield made
    made.connection.close()


@pytest.fixture(params=DRIVERS["postgres"], ids=lambda driver: driver.__name__)
async def play(request: pytest.FixtureRequest, db: Postgres) -> AsyncIterator[Play]:
    driver: type[Driver] = request.param
    play = Play(driver(db))
    await play.open()
    yield play
    await play.end()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polybus.outbox._wake.monotonic_ns", itertools.count(0, 10_000_000).__next__)


@pytest.mark.usefixtures("always")
async def test_notify_after_the_commit(play: Play, db: Postgres, listener: Listener) -> None:
    by_itself = type(play.driver).__name__ in ALCHEMY_SESSIONS
    for _ in range(2):
        await play.begin()
        assert await play.store(placed()) is True
        with pytest.raises(InvalidConfig, match="after the commit"):
            await play.notify()
        await play.commit()
        assert listener.heard() == by_itself
        await play.notify()
        assert listener.heard() == 1
    states = db.query(f"SELECT state FROM pg_stat_activity WHERE datname = '{db.name}' AND state <> 'active'")
    assert set(states) == {("idle",)}, "it left a transaction open"
    assert len(db.events()) == 2


async def test_it_is_said_once_in_a_while(play: Play, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5_000_000_000
    monkeypatch.setattr("polybus.outbox._wake.monotonic_ns", lambda: now)
    play.driver.outbox = Outbox()  # one that has said nothing yet
    for later, heard in ((0, 1), (9, 0), (1, 1)):
        now += later * 1_000_000
        for _ in range(3):
            await play.notify()
        assert listener.heard() == heard


def test_elsewhere_it_does_nothing(tmp_path: Path) -> None:
    with database("sqlite", None, tmp_path) as made:
        assert isinstance(made, Sqlite)
        Outbox().notify(made.connection)


# ---- a SQLAlchemy session tells of its commit ------------------------------------------------------------------


def one_connection(db: Postgres, driver: str) -> dict[str, Any]:
    """An engine that blocks for ever when somebody asks for a second connection."""
    return {"url": db.dsn(f"postgresql+{driver}"), "pool_size": 1, "max_overflow": 0, "pool_timeout": 20}


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("adds", [False, True], ids=["store", "add"])
def test_a_session_wakes_the_relay(db: Postgres, listener: Listener, adds: bool) -> None:
    outbox = Outbox()
    engine = create_engine(**one_connection(db, "psycopg"))
    put = outbox.add if adds else outbox.store
    with Session(engine) as session:
        put(placed(), session)
        session.rollback()
        session.commit()
        assert listener.heard() == 0, "of a rollback"
        put(placed(), session)
        with session.begin_nested():
            put(placed(), session)
        inner = session.begin_nested()
        put(placed(), session)
        inner.rollback()
        assert listener.heard() == 0, "of a savepoint"
        session.commit()
        assert listener.heard() == 1
        session.commit()
        assert listener.heard() == 0, "left over"
    assert len(db.events()) == 2
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    engine.dispose()


@pytest.mark.usefixtures("always")
async def test_an_async_session_wakes_the_relay(db: Postgres, listener: Listener) -> None:
    outbox = Outbox()
    engine = create_async_engine(**one_connection(db, "asyncpg"))
    async with AsyncSession(engine) as session, session.begin():
        await outbox.store_async(placed(), session)
    assert listener.heard() == 1
    await engine.dispose()


@pytest.mark.usefixtures("always")
def test_a_session_in_somebody_elses_transaction(db: Postgres, listener: Listener) -> None:
    outbox = Outbox()
    engine = create_engine(**one_connection(db, "psycopg"))
    with engine.connect() as connection, connection.begin():
        with Session(connection) as session, session.begin():
            outbox.store(placed(), session)
        assert db.events() == [], "committed"
    assert listener.heard() == 0
    engine.dispose()


@pytest.mark.usefixtures("always")
def test_what_goes_wrong_with_it_is_not_the_commits(
    db: Postgres, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = Outbox()
    engine = create_engine(**one_connection(db, "psycopg"))
    with Session(engine) as session:
        with monkeypatch.context() as patch:
            patch.setattr("polybus.outbox._commits.text", lambda _: text("SELECT 1 / 0"))
            outbox.store(placed(), session)
            session.commit()
        assert (len(db.events()), listener.heard()) == (1, 0)
        outbox.store(placed(), session)
        session.commit()
    assert (len(db.events()), listener.heard()) == (2, 1)
    engine.dispose()


# ---- psycopg's pipelines, where the server's answer comes later --------------------------------------------------


def test_store_in_a_pipeline(db: Postgres) -> None:
    outbox = Outbox()
    event = placed()
    with psycopg.connect(db.dsn("postgresql")) as connection:
        with connection.pipeline():
            connection.execute("INSERT INTO orders (id) VALUES ('o-1')")
            assert outbox.store(event, connection) is True
            assert outbox.store(event, connection) is False
            assert outbox.store([event, placed()], connection) == [False, True]
            with inbox.once(connection, event, consumer="billing") as first:
                assert first
            with inbox.once(connection, event, consumer="billing") as first:
                assert not first
        connection.commit()
    assert len(db.events()) == 2


async def test_store_in_an_async_pipeline(db: Postgres) -> None:
    outbox = Outbox()
    event = placed()
    async with await psycopg.AsyncConnection.connect(db.dsn("postgresql")) as connection:
        async with connection.pipeline():
            assert await outbox.store_async(event, connection) is True
            assert await outbox.store_async(event, connection) is False
            async with inbox.once(connection, event, consumer="billing") as first:
                assert first
            with pytest.raises(ZeroDivisionError):
                async with inbox.once(connection, event, consumer="mail") as first:
                    raise ZeroDivisionError  # takes the mark back
            async with inbox.once(connection, event, consumer="mail") as first:
                assert first
        await connection.commit()
    assert len(db.events()) == 1
