"""Python programs as processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

# A program says `Bus(URL, …)` and has the bus of its test, which is one of many on a shared server. A shell that runs
# the tests in the background lets them ignore Ctrl-C, and they would hand that on.
PRELUDE = """
import asyncio, functools, os, sys, threading, time, signal
from polybus import *
signal.signal(signal.SIGINT, signal.default_int_handler)
URL = sys.argv[1]
Bus = functools.partial(Bus, bus=os.environ.get("TEST_BUS", "default"))
def say(*words):
    print(*words, flush=True)
"""


class Program:
    """A Python program with its output and how long it took to end."""

    def __init__(self, code: str, url: str, *arguments: str, stdin: bool = False) -> None:
        source = PRELUDE + textwrap.dedent(code)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-W", "error", "-c", source, url, *arguments],
            stdin=subprocess.PIPE if stdin else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise AssertionError(f"the program ended: {self.process.stderr.read() if self.process.stderr else ''}")
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self, timeout: float = 20) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
            out, err = self.process.communicate()
            raise AssertionError(f"the program hangs\n{out}\n{err}") from None
        return self.process.returncode, out, err


def run(code: str, url: str, *arguments: str, timeout: float = 20) -> str:
    """Runs to the end; the program must end well and complain about nothing."""
    status, out, err = Program(code, url, *arguments).end(timeout)
    assert (status, err) == (0, ""), f"status {status}\n{out}\n{err}"
    return out
