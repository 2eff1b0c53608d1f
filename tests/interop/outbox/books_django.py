"""A service of Django: takes orders, as many as each line says, and handles the orders of every service."""

from __future__ import annotations

import sys

import django_project

django_project.configure()

from django.db import connections, transaction  # noqa: E402

from polybus import Bus, Event  # noqa: E402
from polybus.django import store  # noqa: E402
from polybus.outbox import inbox  # noqa: E402


def take(order: str, number: int) -> None:
    """Every fifth is refused when all is written."""
    with transaction.atomic("shop"):
        with connections["shop"].cursor() as cursor:
            cursor.execute("INSERT INTO orders VALUES (%s)", (order,))
        store(Event.create("order.placed", {"orderId": order}, partition_key=order))
        if number % 5 == 4:
            transaction.set_rollback(True, "shop")


def bill(event: Event) -> None:
    """One transaction: the mark, the effect, and the next event."""
    order, table = event.payload["orderId"], "bills"
    with transaction.atomic("shop"), inbox.once(connections["shop"], event) as first:
        if first:
            store(event.child("bill.sent", {"orderId": order}))
        else:
            table = "bills_suppressed"
        with connections["shop"].cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} VALUES (%s)", (order,))


with Bus(sys.argv[1], service="django").blocking as bus:
    bus.subscribe("order.placed", bill, name="bill", concurrency=4)
    print("ready", flush=True)
    for line in sys.stdin:
        for number in range(int(line)):
            take(f"django-{number}", number)
        print("taken", flush=True)
