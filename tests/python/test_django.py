"""The Django app: migrations, models, `store` and its poke, the command. Each project is a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest

from database_server import MariaServer, PostgresServer
from polybus import Bus

SUPPORT = Path(__file__).resolve().parent.parent / "support"
ENGINES = {"postgres": "postgresql", "sqlite": "sqlite3", "mysql": "mysql"}
SERVERS = {"postgres": PostgresServer, "mysql": MariaServer}


@pytest.fixture(scope="module", params=list(ENGINES))
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Settings of a database without tables."""
    name = request.param
    if name == "sqlite":
        path = tmp_path_factory.mktemp("django") / "shop.db"
        yield {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path)}
        return
    with SERVERS[name]() as server:
        where = {"USER": server.user, "HOST": "127.0.0.1", "PORT": server.port}
        if name == "mysql":
            with pymysql.connect(user=server.user, host="127.0.0.1", port=server.port) as connection:
                connection.cursor().execute("CREATE DATABASE postgres")
        yield {"ENGINE": f"django.db.backends.{ENGINES[name]}", "NAME": "postgres", **where}


def environment(shop: dict[str, Any]) -> dict[str, str]:
    default = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "DATABASES": json.dumps({"default": default, "shop": shop}), "PYTHONPATH": path}


def run(shop: dict[str, Any], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], env=environment(shop), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def manage(shop: dict[str, Any], *arguments: str) -> str:
    return run(shop, str(SUPPORT / "django_project.py"), *arguments)


HEAD = """
import django_project; django_project.configure()
from datetime import datetime, timedelta, timezone
from django.db import connections, transaction
from polybus import Event, InvalidConfig
from polybus.django import store
from polybus.django.models import InboxMark, OutboxRow
from polybus.outbox import Inbox

def placed(number, **meta):
    return Event.create("order.placed", {"number": number}, **meta)
"""


def program(shop: dict[str, Any], body: str) -> str:
    return run(shop, "-c", HEAD + body)


@pytest.fixture
def migrated(shop: dict[str, Any]) -> Iterator[dict[str, Any]]:
    manage(shop, "migrate", "--database", "shop")
    yield shop
    manage(shop, "migrate", "polybus", "zero", "--database", "shop")


def test_migrations_make_the_tables_and_are_complete(migrated: dict[str, Any]) -> None:
    manage(migrated, "makemigrations", "--check", "--dry-run")
    manage(migrated, "check", "--database", "shop")
    assert "[X] 0001_tables" in manage(migrated, "showmigrations", "--database", "shop")


def test_store_in_an_atomic_block(migrated: dict[str, Any]) -> None:
    program(
        migrated,
        """
try:
    store(placed(0))
    raise AssertionError("there was no transaction")
except InvalidConfig as error:
    assert "allow_autocommit" in str(error), error
with transaction.atomic("shop"):
    event = placed(1, idempotency_key="k", partition_key="p")
    assert store(event) is True  # the router says where
    assert store([placed(2, idempotency_key="k"), placed(3)], using="shop") == [False, True]
    try:
        with transaction.atomic("shop"):
            store(placed(4))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with Inbox().once(connections["shop"], event, consumer="billing") as first:
        assert first
rows = list(OutboxRow.objects.order_by("seq"))
assert [Event._from_wire(row.event.encode()).payload["number"] for row in rows] == [1, 3], rows
assert (rows[0].event_id, rows[0].type, rows[0].partition_key, rows[0].status) == (
    event.meta.id, "order.placed", "p", "pending")
now = datetime.now(timezone.utc)
for row in rows:
    assert abs(now - row.created_at) < timedelta(minutes=1) and row.created_at.tzinfo, row.created_at
assert OutboxRow.objects.filter(created_at__gt=now - timedelta(minutes=1)).count() == 2
assert OutboxRow.objects.filter(created_at__gt=now + timedelta(minutes=1)).count() == 0
mark = InboxMark.objects.get(consumer="billing")
assert mark.pk == ("billing", event.meta.id) and abs(now - mark.processed_at) < timedelta(minutes=1)
""",
    )


def test_a_command_relays(migrated: dict[str, Any], tmp_path: Path) -> None:
    program(migrated, 'with transaction.atomic("shop"): store([placed(1), placed(2)])')
    bus = f"sqlite:///{tmp_path}/bus.db"
    command = ("polybus_relay", "--database", "shop", "--bus", bus, "--once")
    assert manage(migrated, *command) == "2 events relayed\n"
    assert manage(migrated, *command) == "0 events relayed\n"
    done = program(migrated, 'print(*OutboxRow.objects.values_list("status", "attempts"))')
    assert done == "('delivered', 0) ('delivered', 0)\n"

    async def arrived() -> list[int]:
        async with Bus(bus, service="test") as reader:
            return [entry.event.payload["number"] for entry in await reader.history("order.*")]

    assert asyncio.run(arrived()) == [1, 2]


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    settings = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "x.db")}
    bus = f"sqlite:///{tmp_path}/bus.db"
    for given, words in (
        (["--bus", bus, "--database", "shpo"], "no database 'shpo'"),
        (["--bus", bus, "--database", "shop"], "polybus_outbox is missing"),
        (["--bus", "sqlit:///x", "--database", "shop"], "did you mean"),
        (["--bus", "", "--database", "shop"], "POLYBUS_URL"),
    ):
        with pytest.raises(AssertionError, match=f"CommandError: .*{words}"):
            manage(settings, "polybus_relay", "--once", *given)


def test_a_commit_pokes_the_relay(migrated: dict[str, Any]) -> None:
    if "postgresql" not in migrated["ENGINE"]:
        pytest.skip("only PostgreSQL can notify")
    dsn = f"host=127.0.0.1 port={migrated['PORT']} user={migrated['USER']} dbname={migrated['NAME']}"
    with psycopg.connect(dsn, autocommit=True) as listener:
        listener.execute("LISTEN polybus_outbox")
        program(
            migrated,
            """
for rolled_back in (True, False):
    with transaction.atomic("shop"):
        store(placed(1))
        transaction.set_rollback(rolled_back, using="shop")
    if rolled_back:  # a poke that it sent would stand before this one
        connections["shop"].cursor().execute("SELECT pg_notify('polybus_outbox', 'rolled back')")
""",
        )
        said = [notify.payload for notify in listener.notifies(timeout=10, stop_after=2)]
    assert said == ["rolled back", ""]


def test_a_database_that_it_does_not_know(tmp_path: Path) -> None:
    body = """
from importlib import import_module
class Oracle:
    vendor = "oracle"
class Editor:
    connection = Oracle()
try:
    import_module("polybus.django.migrations.0001_tables").make(None, Editor())
    raise AssertionError("it went on")
except NotImplementedError as error:
    assert "DATABASE_ROUTERS" in str(error), error
"""
    program({"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "x.db")}, body)
