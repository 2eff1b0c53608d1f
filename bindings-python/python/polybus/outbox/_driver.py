"""How a statement of the core runs on what the user handed in.

Each family of drivers has a file that makes a `Driver` or an `AsyncDriver` of its objects. What is to be run comes as a
generator that yields statements and is sent the first column of their rows; so it is written once, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar, cast

from polybus.errors import InvalidConfig

ACCEPTED = (
    "a Django connection or the name of one, a SQLAlchemy Session, Connection, AsyncSession or AsyncConnection, "
    "a connection of psycopg (sync or async), psycopg2, asyncpg, sqlite3, aiosqlite or PyMySQL"
)

# The package of an object's class → the file that knows it.
FAMILIES = {
    "aiosqlite": "_sqlite",
    "asyncpg": "_asyncpg",
    "django": "_django",
    "psycopg": "_psycopg",
    "psycopg2": "_psycopg2",
    "pymysql": "_pymysql",
    "sqlalchemy": "_sqlalchemy",
    "sqlite3": "_sqlite",
}


class Statement(NamedTuple):
    """SQL text, and what its placeholders stand for: a dict for `:name`, a tuple for all others."""

    sql: str
    params: Any


class Driver(Protocol):
    """A connection of a driver that blocks."""

    dialect: str
    style: str

    def in_transaction(self) -> bool:
        """Whether what runs next belongs to a transaction that the user ends."""

    def run(self, sql: str, params: Any) -> list[Any]:
        """Run it, and return the first column of its rows, in the user's transaction."""


class Counting(Driver, Protocol):
    """One whose `counts` is true."""

    counts: bool

    def change(self, sql: str, params: Any) -> int:
        """Run it, and return how many rows it changed: that spares one event the rows that `run` asks for."""


class Notifying(Driver, Protocol):
    """One of PostgreSQL."""

    def is_open(self) -> bool:
        """Whether a transaction is open now, where `in_transaction` counts one that the next statement begins."""

    def commit(self) -> None:
        """Commit what the last statement began by itself, if it did."""


class AsyncDriver(Protocol):
    """The same, to be awaited."""

    dialect: str
    style: str

    async def in_transaction(self) -> bool: ...

    async def run(self, sql: str, params: Any) -> list[Any]: ...


class AsyncCounting(AsyncDriver, Protocol):
    counts: bool

    async def change(self, sql: str, params: Any) -> int: ...


class AsyncNotifying(AsyncDriver, Protocol):
    def is_open(self) -> bool: ...

    async def commit(self) -> None: ...


class Table(Protocol):
    """What the core knows of the table that the statements are for."""

    def check(self, dialect: str, style: str) -> tuple[str, Any]: ...

    def missing(self, dialect: str) -> BaseException: ...

    def denied(self, dialect: str, relaying: bool) -> BaseException: ...

    def read_only(self) -> BaseException: ...


T = TypeVar("T")
Steps: TypeAlias = Generator[tuple[str, Any], list[Any], T]


@lru_cache(maxsize=256)
def _families(cls: type) -> list[Callable[[Any], Driver | AsyncDriver | None]]:
    packages = {each.__module__.partition(".")[0] for each in cls.__mro__}
    files = sorted({FAMILIES[package] for package in packages & FAMILIES.keys()})
    return [import_module(f"polybus.outbox.{file}").adapt for file in files]


def _django() -> list[Callable[[Any], Driver | AsyncDriver | None]]:
    return [import_module("polybus.outbox._django").adapt]


def find(session: Any, call: str) -> Driver | AsyncDriver:
    """The driver of what the user handed in. `InvalidConfig` lists what there is."""
    # By the class that it says it has: instrumentation wraps connections in proxies.
    for adapt in _django() if isinstance(session, str) else _families(session.__class__):
        driver = adapt(session)
        if driver is not None:
            return driver
    kind = f"{session.__class__.__module__}.{session.__class__.__qualname__}"
    raise InvalidConfig(
        f"{call} got a {kind}, which is no open connection that it knows; give {ACCEPTED}; for any other driver run "
        "what outbox.statement(event, style=…) returns"
    )


def sync_driver(session: Any, call: str) -> Driver:
    """A driver that blocks."""
    driver = find(session, call)
    if is_async(driver):
        raise InvalidConfig(f"{call} got {describe(session)}, which is to be awaited: use the async form of this call")
    return cast("Driver", driver)


def async_driver(session: Any, call: str) -> AsyncDriver:
    """A driver to be awaited."""
    driver = find(session, call)
    if is_async(driver):
        return cast("AsyncDriver", driver)
    hint = "use the sync form of this call"
    if type(driver).__module__.endswith("_django"):
        # A transaction of Django belongs to a thread: a call of its own could run in another one.
        hint = "Django has no async transactions: call it inside sync_to_async, together with the atomic block"
    raise InvalidConfig(f"{call} got {describe(session)}, which blocks: {hint}")


def is_async(driver: Driver | AsyncDriver) -> bool:
    """Whether its calls are to be awaited."""
    return bool(getattr(driver, "awaited", False))


def counts(driver: Driver | AsyncDriver) -> bool:
    """Whether it has `change`."""
    return bool(getattr(driver, "counts", False))


def describe(session: Any) -> str:
    """What the user handed in, for a message."""
    return f"a {session.__class__.__module__}.{session.__class__.__qualname__}"


NO_TRANSACTION = (
    "there is no open transaction, so {what} would be committed alone; begin one around it and the change that it "
    "belongs to, or pass allow_autocommit=True"
)


def drive(driver: Driver, steps: Steps[T], table: Table, *, what: str, allow_autocommit: bool) -> T:
    """Run the statements of `steps`, in the transaction that is open."""
    if not allow_autocommit and not driver.in_transaction():
        raise InvalidConfig(NO_TRANSACTION.format(what=what))
    rows: list[Any] | None = None
    try:
        while True:
            statement = next(steps) if rows is None else steps.send(rows)
            rows = driver.run(*statement)
    except StopIteration as end:
        return cast("T", end.value)
    except Exception as error:
        told = explain(error, table, driver.dialect)
        if told is None:
            raise
        raise told from error


def change(driver: Counting, sql: str, params: Any, table: Table, *, what: str, allow_autocommit: bool) -> int:
    """Run one statement, in the transaction that is open, and return how many rows it changed."""
    if not allow_autocommit and not driver.in_transaction():
        raise InvalidConfig(NO_TRANSACTION.format(what=what))
    try:
        return driver.change(sql, params)
    except Exception as error:
        told = explain(error, table, driver.dialect)
        if told is None:
            raise
        raise told from error


async def change_async(
    driver: AsyncCounting, sql: str, params: Any, table: Table, *, what: str, allow_autocommit: bool
) -> int:
    """The same, awaited."""
    if not allow_autocommit and not await driver.in_transaction():
        raise InvalidConfig(NO_TRANSACTION.format(what=what))
    try:
        return await driver.change(sql, params)
    except Exception as error:
        told = explain(error, table, driver.dialect)
        if told is None:
            raise
        raise told from error


async def drive_async(driver: AsyncDriver, steps: Steps[T], table: Table, *, what: str, allow_autocommit: bool) -> T:
    """The same, awaited."""
    if not allow_autocommit and not await driver.in_transaction():
        raise InvalidConfig(NO_TRANSACTION.format(what=what))
    rows: list[Any] | None = None
    try:
        while True:
            # StopIteration cannot leave a coroutine, so it is caught where it is raised.
            try:
                statement = next(steps) if rows is None else steps.send(rows)
            except StopIteration as end:
                return cast("T", end.value)
            rows = await driver.run(*statement)
    except Exception as error:
        told = explain(error, table, driver.dialect)
        if told is None:
            raise
        raise told from error


class Sign(NamedTuple):
    """How drivers say one thing: by PostgreSQL's state, by MySQL's number, in SQLite's words.

    SQLite has one code for every error in a statement's text: only the message tells them apart.
    """

    states: frozenset[str]
    numbers: frozenset[int]
    words: tuple[str, ...]


def before_notify(driver: Notifying | AsyncNotifying) -> None:
    """Refuse to notify where that would be part of the user's transaction."""
    if driver.is_open():
        raise InvalidConfig(
            "notify() got an open transaction: committing writers that notify wait for each other, and a relay that is "
            "woken now finds nothing yet; call it after the commit"
        )


# PostgreSQL: undefined_table, undefined_column, invalid_schema_name. MySQL: the same three.
NO_TABLE = Sign(
    frozenset({"42P01", "42703", "3F000"}),
    frozenset({1146, 1054, 1049}),
    ("no such table", "no such column", "has no column named", "unknown database"),
)
# insufficient_privilege; the same for a database, a table and a column.
DENIED = Sign(frozenset({"42501"}), frozenset({1044, 1142, 1143}), ("attempt to write a readonly database",))
# read_only_sql_transaction; a server, a transaction and an engine that only read.
READ_ONLY = Sign(frozenset({"25006"}), frozenset({1290, 1792, 1836}), ())


def explain(error: BaseException, table: Table, dialect: str, *, relaying: bool = False) -> BaseException | None:
    """What to raise instead of what a driver raised; `None` if that says it well."""
    if _says(error, NO_TABLE):
        return table.missing(dialect)
    if _says(error, DENIED):
        return table.denied(dialect, relaying)
    return table.read_only() if _says(error, READ_ONLY) else None


def _says(error: BaseException | None, sign: Sign) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "sqlstate", None) in sign.states or getattr(error, "pgcode", None) in sign.states:
            return True
        module = type(error).__module__.partition(".")[0]
        if module == "pymysql" and error.args and error.args[0] in sign.numbers:
            return True
        if module == "sqlite3" and any(words in str(error) for words in sign.words):
            return True
        original = getattr(error, "orig", None)  # SQLAlchemy's
        error = original if isinstance(original, BaseException) else error.__cause__
    return False
