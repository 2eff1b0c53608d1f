"""Wakes the relay after a commit."""

from __future__ import annotations

from collections import defaultdict

from polybus.outbox._gap import Gap

_gaps: dict[str, Gap] = defaultdict(Gap)


def poke(using: str) -> None:
    """Tell relays that listen on this database. Otherwise they find the row at their next look."""
    from django.db import connections

    from polybus.django import outbox

    connection = connections[using]
    if connection.vendor == "postgresql" and _gaps[using].over():
        with connection.cursor() as cursor:
            cursor.execute(*outbox._native.wake("%s"))
