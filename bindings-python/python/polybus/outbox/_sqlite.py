"""sqlite3 and aiosqlite."""

from __future__ import annotations

from typing import Any


class Sqlite:
    """A `sqlite3.Connection`."""

    dialect = "sqlite"
    style = "?"

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def in_transaction(self) -> bool:
        return _open(self.connection, getattr(self.connection, "autocommit", -1))

    def run(self, sql: str, params: Any) -> list[Any]:
        cursor = self.connection.cursor()
        cursor.row_factory = None  # the connection's own may give rows of another shape
        try:
            return [row[0] for row in cursor.execute(sql, params).fetchall()]
        finally:
            cursor.close()


class AioSqlite:
    """An `aiosqlite.Connection`."""

    dialect = "sqlite"
    style = "?"
    awaited = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def in_transaction(self) -> bool:
        return _open(self.connection, getattr(self.connection._conn, "autocommit", -1))

    async def run(self, sql: str, params: Any) -> list[Any]:
        async with self.connection.cursor() as cursor:
            cursor.row_factory = None
            await cursor.execute(sql, params)
            return [row[0] for row in await cursor.fetchall()]


def _open(connection: Any, autocommit: int) -> bool:
    # Python begins a transaction before an INSERT, unless it was told not to: by isolation_level=None, or since 3.12 by
    # autocommit=True, which makes the former mean nothing.
    begins = connection.isolation_level is not None if autocommit == -1 else not autocommit
    return bool(begins or connection.in_transaction)


def adapt(session: Any) -> Sqlite | AioSqlite | None:
    """A driver for a connection; `None` for anything else, as a cursor."""
    if not hasattr(session, "in_transaction") or not hasattr(session, "isolation_level"):
        return None
    return AioSqlite(session) if hasattr(session, "_conn") else Sqlite(session)
