"""`polybus relay` as a process, by the command that the Python package installs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

COMMAND = [str(Path(sys.executable).with_name("polybus")), "relay"]
DEADLINE = 30.0


def relay(*arguments: str, env: Mapping[str, str] = {}, prefix: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run it to its end: exit code, standard output, standard error."""
    said = subprocess.run(
        [*prefix, *COMMAND, *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE,
    )
    return said.returncode, said.stdout, said.stderr


class Relay:
    """One that runs, with pages if `http` is given. Killed at the end unless it was ended."""

    def __init__(self, *arguments: str, http: str = "127.0.0.1:0", prefix: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*prefix, *COMMAND, *arguments, "--http", http], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.port = 0
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            place = self.said("served at http://").split("served at http://")[1].split("/")[0]
        except BaseException:
            self.__exit__()
            raise
        self.port = int(place.rsplit(":", 1)[1])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self.lines.append("")  # the end
            self._news.notify_all()

    def said(self, words: str) -> str:
        """Wait for a line with these words."""

        def found() -> str | None:
            return next((line for line in self.lines if words in line), None)

        with self._news:
            self._news.wait_for(lambda: found() or "" in self.lines, DEADLINE)
            line = found()
            assert line, f"{words!r} was not said:\n{''.join(self.lines)}"
            return line

    def end(self, signal: int) -> tuple[int, str]:
        """Send a signal, and wait: exit code, and all that it said."""
        self.process.send_signal(signal)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        code = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return code, self.process.stdout.read() + "".join(self.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
