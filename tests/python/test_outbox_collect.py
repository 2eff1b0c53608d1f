"""Events that a SQLAlchemy session takes along to its commit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from polybus import Event, InvalidConfig
from polybus.outbox import Outbox

outbox = Outbox(service="shop")


def placed(number: int) -> Event:
    return Event.create("order.placed", {"number": number})


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path}/app.db")
    with engine.begin() as connection:
        for statement in outbox.ddl("sqlite"):
            connection.execute(text(statement))
    # As SQLAlchemy's own documentation says: without it the driver begins no transaction before a savepoint.
    event.listen(engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    yield engine
    engine.dispose()


def numbers(engine: Engine) -> list[int]:
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT event FROM polybus_outbox ORDER BY seq")).scalars()
        return [Event._from_wire(row.encode()).payload["number"] for row in rows]


def test_a_commit_stores_all_in_one_statement(engine: Engine) -> None:
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    with Session(engine) as session:
        outbox.add(placed(1), session)
        outbox.add([placed(2), placed(3)], session)
        assert numbers(engine) == []
        session.commit()
        assert numbers(engine) == [1, 2, 3]
        assert sum("INSERT" in statement for statement in statements) == 1
        session.commit()  # nothing is left over
        outbox.add(placed(4), session)
        session.commit()
    assert numbers(engine) == [1, 2, 3, 4]


def test_a_rollback_forgets(engine: Engine) -> None:
    with Session(engine) as session:
        outbox.add(placed(1), session)
        session.rollback()
        assert session.info["polybus.outbox"]._waiting == []  # a session may live for long
        session.commit()
        outbox.add(placed(2), session)
    with Session(engine) as session, session.begin():
        outbox.add(placed(3), session)
    with Session(engine) as session:
        transaction = session.begin()
        outbox.add(placed(4), session)
        transaction.rollback()
    assert numbers(engine) == [3]


def test_savepoints_take_their_events_with_them(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        outbox.add(placed(1), session)
        inner = session.begin_nested()
        outbox.add(placed(2), session)
        inner.rollback()
        with session.begin_nested():
            outbox.add(placed(3), session)
            deeper = session.begin_nested()
            outbox.add(placed(4), session)
            deeper.commit()
        outbox.add(placed(6), session)  # before the savepoint, so its rollback does not concern this one
        outer = session.begin_nested()
        with session.begin_nested():
            outbox.add(placed(5), session)
        outer.rollback()  # and with it what was released inside
    assert sorted(numbers(engine)) == [1, 3, 4, 6]


def test_scoped_sessions(engine: Engine) -> None:
    sessions = scoped_session(sessionmaker(engine))
    outbox.add(placed(1), sessions)
    sessions.commit()
    sessions.remove()
    assert numbers(engine) == [1]


async def test_async_sessions(engine: Engine) -> None:
    path = engine.url.database
    other = create_async_engine(f"sqlite+aiosqlite:///{path}")
    async with AsyncSession(other) as session:
        async with session.begin():
            outbox.add(placed(1), session)
        outbox.add(placed(2), session)
        await session.rollback()
        outbox.add(placed(3), session)
        await session.commit()
    await other.dispose()
    assert numbers(engine) == [1, 3]


def test_bad_input(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(InvalidConfig, match=r"add\(\) got a sqlalchemy.*Session"):
        outbox.add(placed(1), connection)
    with Session(engine) as session:
        with pytest.raises(TypeError, match="stores events, not dict"):
            outbox.add([{}], session)  # type: ignore[list-item]
        with session.begin(), pytest.raises(InvalidConfig, match="jobs is missing"):  # noqa: PT012
            Outbox(table="jobs").add(placed(1), session)
            session.commit()
