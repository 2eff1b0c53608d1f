"""The main job: three services in two languages on one bus, one of them killed in the middle of its work.

Prints a timeline while it runs, then a table computed from what the processes recorded. Exit code 1 if an event was
lost or a causal chain is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ledger import Reader

from polybus import Bus

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Book:
    """Everything that the services recorded, by what it means."""

    def __init__(self, folder: Path) -> None:
        self._reader = Reader(folder)
        self.ready: Counter[str] = Counter()
        self.placed: dict[str, str] = {}  # event id → order
        self.packing: list[dict[str, Any]] = []
        self.shipped_by: Counter[int] = Counter()  # warehouse process → orders it finished
        self.packed: dict[str, dict[str, Any]] = {}
        self.sent: dict[str, dict[str, Any]] = {}
        self.tries: list[dict[str, Any]] = []
        self.mailed: Counter[str] = Counter()

    def read(self) -> None:
        for line in self._reader.new_lines():
            match line["what"]:
                case "ready":
                    self.ready[line["service"]] += 1
                case "placed":
                    self.placed[line["id"]] = line["order"]
                case "packing":
                    self.packing.append(line)
                case "shipped":
                    self.shipped_by[line["pid"]] += 1
                case "shipment":
                    (self.packed if line["type"] == "shipment.packed" else self.sent)[line["id"]] = line
                case "try":
                    self.tries.append(line)
                case "mailed":
                    self.mailed[line["id"]] += 1

    def shipped_orders(self) -> set[str]:
        return {line["correlation"] for line in self.sent.values()}

    def broken_chains(self) -> list[str]:
        """Shipments whose chain does not lead back to the order that they name."""
        broken = [line for line in self.packed.values() if not self._follows_its_order(line)]
        broken += [line for line in self.sent.values() if not self._follows_its_parcel(line)]
        return [f"{line['type']} {line['id']} of {line['order']}" for line in broken]

    def _follows_its_order(self, packed: dict[str, Any]) -> bool:
        parent, root = self.placed.get(packed["causation"]), self.placed.get(packed["correlation"])
        return bool(parent == root == packed["order"])

    def _follows_its_parcel(self, sent: dict[str, Any]) -> bool:
        parent = self.packed.get(sent["causation"])
        return parent is not None and all(parent[fact] == sent[fact] for fact in ("order", "correlation"))

    def redelivered(self, killed: int) -> set[str]:
        """Orders that the killed process had begun and another process began again."""
        begun = {line["id"] for line in self.packing if line["pid"] == killed}
        return {line["id"] for line in self.packing if line["pid"] != killed and line["id"] in begun}


class Demo:
    def __init__(self, url: str, orders: int, folder: Path) -> None:
        self.url, self.orders, self.folder = url, orders, folder
        self.bus_name = f"demo-{os.getpid()}"
        self.book = Book(folder)
        self.began = time.monotonic()
        self.processes: list[subprocess.Popen[bytes]] = []

    def say(self, text: str) -> None:
        print(f"  {time.monotonic() - self.began:5.1f} s  {text}", flush=True)

    def spawn(self, *command: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        env = {**os.environ, "ORDERS": str(self.orders), "PER_SECOND": str(self.orders / 6)}
        arguments = [*command, self.url, self.bus_name, str(self.folder)]
        process = subprocess.Popen(arguments, cwd=ROOT, env=env, stdin=stdin)
        self.processes.append(process)
        return process

    def warehouse(self) -> subprocess.Popen[bytes]:
        return self.spawn("node", "--import", "tsx", str(HERE / "warehouse.ts"))

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> bool:
        """Reads the ledgers until ``until`` holds; prints a line each second."""
        deadline, line_at = time.monotonic() + seconds, time.monotonic() + 1
        while True:
            self.book.read()
            if until():
                return True
            now = time.monotonic()
            dead = [p.args for p in self.processes if p.poll() not in (None, 0, -signal.SIGKILL)]
            if dead or now > deadline:
                self.say(f"gave up waiting until {what}" + (f": a process failed: {dead}" if dead else ""))
                return False
            if now >= line_at:
                line_at += 1
                book = self.book
                self.say(
                    f"placed {len(book.placed):5}   packed {len(book.packed):5}   sent {len(book.sent):5}   "
                    f"mailed {len(book.mailed):5}   mail retries {sum(t['attempt'] > 1 for t in book.tries):3}"
                )
            time.sleep(0.05)

    def run(self) -> int:
        shop = self.spawn(sys.executable, str(HERE / "shop.py"), stdin=subprocess.PIPE)
        warehouse = self.warehouse()
        self.spawn(sys.executable, str(HERE / "mailer.py"))
        if not self.wait(lambda: self.book.ready.total() == 3, 30, "all three services are ready"):
            return 1
        self.say(f"shop (Python), warehouse (TypeScript), mailer (Python) are on {Bus(self.url, service='demo').url}")
        assert shop.stdin is not None
        shop.stdin.write(b"go\n")
        shop.stdin.flush()

        third = self.orders // 3
        self.wait(lambda: self.book.shipped_by[warehouse.pid] >= third, 30, f"{third} orders are shipped")
        warehouse.kill()
        warehouse.wait()
        self.book.read()
        self.say(f"KILLED the warehouse (SIGKILL) after {self.book.shipped_by[warehouse.pid]} orders")
        self.wait(lambda: len(self.book.placed) >= self.orders // 2, 30, "half of the orders are placed")
        self.warehouse()
        self.say("started a new warehouse")

        def finished() -> bool:
            given_up = sum(t["attempt"] == 4 and t["id"] not in self.book.mailed for t in self.book.tries)
            mailed = len(self.book.mailed) + given_up
            return len(self.book.shipped_orders()) >= self.orders and mailed >= self.orders

        self.wait(finished, 40, "every order is shipped and mailed or given up")
        dead = asyncio.run(self.dead_letters())
        exits = self.stop()
        self.book.read()
        return self.report(warehouse.pid, dead, exits)

    async def dead_letters(self) -> dict[str, str]:
        """Dead letters of the bus: event id → reason. The last one may be on its way: wait for what was given up."""
        async with Bus(self.url, service="demo", bus=self.bus_name) as bus:
            expected = {t["id"] for t in self.book.tries if t["attempt"] == 4} - set(self.book.mailed)
            found: dict[str, str] = {}
            for _ in range(100):
                letters = await bus.dead_letters.list(limit=1000)
                found = {letter.event.meta.id: letter.reason for letter in letters if letter.event is not None}
                if expected <= set(found):
                    break
                await asyncio.sleep(0.05)
            return found

    def stop(self) -> list[int]:
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.terminate()
        try:
            return [process.wait(10) for process in running]
        except subprocess.TimeoutExpired:
            for process in running:
                process.kill()
            return [1]

    def report(self, killed: int, dead: dict[str, str], exits: list[int]) -> int:
        book = self.book
        shipped, redelivered, broken = book.shipped_orders(), book.redelivered(killed), book.broken_chains()
        not_shipped = [order for event, order in book.placed.items() if event not in shipped]
        handled = {*book.mailed, *dead}
        not_mailed = [order for event, order in book.placed.items() if event not in handled]
        lost = len(not_shipped) + len(not_mailed)
        retried = {t["id"] for t in book.tries if t["attempt"] > 1}
        rows = [
            ("orders placed", len(book.placed), "publish returned"),
            ("shipped", len(shipped & set(book.placed)), "shipment.sent seen by the shop"),
            ("mailed", len(book.mailed), ""),
            ("retried mails", len(retried), f"{sum(t['attempt'] > 1 for t in book.tries)} retries"),
            ("dead-lettered", len(dead), ", ".join(f"{book.placed.get(event)} ({why})" for event, why in dead.items())),
            ("redelivered after the kill", len(redelivered), "begun by the killed warehouse, begun again by the next"),
            ("shipped twice", len(book.sent) - len(shipped), "at least once: the kill came after the publish"),
            ("broken causal chains", len(broken), "; ".join(broken[:3])),
            ("LOST", lost, "; ".join((not_shipped + not_mailed)[:5])),
        ]
        print("\n" + "\n".join(f"  {name:28}{count:>6}   {note}" for name, count, note in rows))
        whole = len(book.placed) == self.orders and not lost and not broken and not any(exits)
        print(f"\n  {'Nothing was lost.' if whole else 'FAILED'}  ({time.monotonic() - self.began:.1f} s)\n")
        if any(exits):
            print(f"  a process did not exit cleanly: {exits}")
        return 0 if whole else 1


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """A redis-server that keeps its data in `folder` and is ended with the demo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--appendonly", "yes"]
    with (folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 10
        while subprocess.run(["redis-cli", "-p", str(port), "PING"], capture_output=True).stdout != b"PONG\n":
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"redis-server does not start:\n{(folder / 'redis.log').read_text()}")
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--bus", help="URL of the bus; default: a new SQLite file")
    where.add_argument("--redis", action="store_true", help="a redis-server of the demo's own")
    parser.add_argument("--orders", type=int, default=2000)
    parser.add_argument("--keep", action="store_true", help="keep the file and the ledgers")
    options = parser.parse_args()
    (ROOT / ".demo").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=ROOT / ".demo"))
    with contextlib.ExitStack() as stack:
        if options.keep:
            stack.callback(print, f"  kept: {folder}")
        else:
            stack.callback(shutil.rmtree, folder)
        url = stack.enter_context(redis_server(folder)) if options.redis else options.bus
        demo = Demo(url or f"sqlite:///{folder}/bus.db", options.orders, folder)
        stack.callback(demo.stop)
        return demo.run()


if __name__ == "__main__":
    sys.exit(main())
