"""Each driver that the outbox knows, behind one set of verbs, on a database of the test's own.

A test says `await play.begin()`, `await play.store(event)`, `await play.rollback()`; drivers that block run in a thread
of their own, as they do in an application.
"""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pymysql

from database_server import DatabaseServer
from polybus import Event
from polybus.outbox import Inbox, Outbox


class Database:
    """A database with the outbox, the inbox and a table `orders(id)`, and a connection to look at it."""

    dialect: str

    def __init__(self, server: DatabaseServer | None, folder: Path) -> None:
        self.name = f"test_{uuid.uuid4().hex}"
        self.port = server.port if server else 0
        self.path = folder / f"{self.name}.db"
        self.make()
        self.query("CREATE TABLE orders (id VARCHAR(100) PRIMARY KEY)")

    def reset(self) -> None:
        """As a new one: to make one anew takes most of a test's time."""
        for statement in [*Outbox().ddl(self.dialect), *Inbox().ddl(self.dialect)]:
            self.query(statement)
        for table in ("polybus_outbox", "polybus_inbox", "orders"):
            self.query(f"DELETE FROM {table}")

    def make(self) -> None:
        raise NotImplementedError

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def close(self) -> None:
        self.connection.close()

    def waits(self) -> bool:
        """Whether somebody waits for a lock."""
        raise NotImplementedError

    connection: Any

    def events(self) -> list[Event]:
        rows = self.query("SELECT event FROM polybus_outbox ORDER BY seq")
        return [Event._from_wire(wire.encode()) for (wire,) in rows]

    def orders(self) -> list[str]:
        return [row[0] for row in self.query("SELECT id FROM orders ORDER BY id")]

    def marks(self) -> list[tuple[str, str]]:
        return self.query("SELECT consumer, event_id FROM polybus_inbox ORDER BY consumer, event_id")


class Postgres(Database):
    dialect = "postgres"

    def dsn(self, scheme: str) -> str:
        return f"{scheme}://postgres@127.0.0.1:{self.port}/{self.name}"

    def make(self) -> None:
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {self.name} TEMPLATE template0")
        self.connection = psycopg.connect(self.dsn("postgresql"), autocommit=True)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        cursor = self.connection.execute(sql)
        return cursor.fetchall() if cursor.description else []

    def waits(self) -> bool:
        return bool(
            self.query(f"SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = '{self.name}'")
        )


class Mysql(Database):
    dialect = "mysql"

    def make(self) -> None:
        self.connection = pymysql.connect(host="127.0.0.1", port=self.port, user="root", autocommit=True)
        self.query(f"CREATE DATABASE {self.name}")
        self.query(f"USE {self.name}")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())

    def waits(self) -> bool:
        # Not from information_schema.innodb_trx, which is not read anew while somebody asks more often than in 0.1 s.
        return self.query("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")[0][1] != "0"


class Sqlite(Database):
    dialect = "sqlite"

    def make(self) -> None:
        self.connection = sqlite3.connect(self.path, isolation_level=None)

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql).fetchall()

    def waits(self) -> bool:
        return True  # nobody can tell


class Driver:
    """One connection of one driver. Verbs that a driver has no better way for are SQL."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.outbox = Outbox(service="shop")
        self.inbox = Inbox()
        self.session: Any = None

    def open(self) -> None: ...
    def begin(self) -> None: ...
    def insert(self, order: str) -> None:
        self.execute(f"INSERT INTO orders (id) VALUES ('{order}')")

    def execute(self, sql: str) -> None: ...
    def savepoint(self) -> None:
        self.execute("SAVEPOINT s")

    def rollback_to(self) -> None:
        self.execute("ROLLBACK TO SAVEPOINT s")

    def commit(self) -> None:
        self.session.commit()

    def rollback(self) -> None:
        self.session.rollback()

    def close(self) -> None:
        self.session.close()

    def store(self, event: Any, **options: Any) -> Any:
        return self.outbox.store(event, self.session, **options)

    def once(self, event: Any, effect: Callable[[], None] | None = None, **options: Any) -> bool:
        with self.inbox.once(self.session, event, **{"consumer": "billing", **options}) as first:
            if first and effect:
                effect()
            return first

    def notify(self) -> None:
        self.outbox.notify(self.session)

    def purge(self, **options: Any) -> int:
        return self.inbox.purge(self.session, **options)

    def autocommit(self) -> None:
        """From now on each statement commits by itself."""
        raise NotImplementedError


class AsyncDriver(Driver):
    async def insert(self, order: str) -> None:
        await self.execute(f"INSERT INTO orders (id) VALUES ('{order}')")

    async def savepoint(self) -> None:
        await self.execute("SAVEPOINT s")

    async def rollback_to(self) -> None:
        await self.execute("ROLLBACK TO SAVEPOINT s")

    async def commit(self) -> None:
        await self.session.commit()

    async def rollback(self) -> None:
        await self.session.rollback()

    async def close(self) -> None:
        await self.session.close()

    async def store(self, event: Any, **options: Any) -> Any:
        return await self.outbox.store_async(event, self.session, **options)

    async def once(self, event: Any, effect: Callable[[], None] | None = None, **options: Any) -> bool:
        async with self.inbox.once(self.session, event, **{"consumer": "billing", **options}) as first:
            if first and effect:
                effect()
            return first

    async def notify(self) -> None:
        await self.outbox.notify_async(self.session)

    async def purge(self, **options: Any) -> int:
        return await self.inbox.purge_async(self.session, **options)


# ---- PostgreSQL's own --------------------------------------------------------------------------------------------


class Psycopg(Driver):
    def open(self) -> None:
        # Rows of another shape than usual must not matter.
        self.session = psycopg.connect(self.database.dsn("postgresql"), row_factory=psycopg.rows.dict_row)

    def execute(self, sql: str) -> None:
        self.session.execute(sql)

    def autocommit(self) -> None:
        self.session.autocommit = True


class PsycopgBlock(Psycopg):
    """With autocommit, and the transactions that psycopg makes of blocks."""

    def open(self) -> None:
        super().open()
        self.session.autocommit = True

    def begin(self) -> None:
        self.blocks = [self.session.transaction()]
        self.blocks[0].__enter__()

    def savepoint(self) -> None:
        self.blocks.append(self.session.transaction())
        self.blocks[-1].__enter__()

    def rollback_to(self) -> None:
        error = psycopg.Rollback()
        self.blocks.pop().__exit__(type(error), error, None)

    def commit(self) -> None:
        self.blocks.pop().__exit__(None, None, None)

    rollback = rollback_to

    def autocommit(self) -> None: ...


class PsycopgAsync(AsyncDriver):
    async def open(self) -> None:
        self.session = await psycopg.AsyncConnection.connect(
            self.database.dsn("postgresql"), cursor_factory=psycopg.AsyncRawCursor
        )

    async def execute(self, sql: str) -> None:
        await self.session.execute(sql)

    async def autocommit(self) -> None:
        await self.session.set_autocommit(True)


class Psycopg2(Driver):
    def open(self) -> None:
        import psycopg2
        import psycopg2.extras

        self.session = psycopg2.connect(self.database.dsn("postgresql"), cursor_factory=psycopg2.extras.RealDictCursor)

    def execute(self, sql: str) -> None:
        with self.session.cursor() as cursor:
            cursor.execute(sql)

    def autocommit(self) -> None:
        self.session.autocommit = True


class Asyncpg(AsyncDriver):
    async def open(self) -> None:
        import asyncpg

        self.session = await asyncpg.connect(self.database.dsn("postgresql"))

    async def begin(self) -> None:
        self.blocks = [self.session.transaction()]
        await self.blocks[0].start()

    async def execute(self, sql: str) -> None:
        await self.session.execute(sql)

    async def savepoint(self) -> None:
        self.blocks.append(self.session.transaction())
        await self.blocks[-1].start()

    async def rollback_to(self) -> None:
        await self.blocks.pop().rollback()

    async def commit(self) -> None:
        await self.blocks.pop().commit()

    rollback = rollback_to

    async def autocommit(self) -> None: ...


class AsyncpgPool(Asyncpg):
    """What a pool hands out."""

    async def open(self) -> None:
        import asyncpg

        self.pool = await asyncpg.create_pool(self.database.dsn("postgresql"), min_size=1, max_size=1)
        self.session = await self.pool.acquire()

    async def close(self) -> None:
        await self.pool.release(self.session)
        await self.pool.close()


# ---- the others' own ---------------------------------------------------------------------------------------------


class Sqlite3(Driver):
    def open(self) -> None:
        self.session = sqlite3.connect(self.database.path)
        self.session.row_factory = lambda cursor, row: dict(zip([d[0] for d in cursor.description], row, strict=True))

    def execute(self, sql: str) -> None:
        self.session.execute(sql)

    def autocommit(self) -> None:
        self.session.isolation_level = None


class Sqlite3Begin(Sqlite3):
    """Where the application begins transactions itself."""

    def open(self) -> None:
        super().open()
        self.session.isolation_level = None

    def begin(self) -> None:
        self.execute("BEGIN IMMEDIATE")

    def autocommit(self) -> None: ...


class AioSqlite(AsyncDriver):
    async def open(self) -> None:
        import aiosqlite

        self.session = await aiosqlite.connect(self.database.path)
        self.session.row_factory = sqlite3.Row

    async def execute(self, sql: str) -> None:
        await self.session.execute(sql)

    async def autocommit(self) -> None:
        import aiosqlite

        await self.session.close()
        self.session = await aiosqlite.connect(self.database.path, isolation_level=None)


class PyMysql(Driver):
    def open(self) -> None:
        self.session = pymysql.connect(
            host="127.0.0.1",
            port=self.database.port,
            user="root",
            database=self.database.name,
            cursorclass=pymysql.cursors.DictCursor,
        )

    def execute(self, sql: str) -> None:
        with self.session.cursor() as cursor:
            cursor.execute(sql)

    def autocommit(self) -> None:
        self.session.autocommit(True)


class PyMysqlFound(PyMysql):
    """Counts rows that matched instead of rows that changed, and begins transactions itself."""

    def open(self) -> None:
        from pymysql.constants.CLIENT import FOUND_ROWS

        self.session = pymysql.connect(
            host="127.0.0.1",
            port=self.database.port,
            user="root",
            database=self.database.name,
            client_flag=FOUND_ROWS,
            autocommit=True,
        )

    def begin(self) -> None:
        self.session.begin()

    def autocommit(self) -> None: ...


# ---- SQLAlchemy --------------------------------------------------------------------------------------------------


class Alchemy(Driver):
    """A Session. Its engine is `make` of the database."""

    def url(self) -> str:
        match self.database.dialect:
            case "postgres":
                return str(self.database.dsn("postgresql+psycopg"))
            case "mysql":
                return f"mysql+pymysql://root@127.0.0.1:{self.database.port}/{self.database.name}"
            case _:
                return f"sqlite:///{self.database.path}"

    def open(self) -> None:
        from sqlalchemy import create_engine
        from sqlalchemy.orm import Session

        self.engine = create_engine(self.url())
        self.session = Session(self.engine)

    def execute(self, sql: str) -> None:
        from sqlalchemy import text

        self.session.execute(text(sql))

    def savepoint(self) -> None:
        self.nested = self.session.begin_nested()

    def rollback_to(self) -> None:
        self.nested.rollback()

    def close(self) -> None:
        self.session.close()
        self.engine.dispose()

    def autocommit(self) -> None:
        from sqlalchemy.orm import Session

        self.session.close()
        self.session = Session(self.engine.execution_options(isolation_level="AUTOCOMMIT"))


class AlchemyScoped(Alchemy):
    def open(self) -> None:
        from sqlalchemy import create_engine
        from sqlalchemy.orm import scoped_session, sessionmaker

        self.engine = create_engine(self.url().replace("+psycopg", "+psycopg2"))
        self.session = scoped_session(sessionmaker(self.engine))

    def close(self) -> None:
        self.session.remove()
        self.engine.dispose()


class AlchemyConnection(Alchemy):
    def open(self) -> None:
        from sqlalchemy import create_engine

        self.engine = create_engine(self.url())
        self.session = self.engine.connect()

    def autocommit(self) -> None:
        from sqlalchemy import create_engine

        self.close()
        self.engine = create_engine(self.url(), isolation_level="AUTOCOMMIT")
        self.session = self.engine.connect()


class AlchemyAsync(AsyncDriver):
    def url(self) -> str:
        if self.database.dialect == "postgres":
            return str(self.database.dsn("postgresql+asyncpg"))
        return f"sqlite+aiosqlite:///{self.database.path}"

    async def open(self) -> None:
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

        self.engine = create_async_engine(self.url())
        self.session = AsyncSession(self.engine)

    async def execute(self, sql: str) -> None:
        from sqlalchemy import text

        await self.session.execute(text(sql))

    async def savepoint(self) -> None:
        self.nested = await self.session.begin_nested()

    async def rollback_to(self) -> None:
        await self.nested.rollback()

    async def close(self) -> None:
        await self.session.close()
        await self.engine.dispose()

    async def autocommit(self) -> None:
        from sqlalchemy.ext.asyncio import AsyncSession

        await self.session.close()
        self.session = AsyncSession(self.engine.execution_options(isolation_level="AUTOCOMMIT"))


class AlchemyAsyncConnection(AlchemyAsync):
    async def open(self) -> None:
        from sqlalchemy.ext.asyncio import create_async_engine

        self.engine = create_async_engine(self.url().replace("+asyncpg", "+psycopg"))
        self.session = await self.engine.connect()

    async def autocommit(self) -> None:
        await self.session.close()
        self.session = await self.engine.execution_options(isolation_level="AUTOCOMMIT").connect()


# ---- Django ------------------------------------------------------------------------------------------------------


class Django(Driver):
    """Handed in as the connection."""

    def open(self) -> None:
        import django
        from django.conf import settings

        if not settings.configured:
            pymysql.install_as_MySQLdb()
            settings.configure(DATABASES={"default": {}}, USE_TZ=True)
            django.setup()
        from django.db import connections, transaction

        self.transaction = transaction
        self.alias = self.database.name
        engine = {"postgres": "postgresql", "mysql": "mysql", "sqlite": "sqlite3"}[self.database.dialect]
        server = {"HOST": "127.0.0.1", "PORT": self.database.port}
        place = {
            "postgres": {"NAME": self.database.name, "USER": "postgres", **server},
            "mysql": {"NAME": self.database.name, "USER": "root", **server},
            "sqlite": {"NAME": str(self.database.path)},
        }[self.database.dialect]
        configured = connections.configure_settings(
            {"default": {}, self.alias: {"ENGINE": f"django.db.backends.{engine}", **place}}
        )
        connections.settings[self.alias] = configured[self.alias]
        self.connections = connections
        self.session = connections[self.alias]
        self.blocks: list[Any] = []

    def begin(self) -> None:
        self.blocks.append(self.transaction.atomic(using=self.alias))
        self.blocks[-1].__enter__()

    savepoint = begin

    def execute(self, sql: str) -> None:
        with self.connections[self.alias].cursor() as cursor:
            cursor.execute(sql)

    def commit(self) -> None:
        self.blocks.pop().__exit__(None, None, None)

    def rollback_to(self) -> None:
        error = RuntimeError("roll back")
        self.blocks.pop().__exit__(type(error), error, None)

    rollback = rollback_to

    def close(self) -> None:
        self.connections[self.alias].close()

    def autocommit(self) -> None: ...


class DjangoAlias(Django):
    """Handed in by the connection's name."""

    def open(self) -> None:
        super().open()
        self.session = self.alias


DRIVERS: dict[str, list[type[Driver]]] = {
    "postgres": [
        Psycopg,
        PsycopgBlock,
        PsycopgAsync,
        Psycopg2,
        Asyncpg,
        AsyncpgPool,
        Alchemy,
        AlchemyScoped,
        AlchemyConnection,
        AlchemyAsync,
        AlchemyAsyncConnection,
        Django,
        DjangoAlias,
    ],
    "sqlite": [Sqlite3, Sqlite3Begin, AioSqlite, Alchemy, AlchemyAsync, Django],
    "mysql": [PyMysql, PyMysqlFound, Alchemy, Django],
}
DATABASES: dict[str, type[Database]] = {"postgres": Postgres, "sqlite": Sqlite, "mysql": Mysql}


class Play:
    """A driver's verbs, each to be awaited."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._thread = ThreadPoolExecutor(1)

    async def __call__(self, verb: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if inspect.iscoroutinefunction(verb):
            return await verb(*args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: verb(*args, **options))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        verb = getattr(self.driver, name)

        async def call(*args: Any, **options: Any) -> Any:
            return await self(verb, *args, **options)

        return call

    async def end(self) -> None:
        with suppress(Exception):  # a transaction that a failed test left open
            await self(self.driver.close)
        self._thread.shutdown()


@contextmanager
def database(dialect: str, server: DatabaseServer | None, folder: Path) -> Iterator[Database]:
    made = DATABASES[dialect](server, folder)
    made.reset()
    try:
        yield made
    finally:
        made.close()
