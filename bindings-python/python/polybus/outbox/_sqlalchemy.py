"""SQLAlchemy 2, sync and async."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from sqlalchemy import TextClause, text  # whoever hands in a session has imported it

from polybus._native import NativeOutbox
from polybus.errors import InvalidConfig
from polybus.outbox._commits import wake_after

DIALECTS = {"postgresql": "postgres", "sqlite": "sqlite", "mysql": "mysql", "mariadb": "mysql"}


class Alchemy:
    """A `Session` or a `Connection`."""

    style = ":name"

    def __init__(self, session: Any, bind: Any) -> None:
        self.session = session
        self.dialect = _dialect(bind)

    def in_transaction(self) -> bool:
        # A session begins a transaction by itself, unless its connection commits each statement.
        return not _autocommit(self.session.connection() if _is_session(self.session) else self.session)

    def run(self, sql: str, params: Any) -> list[Any]:
        result = self.session.execute(_text(sql), params)
        return list(result.scalars().all()) if result.returns_rows else []

    def wake_after(self, outbox: NativeOutbox) -> None:
        if _is_session(self.session):
            wake_after(self.session, outbox, self.style)

    def is_open(self) -> bool:
        return bool(self.session.in_transaction())

    def commit(self) -> None:
        self.session.commit()


class AsyncAlchemy:
    """An `AsyncSession` or an `AsyncConnection`."""

    style = ":name"
    awaited = True

    def __init__(self, session: Any, bind: Any) -> None:
        self.session = session
        self.dialect = _dialect(bind)

    async def in_transaction(self) -> bool:
        connection = await self.session.connection() if _is_session(self.session) else self.session
        return not _autocommit(connection.sync_connection)

    async def run(self, sql: str, params: Any) -> list[Any]:
        result = await self.session.execute(_text(sql), params)
        return list(result.scalars().all()) if result.returns_rows else []

    def wake_after(self, outbox: NativeOutbox) -> None:
        if _is_session(self.session):
            wake_after(self.session.sync_session, outbox, self.style)

    def is_open(self) -> bool:
        return bool(self.session.in_transaction())

    async def commit(self) -> None:
        await self.session.commit()


@lru_cache(maxsize=64)
def _known(sql: str) -> TextClause:
    return text(sql)


def _text(sql: str) -> TextClause:
    # To look for its placeholders takes as long as all else that is done for one event. Of many: who knows how many.
    return _known(sql) if len(sql) < 1000 else text(sql)


def _is_session(session: Any) -> bool:
    return hasattr(session, "get_bind")


def _autocommit(connection: Any) -> bool:
    level = connection.get_execution_options().get("isolation_level")
    if level is None:  # then what the engine was made with
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    return bool(level == "AUTOCOMMIT")


def _dialect(bind: Any) -> str:
    dialect = DIALECTS.get(bind.dialect.name)
    if dialect is None:
        known = ", ".join(DIALECTS)
        raise InvalidConfig(f"SQLAlchemy's {bind.dialect.name} is not among the databases of the outbox: {known}")
    return dialect


def adapt(session: Any) -> Alchemy | AsyncAlchemy | None:
    """A driver for a session or a connection; `None` for anything else, as an engine or a sessionmaker."""
    if hasattr(session, "session_factory") and hasattr(session, "registry"):
        session = session.registry()  # of a scoped session: the one of this thread or task
    if not callable(getattr(session, "in_transaction", None)):
        return None
    bind = session.get_bind() if _is_session(session) else session
    # Both kinds of async objects, and no others, have the sync one inside.
    if hasattr(session, "sync_session") or hasattr(session, "sync_connection"):
        return AsyncAlchemy(session, bind)
    return Alchemy(session, bind)
