"""asyncpg."""

from __future__ import annotations

from typing import Any


class Asyncpg:
    """An `asyncpg.Connection`, or what a pool hands out."""

    dialect = "postgres"
    style = "$"
    awaited = True
    counts = True

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    async def in_transaction(self) -> bool:
        return bool(self.connection.is_in_transaction())

    async def run(self, sql: str, params: Any) -> list[Any]:
        return [row[0] for row in await self.connection.fetch(sql, *params)]

    async def change(self, sql: str, params: Any) -> int:
        status: str = await self.connection.execute(sql, *params)  # INSERT 0 1
        return int(status.rpartition(" ")[2])

    def is_open(self) -> bool:
        return bool(self.connection.is_in_transaction())

    async def commit(self) -> None:
        """It begins none by itself."""


def adapt(session: Any) -> Asyncpg | None:
    """A driver for a connection; `None` for anything else, as a pool, which would take another connection."""
    return Asyncpg(session) if hasattr(session, "is_in_transaction") else None
