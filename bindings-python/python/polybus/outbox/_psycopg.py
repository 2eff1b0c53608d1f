"""psycopg 3, sync and async."""

from __future__ import annotations

from typing import Any

# Whoever hands in a connection has imported it.
from psycopg import AsyncConnection, AsyncCursor, Connection, Cursor, ProgrammingError
from psycopg.rows import tuple_row


class Psycopg:
    """A `psycopg.Connection`."""

    dialect = "postgres"
    style = "%s"

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.counts = not _pipelined(connection)

    def in_transaction(self) -> bool:
        return _open(self.connection)

    # Not the connection's own cursor: it may give rows of another shape, or read other placeholders.

    def run(self, sql: str, params: Any) -> list[Any]:
        with Cursor(self.connection, row_factory=tuple_row) as cursor:
            cursor.execute(sql.encode(), params)
            if not cursor.description and not _pipelined(self.connection):
                return []
            try:
                return [row[0] for row in cursor.fetchall()]
            except ProgrammingError:
                if _has_no_rows(cursor):
                    return []
                raise

    def change(self, sql: str, params: Any) -> int:
        cursor = Cursor(self.connection, row_factory=tuple_row)
        cursor.execute(sql.encode(), params)
        return cursor.rowcount

    def is_open(self) -> bool:
        return bool(self.connection.info.transaction_status != 0)

    def commit(self) -> None:
        if not self.connection.autocommit:
            self.connection.commit()


class AsyncPsycopg:
    """A `psycopg.AsyncConnection`."""

    dialect = "postgres"
    style = "%s"
    awaited = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.counts = not _pipelined(connection)

    async def in_transaction(self) -> bool:
        return _open(self.connection)

    async def run(self, sql: str, params: Any) -> list[Any]:
        async with AsyncCursor(self.connection, row_factory=tuple_row) as cursor:
            await cursor.execute(sql.encode(), params)
            if not cursor.description and not _pipelined(self.connection):
                return []
            try:
                return [row[0] for row in await cursor.fetchall()]
            except ProgrammingError:
                if _has_no_rows(cursor):
                    return []
                raise

    async def change(self, sql: str, params: Any) -> int:
        cursor = AsyncCursor(self.connection, row_factory=tuple_row)
        await cursor.execute(sql.encode(), params)
        return cursor.rowcount

    def is_open(self) -> bool:
        return bool(self.connection.info.transaction_status != 0)

    async def commit(self) -> None:
        if not self.connection.autocommit:
            await self.connection.commit()


def _open(connection: Any) -> bool:
    # Without autocommit the first statement begins a transaction. In a pipeline the server has not answered yet.
    return not connection.autocommit or connection.info.transaction_status != 0


def _pipelined(connection: Any) -> bool:
    # Then only to ask for rows waits for the server's answer: before that there is no number of changed ones.
    return bool(connection.pgconn.pipeline_status)


def _has_no_rows(cursor: Any) -> bool:
    """Whether it was a statement that has none, and not one that failed."""
    return cursor.description is None and cursor.statusmessage is not None


def adapt(session: Any) -> Psycopg | AsyncPsycopg | None:
    """A driver for a connection; `None` for anything else, as a cursor or a pool."""
    if isinstance(session, AsyncConnection):
        return AsyncPsycopg(session)
    return Psycopg(session) if isinstance(session, Connection) else None
