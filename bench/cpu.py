"""CPU time per event over Redis, by process and thread: where one event's work is done.

On a machine that is busy with other things a rate says nothing, and CPU time little changes: with as many cores as
threads that have work, rate is cores divided by the sum. `python bench/cpu.py --help` lists the options.
Only Linux has the files this reads.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from harness import Facts, Program
from server import fresh_server

if TYPE_CHECKING:
    from typing_extensions import Self

#: A thread's time is lost when it ends between two looks.
EVERY = 0.004
COLUMNS = ("producer", "its core", "its rest", "server", "consumer", "its core ", "its rest ")

PAIRS: dict[str, tuple[str, str, Facts]] = {
    "node": ("consume_polybus.mjs", "produce_polybus.mjs", {}),
    "node-100": ("consume_polybus.mjs", "produce_polybus.mjs", {"publishers": 100}),
    "node-1": ("consume_polybus.mjs", "produce_polybus.mjs", {"publishers": 1}),
    "ioredis": ("peer_ioredis.mjs", "peer_ioredis.mjs", {"how": "loop"}),
    "python": ("consume_polybus.py", "produce_polybus.py", {}),
    "python-100": ("consume_polybus.py", "produce_polybus.py", {"publishers": 100}),
    "redis-py": ("peer_redis_py.py", "peer_redis_py.py", {"how": ""}),
    "rust": ("redis_bench", "redis_bench", {"how": "polybus"}),
    "bare": ("redis_bench", "redis_bench", {"how": "bare"}),
}


class Watch:
    """Nanoseconds of CPU by thread of some processes, looked at again and again because threads end."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._seen: dict[tuple[int, int], tuple[str, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _look(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    with contextlib.suppress(OSError, ValueError, IndexError):
                        used = int((task / "schedstat").read_text().split()[0])
                        if used:
                            self._seen[pid, int(task.name)] = ((task / "comm").read_text().strip(), used)

    def _run(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._seen)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def used(self, pid: int) -> tuple[float, float, float]:
        """Nanoseconds of the main thread, of the core's threads, of the others."""
        parts = [0.0, 0.0, 0.0]
        for (owner, thread), (name, used) in self._seen.items():
            if owner == pid:
                kind = 0 if thread == pid else 1 if name.startswith("polybus") else 2
                parts[kind] += used - self._before.get((owner, thread), ("", 0))[1]
        return parts[0], parts[1], parts[2]


def measure(name: str, events: int) -> dict[str, float]:
    """Microseconds per event, by column."""
    consumer, producer, more = PAIRS[name]
    with fresh_server() as server:
        ask: Facts = {**server.told, "latency": False, "per_second": 0, "publishers": 0, "durability": "warn"}
        ask = {**ask, "events": events, **more}
        with Program(consumer, {**ask, "part": "consume"}) as receiver:
            receiver.hear()
            with Program(producer, {**ask, "part": "produce"}) as sender:
                sender.hear()
                pids = [sender.pid, server.pid, receiver.pid]
                with Watch(pids) as watch:
                    sender.go()
                    sent = sender.hear()
                    received = receiver.hear()
                used = [watch.used(pid) for pid in pids]
    times = [*used[0], sum(used[1]), *used[2]]
    figures = {column: time / 1000 / events for column, time in zip(COLUMNS, times, strict=True)}
    rate = events * 1e9 / (received["ended"] - sent["started"])
    return {**figures, "all": sum(figures.values()), "wall rate": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["node", "ioredis"], metavar="name", help=" ".join(PAIRS))
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in asked.names}
    for _ in range(asked.rounds):
        for name in asked.names:
            rows[name].append(measure(name, asked.events))
    columns = [*COLUMNS, "all", "wall rate"]
    print("| µs per event | " + " | ".join(column.strip() for column in columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for name, found in rows.items():
        medians = [statistics.median(row[column] for row in found) for column in columns]
        shown = [f"{value:.2f}" for value in medians[:-1]] + [f"{medians[-1]:,.0f}"]
        print(f"| {name} | " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
