"""A private redis-server for each runner: a free port, a fresh folder, AOF once a second; gone when its block ends."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

from harness import Facts, Failed, fresh_folder


class Server:
    def __init__(self, folder: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._folder = folder
        self.told: Facts = {"url": f"redis://127.0.0.1:{self.port}", "port": self.port}
        self.start()

    def start(self) -> None:
        """Start it, also again on what it wrote; returns when it answers."""
        if shutil.which("redis-server") is None:
            raise Failed("redis-server is not installed")
        options = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder, "save": "", "appendonly": "yes"}
        command = ["redis-server", "--appendfsync", "everysec", "--logfile", "redis.log"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise Failed(f"redis-server on port {self.port} did not start")
            time.sleep(0.005)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _answers(self) -> bool:
        """Whether it is there and has read what it wrote."""
        try:
            return self.say("PING") == "+PONG"
        except OSError:
            return False

    def stop(self) -> None:
        """As an operator does: it writes all it has."""
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def say(self, command: str) -> str:
        """One command on a connection of its own; the answer as it comes, without its end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(f"{command}\r\nQUIT\r\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode().removesuffix("+OK\r\n").strip()

    def _info(self, section: str, *names: str) -> float:
        text = self.say(f"INFO {section}")
        return sum(map(float, re.findall(rf"^(?:{'|'.join(names)}):([\d.]+)", text, re.MULTILINE)))

    def cpu(self) -> float:
        """Its own and its children's, which rewrite the log."""
        return self._info("cpu", "used_cpu_user", "used_cpu_sys", "used_cpu_user_children", "used_cpu_sys_children")

    def connections(self) -> int:
        return int(self._info("clients", "connected_clients")) - 1


@contextlib.contextmanager
def fresh_server() -> Iterator[Server]:
    with fresh_folder() as folder:
        server = Server(folder)
        try:
            yield server
        finally:
            server.stop()


def redis_benchmark(requests: int, clients: int, pipeline: int) -> Facts:
    """What the server can take: Redis's own client, XADD of 200 bytes."""
    with fresh_server() as server:
        command = ["redis-benchmark", "-p", str(server.port), "-n", str(requests), "-c", str(clients)]
        command += ["-P", str(pipeline), "--csv", "XADD", "events", "*", "t", "order.created", "e", "x" * 200]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.search(r'^"XADD[^"]*","([\d.]+)"', done.stdout, re.MULTILINE)
        if not found:
            raise Failed(f"redis-benchmark: {(done.stderr.strip() or done.stdout.strip())[:100]}")
        return {"rate": float(found[1])}
