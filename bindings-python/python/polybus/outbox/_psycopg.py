"""psycopg 3, sync and async."""

from __future__ import annotations

from typing import Any


class Psycopg:
    """A `psycopg.Connection`."""

    dialect = "postgres"
    style = "%s"

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def in_transaction(self) -> bool:
        return _open(self.connection)

    def run(self, sql: str, params: Any) -> list[Any]:
        # Not the connection's own cursor: it may give rows of another shape, or read other placeholders.
        from psycopg import Cursor
        from psycopg.rows import tuple_row

        with Cursor(self.connection, row_factory=tuple_row) as cursor:
            cursor.execute(sql.encode(), params)
            return [row[0] for row in cursor.fetchall()] if cursor.description else []


class AsyncPsycopg:
    """A `psycopg.AsyncConnection`."""

    dialect = "postgres"
    style = "%s"
    awaited = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def in_transaction(self) -> bool:
        return _open(self.connection)

    async def run(self, sql: str, params: Any) -> list[Any]:
        from psycopg import AsyncCursor
        from psycopg.rows import tuple_row

        async with AsyncCursor(self.connection, row_factory=tuple_row) as cursor:
            await cursor.execute(sql.encode(), params)
            return [row[0] for row in await cursor.fetchall()] if cursor.description else []


def _open(connection: Any) -> bool:
    # Without autocommit the first statement begins a transaction. In a pipeline the server has not answered yet.
    return not connection.autocommit or connection.info.transaction_status != 0


def adapt(session: Any) -> Psycopg | AsyncPsycopg | None:
    """A driver for a connection; `None` for anything else, as a cursor or a pool."""
    from psycopg import AsyncConnection, Connection

    if isinstance(session, AsyncConnection):
        return AsyncPsycopg(session)
    return Psycopg(session) if isinstance(session, Connection) else None
