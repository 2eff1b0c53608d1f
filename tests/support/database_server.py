"""A real PostgreSQL or MariaDB of the tests' own: on a free port of the loopback, with its data in a temporary folder.

As a program, for tests in other languages: `database_server.py postgres` prints the port, and ends the server when its
input ends; `database_server.py postgres pgbouncer` prints a second one, of a PgBouncer in front of it.
"""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

DEADLINE = 60.0
# Below what systems give to outgoing connections, which would take the port of a server that is down.
PORTS = range(10_000, 22_000)


class DatabaseServer:
    """Runs from construction to `close`. Both let `user` in without a password, over TCP only."""

    user: str
    account: str
    """Whose process it is when the tests run as root, which these servers refuse to be."""
    ready: str
    parent: str | None = None
    """Where its folder is made; None: where the system keeps temporary files, which may be in memory."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="polybus-database-", dir=self.parent))
        self._as: dict[str, Any] = {}
        if os.getuid() == 0:
            entry = pwd.getpwnam(self.account)
            os.chown(self._folder, entry.pw_uid, entry.pw_gid)
            self._as = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        self._run(self._make())
        deadline = time.monotonic() + DEADLINE
        while True:
            self.port = random.choice(PORTS)
            if self._starts(deadline):
                break

    def _starts(self, deadline: float) -> bool:
        self._log = self._folder / f"log-{self.port}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._serve(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._folder, **self._as
            )
        return self._comes_up(deadline)

    def _make(self) -> list[str]:
        """What makes the data."""
        raise NotImplementedError

    def _serve(self) -> list[str]:
        """What serves it."""
        raise NotImplementedError

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=self._folder, **self._as)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _comes_up(self, deadline: float) -> bool:
        """Wait until its log says so. False when it ended by itself, as it does when its port is taken."""
        while time.monotonic() < deadline:
            if self.ready in self._log.read_text():
                return True
            if self._process.poll() is not None:
                log = self._log.read_text()
                assert "in use" in log, f"{self._process.args!r} ended:\n{log}"
                return False
            time.sleep(0.02)
        self.close()
        raise AssertionError("the database does not come up")

    def kill(self) -> None:
        """`kill -9`: its sessions end when they notice."""
        self._process.kill()
        self._process.wait(DEADLINE)

    def restart(self) -> None:
        """Start it again, when it was stopped or killed, on the same port and with its data."""
        deadline = time.monotonic() + DEADLINE
        while not self._starts(deadline):
            time.sleep(0.05)  # what is left of a killed one is in the way

    def close(self) -> None:
        self._process.kill()
        self._process.wait(DEADLINE)
        shutil.rmtree(self._folder, ignore_errors=True)  # PostgreSQL's helpers end a moment later

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PostgresServer(DatabaseServer):
    """PostgreSQL, of Debian's packages or of the path."""

    user = "postgres"
    account = "postgres"
    ready = "ready to accept connections"

    @staticmethod
    def _program(name: str) -> str:
        found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
        return str(found[-1]) if found else name

    def _make(self) -> list[str]:
        options = ["--no-sync", "--auth=trust", f"--username={self.user}", "--encoding=UTF8", "--locale=C.UTF-8"]
        return [self._program("initdb"), "-D", str(self._folder / "data"), *options]

    def _serve(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 200,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", str(self._folder / "data"), *options]

    def stop(self) -> None:
        """End it in an orderly way, in which sessions are told that the server goes."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(DEADLINE)


class PgBouncer(DatabaseServer):
    """PgBouncer in transaction mode, with two sessions on a `PostgresServer` for each database.

    What holds a session for longer than a transaction breaks there. It lets everybody in.
    """

    user = "postgres"
    account = "postgres"
    ready = "process up"

    def __init__(self, server: DatabaseServer) -> None:
        self._server = server
        super().__init__()

    def _make(self) -> list[str]:
        return ["true"]

    def _serve(self) -> list[str]:
        config = f"""
            [databases]
            * = host=127.0.0.1 port={self._server.port} user={self._server.user}
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {self.port}
            unix_socket_dir =
            auth_type = any
            pool_mode = transaction
            default_pool_size = 2
            server_login_retry = 0.1
        """
        file = self._folder / "pgbouncer.ini"
        file.write_text("\n".join(line.strip() for line in config.splitlines()))
        return [shutil.which("pgbouncer") or "/usr/sbin/pgbouncer", str(file)]


class MariaServer(DatabaseServer):
    """MariaDB."""

    user = "root"
    account = "mysql"
    ready = "ready for connections"

    def _make(self) -> list[str]:
        data = f"--datadir={self._folder / 'data'}"
        return [
            "mariadb-install-db",
            "--no-defaults",
            data,
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ]

    def _serve(self) -> list[str]:
        return [
            shutil.which("mariadbd") or "/usr/sbin/mariadbd",
            "--no-defaults",
            f"--datadir={self._folder / 'data'}",
            f"--socket={self._folder / 'socket'}",
            f"--pid-file={self._folder / 'pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            "--skip-log-bin",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-buffer-pool-size=32M",
        ]


SERVERS: dict[str, type[DatabaseServer]] = {"postgres": PostgresServer, "mysql": MariaServer}

if __name__ == "__main__":
    with ExitStack() as running:
        server = running.enter_context(SERVERS[sys.argv[1]]())
        pools = [running.enter_context(PgBouncer(server)) for _ in sys.argv[2:]]
        print(*(each.port for each in (server, *pools)), flush=True)
        sys.stdin.read()
