"""Starts the measured programs, each fresh on a fresh folder, and speaks to them in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing_extensions import Self

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
#: A program that says nothing for so long has hung.
PATIENCE = 180.0

Facts = dict[str, Any]


class Failed(Exception):
    """A program ended without its answer."""


class Store(Protocol):
    """Where a run's programs meet, and what they are told about it."""

    told: Facts

    def cpu(self) -> float | None:
        """Seconds of CPU that its server has used; None without a server."""

    def connections(self) -> int | None:
        """Connections that its server has now, ours left out; None without a server."""


class Program:
    """A running task of `tasks/` (Python or Node), or an example of the core. Killed when its block ends."""

    def __init__(self, task: str, ask: Facts) -> None:
        self.name = task
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__, after the process
        self._process = subprocess.Popen(
            [*command(task), json.dumps(ask)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0 if sys.exc_info()[0] else 10)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def hear(self) -> Facts:
        """Wait for the next line of JSON; other lines are somebody's banner."""
        assert self._process.stdout is not None
        alarm = threading.Timer(PATIENCE, self._process.kill)
        alarm.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    facts: Facts = json.loads(line)
                    return facts
        finally:
            alarm.cancel()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        # Python says it in the last line, Node in the first that starts with the error's name.
        errors = [line for line in lines if re.match(r"[\w.]*Error\b", line)] or lines[-1:]
        raise Failed(f"{self.name}: {errors[0] if errors else 'no answer; killed if it was silent for 3 minutes'}")

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()


def command(task: str) -> list[str]:
    if task.endswith((".py", ".mjs")):
        return [sys.executable if task.endswith(".py") else "node", str(BENCH / "tasks" / task)]
    return [example(task)]


@cache
def example(name: str) -> str:
    """Build an example of the core, and say where it is."""
    build = ["cargo", "build", "--quiet", "--release", "-p", "polybus-core", "--example", name]
    done = subprocess.run(
        [*build, "--message-format=json"], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = [one["executable"] for one in made if one.get("executable") and one["target"]["name"] == name]
    if done.returncode or not found:
        messages = [one["message"] for one in made if one.get("reason") == "compiler-message"]
        errors = [message["message"] for message in messages if message["level"] == "error"]
        raise Failed(f"{name}: {(errors or done.stderr.strip().splitlines()[-1:] or ['it was not built'])[0]}")
    return str(found[-1])


@contextlib.contextmanager
def fresh_folder() -> Iterator[str]:
    """Lend a new folder on the repository's disk, because /tmp may be memory; the disk is quiet first."""
    with tempfile.TemporaryDirectory(prefix=".run-", dir=BENCH, ignore_cleanup_errors=True) as folder:
        os.sync()
        yield folder


class File:
    """A SQLite file."""

    def __init__(self, path: str) -> None:
        self.told = {"path": path, "url": f"sqlite:///{path}"}

    def cpu(self) -> None:
        return None

    def connections(self) -> None:
        return None


@contextlib.contextmanager
def fresh_file() -> Iterator[Store]:
    with fresh_folder() as folder:
        yield File(f"{folder}/events.db")


Fresh = Callable[[], AbstractContextManager[Store]]


def alone(task: str, fresh: Fresh = fresh_file, **ask: Any) -> Facts:
    """Run a program that measures itself, and return its answer."""
    with fresh() as store, Program(task, {**store.told, **ask}) as program:
        return program.hear()


def pair(consumer: str, producer: str, fresh: Fresh = fresh_file, **ask: Any) -> Facts:
    """Run both; the consumer's answer, and `rate`: events/s from the producer's first call to the consumer's end.

    Of a server also `cpu`: microseconds of its CPU time per event.
    """
    with fresh() as store:
        ask = {**store.told, "latency": False, "per_second": 0, "publishers": 0, **ask}
        with Program(consumer, {**ask, "part": "consume"}) as receiver:
            receiver.hear()
            with Program(producer, {**ask, "part": "produce"}) as sender:
                sender.hear()
                before = store.cpu()
                sender.go()
                sent = sender.hear()
                received = receiver.hear()
                after = store.cpu()
    cpu = {} if before is None or after is None else {"cpu": (after - before) * 1e6 / ask["events"]}
    return {**received, **cpu, "rate": ask["events"] * 1e9 / (received["ended"] - sent["started"])}


def crowd(task: str, processes: int, fresh: Fresh = fresh_file, **ask: Any) -> Facts:
    """Run one program so many times at once, measured when all are open.

    Of a server also its share of a core, `server`, and its connections to each of them.
    """
    with fresh() as store, contextlib.ExitStack() as running:
        programs = [running.enter_context(Program(task, {**store.told, **ask})) for _ in range(processes)]
        for program in programs:
            program.hear()
        for program in programs:
            program.go()
        before, started = store.cpu(), time.monotonic()
        shares = [program.hear()["percent"] for program in programs]
        after, ended = store.cpu(), time.monotonic()
        facts = {"percent": statistics.median(shares), "most": max(shares)}
        if before is not None and after is not None:
            facts["server"] = 100 * (after - before) / (ended - started)
        connections = store.connections()
        if connections is not None:
            facts["connections"] = connections / processes
        for program in programs:
            program.go()
    return facts


def pattern_example() -> Facts:
    """Run the core's own example; the first call builds it."""
    done = subprocess.run([example("pattern_bench")], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Failed(f"pattern_bench: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    facts: Facts = json.loads(done.stdout)
    return {**facts, "subscribe_unsubscribe_us": facts["subscribe_unsubscribe_ns"] / 1000}
