"""Django's connections, of any database that both know."""

from __future__ import annotations

from typing import Any

from polybus.errors import InvalidConfig

DIALECTS = {"postgresql": "postgres", "sqlite": "sqlite", "mysql": "mysql"}


class Django:
    """`connections[alias]`."""

    style = "%s"  # Django rewrites it for SQLite

    def __init__(self, connection: Any, dialect: str) -> None:
        self.connection = connection
        self.dialect = dialect
        self.counts = dialect == "postgres"

    def in_transaction(self) -> bool:
        return bool(self.connection.in_atomic_block or not self.connection.get_autocommit())

    def run(self, sql: str, params: Any) -> list[Any]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            return [row[0] for row in cursor.fetchall()] if cursor.description else []

    def change(self, sql: str, params: Any) -> int:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, params)
            return int(cursor.rowcount)

    def is_open(self) -> bool:
        return bool(self.connection.in_atomic_block)

    def commit(self) -> None:
        if not self.connection.get_autocommit():
            self.connection.commit()


def adapt(session: Any) -> Django | None:
    """A driver for a connection or the name of one; `None` for anything else, as a model or a cursor."""
    if isinstance(session, str):
        if "://" in session:
            return None  # a URL, perhaps with a password, which Django would show
        from django.db import connections  # fails with Django's own error where there is none

        session = connections[session]
    if not hasattr(session, "vendor") or not hasattr(session, "in_atomic_block"):
        return None
    dialect = DIALECTS.get(session.vendor)
    if dialect is None:
        raise InvalidConfig(
            f"Django's {session.vendor} is not among the databases of the outbox: {', '.join(DIALECTS)}"
        )
    return Django(session, dialect)
