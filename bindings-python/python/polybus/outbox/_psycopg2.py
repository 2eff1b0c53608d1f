"""psycopg2."""

from __future__ import annotations

from typing import Any


class Psycopg2:
    """A connection of psycopg2."""

    dialect = "postgres"
    style = "%s"
    counts = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def in_transaction(self) -> bool:
        # Without autocommit the first statement begins a transaction.
        return not self.connection.autocommit or self.connection.info.transaction_status != 0

    def run(self, sql: str, params: Any) -> list[Any]:
        from psycopg2.extensions import cursor as plain  # the connection's own may give rows of another shape

        with self.connection.cursor(cursor_factory=plain) as cursor:
            cursor.execute(sql, params)
            return [row[0] for row in cursor.fetchall()] if cursor.description else []

    def change(self, sql: str, params: Any) -> int:
        from psycopg2.extensions import cursor as plain

        with self.connection.cursor(cursor_factory=plain) as cursor:
            cursor.execute(sql, params)
            return int(cursor.rowcount)

    def is_open(self) -> bool:
        return bool(self.connection.info.transaction_status != 0)

    def commit(self) -> None:
        if not self.connection.autocommit:
            self.connection.commit()


def adapt(session: Any) -> Psycopg2 | None:
    """A driver for a connection; `None` for anything else, as a cursor or a pool."""
    from psycopg2.extensions import connection

    return Psycopg2(session) if isinstance(session, connection) else None
