"""What a process did, one JSON line each, in a file of its own.

A line is written with one ``write`` to a file opened for appending: what was written before a ``kill -9`` stays.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Ledger:
    def __init__(self, folder: str, name: str) -> None:
        path = Path(folder) / f"{name}-{os.getpid()}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "at": time.time(), **facts})
        os.write(self._file, line.encode() + b"\n")


class Reader:
    """All ledgers of a folder, read as they grow. A line that a kill cut short is left out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offsets: dict[Path, int] = {}

    def new_lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._folder.glob("*.jsonl")):
            service, pid = path.stem.rsplit("-", 1)
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offsets[path] = self._offsets.get(path, 0) + len(whole)
            for line in whole.splitlines():
                yield {"service": service, "pid": int(pid), **json.loads(line)}
