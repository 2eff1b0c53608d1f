"""PyMySQL."""

from __future__ import annotations

from typing import Any


class PyMySql:
    """A `pymysql.Connection`."""

    dialect = "mysql"
    style = "%s"

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def in_transaction(self) -> bool:
        from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS

        # Without autocommit the first statement begins a transaction.
        return not self.connection.get_autocommit() or bool(self.connection.server_status & SERVER_STATUS_IN_TRANS)

    def run(self, sql: str, params: Any) -> list[Any]:
        from pymysql.cursors import Cursor  # the connection's own may give rows of another shape

        with self.connection.cursor(Cursor) as cursor:
            cursor.execute(sql, params)
            return [row[0] for row in cursor.fetchall()] if cursor.description else []


def adapt(session: Any) -> PyMySql | None:
    """A driver for a connection; `None` for anything else, as a cursor."""
    return PyMySql(session) if hasattr(session, "server_status") and hasattr(session, "get_autocommit") else None
