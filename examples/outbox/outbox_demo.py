"""Orders go from a shop to a warehouse and back through two outboxes, while Redis goes away and a relay is killed.

Prints a timeline while it runs, then a table computed from both databases. Exit code 1 if an event was lost, took
effect twice, or came from a transaction that did not commit.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from database_server import PostgresServer  # noqa: E402
from redis_server import RedisServer  # noqa: E402

POLYBUS = [sys.executable, "-m", "polybus"]


class Orders:
    """Customers: eight at a time, at a steady rate. Each order is answered with 201, or with 402."""

    def __init__(self, port: int, count: int, seconds: float) -> None:
        self.url, self.count, self.gap = f"http://127.0.0.1:{port}/orders", count, seconds / count
        self.placed: list[str] = []
        self.refused: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def answered(self) -> int:
        return len(self.placed) + len(self.refused)

    def _run(self) -> None:
        began = time.monotonic()
        with ThreadPoolExecutor(8) as customers:
            for number in range(self.count):
                time.sleep(max(0.0, began + number * self.gap - time.monotonic()))
                customers.submit(self._order, f"o-{number}")

    def _order(self, order_id: str) -> None:
        body = json.dumps({"order_id": order_id}).encode()
        request = urllib.request.Request(self.url, body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30):
                self.placed.append(order_id)
        except urllib.error.HTTPError as error:
            if error.code != 402:
                raise
            self.refused.append(order_id)


class Database:
    """One service's database, seen from outside."""

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.url = f"postgresql://{server.user}@127.0.0.1:{server.port}/{name}"
        self._server, self._name = server, name

    def make(self, *more: str) -> None:
        ddl = subprocess.run(
            [*POLYBUS, "outbox", "ddl", "--dialect", "postgres"], check=True, capture_output=True, text=True
        ).stdout
        asyncio.run(self._make([ddl, *more]))

    async def _make(self, scripts: list[str]) -> None:
        admin = await asyncpg.connect(self.url.rsplit("/", 1)[0] + "/postgres")
        await admin.execute(f'CREATE DATABASE "{self._name}"')
        await admin.close()
        own = await asyncpg.connect(self.url)
        for script in scripts:
            await own.execute(script)
        await own.close()

    def rows(self, query: str) -> list[Any]:
        async def ask() -> list[Any]:
            connection = await asyncpg.connect(self.url)
            try:
                return [tuple(row) for row in await connection.fetch(query)]
            finally:
                await connection.close()

        return asyncio.run(ask())

    def number(self, query: str) -> int:
        return int(self.rows(query)[0][0])


class Demo:
    def __init__(self, postgres: PostgresServer, redis: RedisServer, count: int, seconds: float) -> None:
        self.redis, self.count, self.seconds = redis, count, seconds
        self.bus = f"redis://127.0.0.1:{redis.port}"
        self.shop, self.warehouse = Database(postgres, "shop"), Database(postgres, "warehouse")
        self.processes: list[subprocess.Popen[str]] = []
        self.began = time.monotonic()

    def say(self, text: str) -> None:
        print(f"  {time.monotonic() - self.began:5.1f} s  {text}", flush=True)

    def spawn(self, *command: str) -> subprocess.Popen[str]:
        env = {**os.environ, "BUS": self.bus, "SHOP_DB": self.shop.url, "WAREHOUSE_DB": self.warehouse.url}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=self.log(), text=True)
        self.processes.append(process)
        return process

    def log(self) -> Any:
        path = ROOT / ".demo" / f"outbox-{os.getpid()}.log"
        path.parent.mkdir(exist_ok=True)
        return path.open("ab")

    def service(self, *command: str) -> int:
        """Starts a service, and returns its port when it listens."""
        process = self.spawn(*command)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{command} did not start; see .demo/outbox-{os.getpid()}.log")
        return int(line)

    def relay(self, database: Database) -> subprocess.Popen[str]:
        return self.spawn(*POLYBUS, "relay", "--db", database.url, "--bus", self.bus, "--lease", "3")

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 60) -> bool:
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                self.say(f"gave up waiting until {what}")
                return False
            time.sleep(0.05)
        return True

    def run(self) -> int:
        prisma = (HERE / "tables.sql").read_text()
        self.shop.make()
        self.warehouse.make(prisma)
        shop = self.service(sys.executable, str(HERE / "shop_api.py"))
        warehouse = self.service("node", "--import", "tsx", str(HERE / "warehouse.ts"))
        victim = self.relay(self.shop)
        self.relay(self.shop)
        self.relay(self.warehouse)
        self.say(f"shop on port {shop}, warehouse on port {warehouse}, three relays, Redis, PostgreSQL")
        orders = Orders(shop, self.count, self.seconds)

        self.reach(orders, 0.2)
        self.redis.kill()
        self.say(f"STOPPED Redis after {orders.answered} orders; the shop goes on")
        self.reach(orders, 0.5)
        self.say(f"{self.backlog(self.shop)} events wait in the shop's outbox")
        self.redis.restart()
        self.say("started Redis")
        self.wait(lambda: self.backlog(self.shop) == 0 or self.published() > self.count // 4, "relays work again")
        victim.kill()
        victim.wait()
        self.say("KILLED a relay of the shop (SIGKILL)")
        self.reach(orders, 0.8)
        self.relay(self.shop)
        self.say("started a new relay")
        self.wait(lambda: orders.answered == self.count, "every order is answered")
        self.wait(lambda: self.finished(orders), "every order is reserved")
        self.stop()
        return self.report(orders)

    def reach(self, orders: Orders, share: float) -> None:
        self.wait(lambda: orders.answered >= self.count * share, f"{share:.0%} of the orders are answered")

    def backlog(self, database: Database) -> int:
        return database.number("SELECT count(*) FROM polybus_outbox WHERE status <> 'delivered'")

    def published(self) -> int:
        return self.shop.number("SELECT count(*) FROM polybus_outbox WHERE status = 'delivered'")

    def finished(self, orders: Orders) -> bool:
        done = self.shop.number("SELECT count(*) FROM orders WHERE reserved > 0")
        return done >= len(orders.placed) and self.backlog(self.shop) + self.backlog(self.warehouse) == 0

    def report(self, orders: Orders) -> int:
        rows = dict(self.shop.rows("SELECT order_id, reserved FROM orders"))
        events = {
            json.loads(text)["payload"]["orderId"]
            for (text,) in self.shop.rows("SELECT event FROM polybus_outbox WHERE type = 'order.placed'")
        }
        reserved = dict(self.warehouse.rows("SELECT order_id, count(*) FROM reservations GROUP BY order_id"))
        suppressed = [base.number("SELECT count(*) FROM suppressed") for base in (self.shop, self.warehouse)]
        lost = {order for order in orders.placed if reserved.get(order, 0) < 1 or rows.get(order, 0) < 1}
        twice = {order for order, times in [*reserved.items(), *rows.items()] if times > 1}
        ghosts = (set(rows) | events | set(reserved)) - set(orders.placed)
        table = [
            ("orders answered with 201, 402", f"{len(orders.placed)}, {len(orders.refused)}"),
            ("rows in the shop, events in its outbox", f"{len(rows)}, {len(events)}"),
            ("effects in the warehouse, in the shop", f"{sum(reserved.values())}, {sum(rows.values())}"),
            ("duplicates suppressed by the inboxes", f"{sum(suppressed)}"),
            ("effects of transactions that were rolled back", f"{len(ghosts)}"),
            ("effects that happened twice", f"{len(twice)}"),
            ("lost", f"{len(lost)}"),
        ]
        print()
        for what, value in table:
            print(f"  {what:<48}{value:>12}")
        return int(bool(lost or twice or ghosts))

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=15.0, help="over how long they come in")
    options = parser.parse_args()
    with PostgresServer() as postgres, RedisServer(appendfsync="everysec") as redis:
        demo = Demo(postgres, redis, options.orders, options.seconds)
        try:
            return demo.run()
        finally:
            demo.stop()


if __name__ == "__main__":
    sys.exit(main())
