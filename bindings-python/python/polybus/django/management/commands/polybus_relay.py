"""`manage.py polybus_relay`: carry the rows of the outbox to the bus."""

from __future__ import annotations

import asyncio
import os
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DEFAULT_DB_ALIAS, connections


class Command(BaseCommand):
    """Uses the database settings of this project."""

    help = "Carries the events in the outbox to the bus, until SIGTERM or Ctrl-C. Run as many of it as you like."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Its options."""
        parser.add_argument("--database", default=DEFAULT_DB_ALIAS, help="alias of the database; default: default")
        parser.add_argument("--bus", default=os.environ.get("POLYBUS_URL"), help="URL of the bus; default: POLYBUS_URL")
        parser.add_argument("--service", default="relay", help="source of events that name none")
        parser.add_argument("--once", action="store_true", help="end when nothing is left to do")
        parser.add_argument("--workers", type=int, default=1, help="claims at the same time")

    def handle(self, *_: Any, **options: Any) -> None:
        """Run it."""
