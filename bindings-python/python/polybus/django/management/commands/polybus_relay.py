"""`manage.py polybus_relay`: carry the rows of the outbox to the bus."""

from __future__ import annotations

import asyncio
import os
import signal
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

from asgiref.sync import sync_to_async
from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS, connections

from polybus import Bus, PolybusError
from polybus.outbox import Relay


class Command(BaseCommand):
    """Uses the database settings of this project."""

    help = "Carries the events in the outbox to the bus, until SIGTERM or Ctrl-C. Run as many of it as you like."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Its options."""
        parser.add_argument("--database", default=DEFAULT_DB_ALIAS, help="alias of the database; default: default")
        parser.add_argument("--bus", default=os.environ.get("POLYBUS_URL"), help="URL of the bus; default: POLYBUS_URL")
        parser.add_argument("--service", default="relay", help="source of events that name none")
        parser.add_argument("--once", action="store_true", help="relay what is there, and end")
        parser.add_argument("--workers", type=int, default=1, help="claims under way at the same time (PostgreSQL)")

    def handle(self, *_: Any, **options: Any) -> None:
        """Run it."""
        if not options["bus"]:
            raise CommandError("pass --bus, or set POLYBUS_URL")
        try:
            total = asyncio.run(_relay(options))
        except PolybusError as error:
            raise CommandError(str(error)) from error
        if options["once"]:
            self.stdout.write(f"{total} events relayed")


async def _relay(options: dict[str, Any]) -> int:
    async with Bus(options["bus"], service=options["service"]) as bus:
        relay = _made(options["database"], bus, options["workers"])
        total = 0
        if not options["once"]:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, relay.stop)
            await relay.run()
        else:
            while (batch := await relay.relay_batch()).attempted:
                total += batch.relayed
                if batch.outage:
                    raise CommandError(f"{total} events relayed, then: {batch.outage}")
        return total


def _made(alias: str, bus: Bus, workers: int) -> Relay:
    if alias not in connections:
        raise CommandError(f"there is no database {alias!r} in DATABASES; there are {', '.join(connections)}")
    connection = connections[alias]
    if connection.vendor == "postgresql":
        return Relay(_url(connection), bus, workers=workers)

    def execute(sql: str, params: Sequence[Any]) -> tuple[list[Any], int]:
        with connections[alias].cursor() as cursor:
            cursor.execute(sql, params)
            rows = cursor.fetchall() if cursor.description else []
            return rows, cursor.rowcount

    # Always on the same thread, because Django has a connection for each; it is not this one.
    return Relay(sync_to_async(execute), bus, dialect=connection.vendor, style="%s")


def _url(connection: Any) -> str:
    """The database of these settings for libpq, and so for the relay's own connections."""
    given = {name: str(value) for name, value in connection.get_connection_params().items() if _plain(value)}
    database = quote(given.pop("dbname", ""), safe="")
    known = [name for name in ("host", "port", "user", "password", "sslmode", "sslrootcert") if name in given]
    return f"postgresql:///{database}?{urlencode({name: given[name] for name in known})}"


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)
