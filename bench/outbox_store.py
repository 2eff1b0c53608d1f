"""What `outbox.store` costs: a transaction of one business row and one event, beside the same with an INSERT by hand.

    python bench/outbox_store.py [--rounds N] [--only DRIVER …]

Starts a PostgreSQL of its own (default durability). In each program the two ways take turns, half a second each, so
that they meet the same machine. CPU is that of the program and of its connections' server processes, per transaction.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from harness import Program

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import psycopg

from database_server import PostgresServer
from polybus.outbox import Outbox

AT_LEAST = 0.9
SECONDS = 0.5
PROGRAMS = {
    "asyncpg": "store_polybus.py",
    "psycopg": "store_polybus.py",
    "psycopg async": "store_polybus.py",
    "pg": "store_polybus.mjs",
    "postgres.js": "store_polybus.mjs",
}
CONNECTIONS = (1, 10)


class DurablePostgres(PostgresServer):
    """As an installed one is: commits wait for the disk."""

    def _serve(self) -> list[str]:
        return [*super()._serve(), "-c", "fsync=on", "-c", "max_wal_size=4GB"]


def make(url: str) -> None:
    with psycopg.connect(url) as db:
        db.execute("DROP TABLE IF EXISTS polybus_outbox, orders")
        for statement in Outbox().ddl("postgres"):
            db.execute(statement)
        db.execute("CREATE TABLE orders (id TEXT PRIMARY KEY, customer TEXT NOT NULL, total BIGINT NOT NULL)")


def measure(url: str, driver: str, connections: int, rounds: int, seconds: float = SECONDS) -> dict[str, Any]:
    """One line of the table: medians of both ways, and the median of the ratios of neighbours."""
    make(url)
    ways: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    ask = {"url": url, "driver": driver, "connections": connections, "rounds": rounds, "seconds": seconds}
    with Program(PROGRAMS[driver], ask) as program:
        while "how" in (facts := program.hear()):
            ways[facts["how"]].append(facts)
    ours, hand = ways
    figures: dict[str, Any] = {"driver": driver, "connections": connections}
    for name, found in (("ours", ours), ("hand", hand)):
        for fact in ("rate", "client", "server"):
            figures[f"{name}_{fact}"] = statistics.median(each[fact] for each in found)
    ratios = [mine["rate"] / theirs["rate"] for mine, theirs in zip(ours, hand, strict=True)]
    figures["ratio"] = statistics.median(ratios)
    figures["ratios"] = (min(ratios), max(ratios))
    figures["at_least"] = AT_LEAST
    return figures


def rows(rounds: int, only: list[str] | None = None, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """All lines: each driver with 1 and with 10 connections."""
    found = []
    with DurablePostgres() as server:
        url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
        for driver in only or PROGRAMS:
            for connections in CONNECTIONS:
                found.append(measure(url, driver, connections, rounds, seconds))
                print(f"  {driver}, {connections}: {found[-1]['ratio']:.2f} x", file=sys.stderr, flush=True)
    return found


HEAD: tuple[str, ...] = (
    "driver",
    "connections",
    "outbox.store, tx/s",
    "by hand, tx/s",
    "ratio",
    "least - most",
    "reached ≥ 0.9",
)
HEAD += ("CPU µs, program", "by hand", "CPU µs, server", "by hand")


def table(found: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [list(HEAD), ["---"] * len(HEAD)]
    for row in found:
        least, most = row["ratios"]
        cells = [row["driver"], row["connections"], f"{row['ours_rate']:,.0f}", f"{row['hand_rate']:,.0f}"]
        cells += [f"{row['ratio']:.2f} x", f"{least:.2f} - {most:.2f}"]
        cells += ["yes" if row["ratio"] >= row["at_least"] else "**no**"]
        cells += [f"{row[f'{name}_{fact}']:.0f}" for fact in ("client", "server") for name in ("ours", "hand")]
        lines.append([str(cell) for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="two slices of each way per round (8)")
    parser.add_argument("--only", nargs="+", choices=list(PROGRAMS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"length of a slice ({SECONDS})")
    asked = parser.parse_args()
    print(table(rows(asked.rounds, asked.only, asked.seconds)))


if __name__ == "__main__":
    main()
