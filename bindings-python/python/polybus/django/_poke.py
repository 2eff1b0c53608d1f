"""Wakes the relay after a commit."""

from __future__ import annotations

from functools import cache

from polybus._native import NativeOutbox
from polybus.outbox._wake import wake


@cache
def _outbox(using: str) -> NativeOutbox:
    """One of each database, whose relays are woken for themselves."""
    return NativeOutbox()


def poke(using: str) -> None:
    """Tell relays that listen on this database. Otherwise they find the row at their next look."""
    from django.db import connections

    connection = connections[using]
    if connection.vendor == "postgresql" and (statement := wake(_outbox(using), "%s")):
        with connection.cursor() as cursor:
            cursor.execute(*statement)
