"""A real redis-server of the tests' own: on a free port of the loopback, with its data in a temporary folder."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE = 30.0
# Below what systems give to outgoing connections, which would take the port of a server that is down.
PORTS = range(10_000, 22_000)


class RedisServer:
    """Runs from construction to `close`. What it does returns when it is done, and fails after a deadline.

    `appendfsync` switches the append-only file on; without it nothing is kept. `more` are any other directives:
    `maxmemory="10mb"`, with underscores for hyphens.
    """

    def __init__(self, *, appendfsync: str | None = None, password: str | None = None, **more: str) -> None:
        self.password = password
        self._folder = Path(tempfile.mkdtemp(prefix="polybus-redis-"))
        self._config = {"bind": "127.0.0.1", "dir": str(self._folder), "save": '""'}
        if appendfsync:
            self._config |= {"appendonly": "yes", "appendfsync": appendfsync}
        if password:
            self._config |= {"requirepass": password}
        self._config |= {name.replace("_", "-"): value for name, value in more.items()}
        deadline = time.monotonic() + DEADLINE
        while True:
            self.port = random.choice(PORTS)
            self._spawn()
            if self._comes_up(deadline):
                break

    def _spawn(self) -> None:
        lines = [f"{name} {value}\n" for name, value in {**self._config, "port": self.port}.items()]
        (self._folder / "config").write_text("".join(lines))
        with (self._folder / "log").open("ab") as log:
            command = ["redis-server", str(self._folder / "config")]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _comes_up(self, deadline: float) -> bool:
        """Wait until it answers. False when it ended by itself, as it does when its port is taken."""
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return False
            # Another server may have the port, and answer: this must be ours, and done with loading.
            ours = f"process_id:{self._process.pid}\n" in self._ask("INFO", "server").stdout
            if ours and self._ask("PING").stdout == "PONG\n":
                return True
            time.sleep(0.005)
        self.kill()
        raise AssertionError(f"redis-server does not answer:\n{(self._folder / 'log').read_text()}")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{self.address}" if self.password else f"redis://{self.address}"

    def cli(self, *arguments: str) -> str:
        """Run a command with redis-cli. An answer that is an error is one here, too."""
        answer = self._ask("-e", *arguments)
        assert answer.returncode == 0, f"redis-cli {arguments}: {answer.stdout}{answer.stderr}"
        return answer.stdout.rstrip("\n")

    def _ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **({"REDISCLI_AUTH": self.password} if self.password else {})}
        command = ["redis-cli", "-h", "127.0.0.1", "-p", str(self.port), *arguments]
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE
        )

    def version(self) -> tuple[int, ...]:
        line = next(line for line in self.cli("INFO", "server").split() if line.startswith("redis_version:"))
        return tuple(int(part) for part in line.partition(":")[2].split("."))

    def kill(self) -> None:
        """`kill -9`: nothing is flushed."""
        self._process.kill()
        self._process.wait(DEADLINE)

    def stop(self) -> None:
        """End it in an orderly way."""
        self._process.terminate()
        self._process.wait(DEADLINE)

    def pause(self) -> None:
        """Let it stand still with its connections open."""
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Start it again on the same port, with what it kept."""
        self.stop()
        deadline = time.monotonic() + DEADLINE
        self._spawn()
        while not self._comes_up(deadline):
            time.sleep(0.05)  # somebody has the port at this moment
            self._spawn()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
