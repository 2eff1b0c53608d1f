"""A PostgreSQL with an outbox and an inbox, a Redis, and processes around them, of a test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any

import psycopg

from database_server import PostgresServer
from polybus import Bus, Event
from polybus.outbox import Inbox, Outbox
from redis_server import RedisServer

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0
COMMANDS = {
    "python": [sys.executable, "-m", "polybus"],
    "node": ["node", str(ROOT / "bindings-node/dist/cli.js")],
}


def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for it. Databases and processes tell only when asked."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


class Program:
    """A process, and the lines that it says."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: Queue[str] = Queue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(self.process.stderr)

    def line(self) -> str:
        """The next line that it says."""
        line = self._lines.get(timeout=DEADLINE)
        assert line, f"{self.process.args!r} ended:\n{''.join(self._errors)}"
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ended(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        return self.process.wait(DEADLINE)

    def end(self) -> None:
        """Close its input, at which it is to end well."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        code = self.ended()
        assert code == 0, f"{self.process.args!r} ended with {code}:\n{''.join(self._errors)}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        for reader in self._readers:
            reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class Ground:
    """Runs from construction to `close`, which also ends the processes that it started."""

    def __init__(self, *tables: str) -> None:
        self.postgres = PostgresServer()
        # What the server of a bus confirmed is there after `kill -9`.
        self.redis = RedisServer(appendfsync="always")
        self.database = f"postgresql://postgres@127.0.0.1:{self.postgres.port}/postgres"
        self.bus = self.redis.url
        self._programs: list[Program] = []
        self.sql(";".join([*Outbox().ddl("postgres"), *Inbox().ddl("postgres"), *tables]))

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.database, autocommit=True)

    def sql(self, text: str) -> list[Any]:
        """Rows of a statement, in a session of its own."""
        with self.connect() as connection:
            cursor = connection.execute(text.encode())
            return cursor.fetchall() if cursor.description else []

    def column(self, text: str) -> list[Any]:
        return [row[0] for row in self.sql(text)]

    def number(self, text: str) -> int:
        return int(self.column(text)[0])

    def run(self, *command: str, **env: str) -> Program:
        program = Program(command, env)
        self._programs.append(program)
        return program

    def relay(self, language: str = "python", *options: str) -> Program:
        """`polybus relay`, as a package of this language has installed it."""
        where = ["relay", "--db", self.database, "--bus", self.bus]
        return self.run(*COMMANDS[language], *where, *options)

    def unfinished(self) -> int:
        return self.number("SELECT count(*) FROM polybus_outbox WHERE status <> 'delivered'")

    def close(self) -> None:
        for program in self._programs:
            program.close()
        self.redis.close()
        self.postgres.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Arrivals:
    """A service that notes what arrives at it, until `close`. Events of one key come in their order."""

    def __init__(self, url: str) -> None:
        self.events: list[Event[Any]] = []
        self._closed = False
        self._bus = Bus(url, service="witness")
        self._blocking = self._bus.blocking
        self._blocking.__enter__()
        self._blocking.subscribe("**", self._note, name="witness", ordered=True, concurrency=16)

    def _note(self, event: Event[Any]) -> None:
        self.events.append(event)

    def of(self, event_type: str) -> list[Event[Any]]:
        return [event for event in self.events if event.type == event_type]

    def ids(self, event_type: str) -> set[str]:
        return {event.meta.id for event in self.of(event_type)}

    def first(self, event_type: str) -> list[Event[Any]]:
        """Each event once, where it came first."""
        found: dict[str, Event[Any]] = {}
        for event in self.of(event_type):
            found.setdefault(event.meta.id, event)
        return list(found.values())

    def close(self) -> None:
        """Handle what is under way, and stop."""
        if not self._closed:
            self._closed = True
            self._blocking.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
