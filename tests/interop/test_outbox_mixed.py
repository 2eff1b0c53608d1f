"""Django and Prisma write into one outbox; one relay carries it; both handle everything, each effect once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from outbox_ground import ROOT, Arrivals, Ground, until

HERE = Path(__file__).parent / "outbox"
EACH = 25


def test_django_and_prisma_share_an_outbox_and_an_inbox() -> None:
    tables = (ROOT / "examples/outbox/tables.sql").read_text()
    more = "CREATE TABLE orders (id TEXT); CREATE TABLE bills (id TEXT); CREATE TABLE bills_suppressed (id TEXT)"
    with Ground(tables, more) as ground, Arrivals(ground.bus) as arrivals:
        shop = {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": "postgres",
            "USER": "postgres",
            "HOST": "127.0.0.1",
            "PORT": ground.postgres.port,
        }
        env = {
            "DATABASES": json.dumps(
                {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}, "shop": shop}
            ),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        relay = ground.relay("node")
        django = ground.run(sys.executable, str(HERE / "books_django.py"), ground.bus, **env)
        prisma = ground.run("node", "--import", "tsx", str(HERE / "stock_prisma.ts"), ground.database, ground.bus)
        services = [django, prisma]
        for service in services:
            assert service.line() == "ready"
        for service in services:
            service.tell(f"{EACH}")
        for service in services:
            assert service.line() == "taken"
        orders = sorted(f"{who}-{number}" for who in ("django", "prisma") for number in range(EACH) if number % 5 < 4)
        assert sorted(ground.column("SELECT id FROM orders")) == orders
        until(lambda: ground.number("SELECT count(*) FROM bills") >= len(orders), "Django handles everything")
        until(lambda: ground.number("SELECT count(*) FROM reservations") >= len(orders), "Prisma handles everything")
        until(lambda: ground.unfinished() == 0, "everything is relayed")

        # As when the relay dies after it published everything, and before it marked any of it.
        relay.close()
        ground.sql("UPDATE polybus_outbox SET status = 'pending', delivered_at = NULL")
        ground.relay("python")
        for table in ("bills_suppressed", "suppressed"):
            count = f"SELECT count(*) FROM {table}"
            until(lambda count=count: ground.number(count) >= len(orders), "everything comes again, to everybody")
        until(lambda: ground.unfinished() == 0, "everything is relayed")
        for service in services:
            service.end()
        assert sorted(ground.column("SELECT id FROM bills")) == orders
        assert sorted(ground.column("SELECT order_id FROM reservations")) == orders
        assert sorted(ground.column("SELECT id FROM bills_suppressed")) == orders
        for answer in ("bill.sent", "stock.reserved"):
            until(lambda answer=answer: len(arrivals.of(answer)) >= 2 * len(orders), "answers come, and again")
            assert sorted(event.payload["orderId"] for event in arrivals.first(answer)) == orders
