"""The command `polybus` of the Python package."""

from __future__ import annotations

import subprocess
import sys

import pytest


def polybus(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polybus", *arguments], capture_output=True, text=True, check=False, timeout=30
    )


def test_prints_the_tables() -> None:
    said = polybus("outbox", "ddl", "--dialect", "postgres", "--table", "shop.outbox")
    assert (said.returncode, said.stderr) == (0, "")
    assert 'CREATE TABLE IF NOT EXISTS "shop"."outbox"' in said.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["outbox", "ddl", "--dialect", "postgras"], 2, "postgres"),
        (["outbox", "ddl", "--dialect", "sqlite", "--table", "a;b"], 1, "letters, digits and _"),
        ([], 2, "Usage: polybus"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, words: str) -> None:
    said = polybus(*arguments)
    assert (said.returncode, said.stdout) == (code, "")
    assert words in said.stderr


def test_a_reader_that_goes_is_no_failure() -> None:
    program = f"{sys.executable} -m polybus outbox ddl --dialect postgres | head -c 1; exit ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (said.returncode, said.stderr) == (0, "")
