"""Wakes the relay after a commit."""

from __future__ import annotations

import time

GAP = 0.01
"""A relay that was woken reads the table until it is empty: more than this is work for nothing. Seconds."""

_last: dict[str, float] = {}


def poke(using: str) -> None:
    """Tell relays that listen on this database. Otherwise they find the row at their next look."""
    from django.db import connections

    from polybus.django import outbox

    connection = connections[using]
    now = time.monotonic()
    if connection.vendor != "postgresql" or now - _last.get(using, 0.0) < GAP:
        return
    _last[using] = now
    with connection.cursor() as cursor:
        cursor.execute(*outbox._native.wake("%s"))
