"""A private PostgreSQL for each runner, with its default durability, and a private Redis where one is needed."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness import ROOT, Facts
from server import Server, fresh_server

sys.path.insert(0, str(ROOT / "tests" / "support"))
from database_server import PostgresServer

TICKS = os.sysconf("SC_CLK_TCK")


class Postgres(PostgresServer):
    """On a disk, because /tmp may be memory. Given some memory, as every one in earnest is; else the defaults."""

    parent = "/var/tmp"
    _made: Path | None = None
    """A folder of data that others are copied from, which takes a tenth of the time."""

    def _make(self) -> list[str]:
        if Postgres._made is None:
            made = Path(tempfile.mkdtemp(prefix="polybus-database-", dir=self.parent))
            atexit.register(shutil.rmtree, made, ignore_errors=True)
            if self._as:
                os.chown(made, self._as["user"], self._as["group"])
            [initdb, _, _, *options] = super()._make()
            self._run([initdb, "-D", str(made / "data"), *options])
            Postgres._made = made / "data"
        return ["cp", "-a", str(Postgres._made), str(self._folder / "data")]

    def _serve(self) -> list[str]:
        settings = {"fsync": "on", "shared_buffers": "256MB", "max_wal_size": "4GB"}
        return [*super()._serve(), *[part for name, value in settings.items() for part in ("-c", f"{name}={value}")]]

    @property
    def url(self) -> str:
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/postgres"

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu(self) -> float:
        """Seconds of CPU: its processes, and those that have ended."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="utf-8").split()
        return sum(cpu_of(int(pid)) for pid in children) + cpu_of(self.pid, reaped=True)


class Pair:
    """A PostgreSQL and a Redis."""

    def __init__(self, postgres: Postgres, redis: Server | None) -> None:
        self.postgres, self.redis = postgres, redis
        self.told: Facts = {"db": postgres.url, **(redis.told if redis else {})}


@contextlib.contextmanager
def fresh_database(with_redis: bool) -> Iterator[Pair]:
    os.sync()
    with contextlib.ExitStack() as open_:
        redis = open_.enter_context(fresh_server()) if with_redis else None
        yield Pair(open_.enter_context(Postgres()), redis)


def cpu_of(pid: int, *, reaped: bool = False) -> float:
    """Seconds of CPU that a process has used, with those of its children that it has waited for; 0 if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if reaped else 13])) / TICKS


def memory_of(pid: int) -> float:
    """MiB of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
