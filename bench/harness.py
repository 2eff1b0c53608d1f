"""Starts the measured programs, each fresh on a fresh folder, and speaks to them in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
#: A program that says nothing for so long has hung.
PATIENCE = 180.0

Facts = dict[str, Any]


class Failed(Exception):
    """A program ended without its answer."""


class Program:
    """A running task of `tasks/`; `.py` runs in this Python, `.mjs` in Node. Killed when its block ends."""

    def __init__(self, task: str, ask: Facts) -> None:
        self.name = task
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__, after the process
        self._process = subprocess.Popen(
            [sys.executable if task.endswith(".py") else "node", str(BENCH / "tasks" / task), json.dumps(ask)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

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

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def fresh_file() -> Iterator[str]:
    """Lend a path in a new folder, on the repository's disk because /tmp may be memory; the disk is quiet first."""
    with tempfile.TemporaryDirectory(prefix=".run-", dir=BENCH) as folder:
        os.sync()
        yield f"{folder}/events.db"


def alone(task: str, **ask: Any) -> Facts:
    """Run a program that measures itself, and return its answer."""
    with fresh_file() as path, Program(task, {"path": path, **ask}) as program:
        return program.hear()


def pair(consumer: str, producer: str, **ask: Any) -> Facts:
    """Run both; the consumer's answer, and `rate`: events/s from the producer's first call to the consumer's end."""
    with fresh_file() as path:
        ask = {"path": path, "latency": False, "per_second": 0, **ask}
        with Program(consumer, {**ask, "part": "consume"}) as receiver:
            receiver.hear()
            with Program(producer, {**ask, "part": "produce"}) as sender:
                sender.hear()
                sender.go()
                sent = sender.hear()
                received = receiver.hear()
    return {**received, "rate": ask["events"] * 1e9 / (received["ended"] - sent["started"])}


def pattern_example() -> Facts:
    """Run the core's own example; the first call builds it."""
    command = ["cargo", "run", "--quiet", "--release", "-p", "polybus-core", "--example", "pattern_bench"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode:
        raise Failed(f"pattern_bench: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    facts: Facts = json.loads(done.stdout)
    return {**facts, "subscribe_unsubscribe_us": facts["subscribe_unsubscribe_ns"] / 1000}
