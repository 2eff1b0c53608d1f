"""The documentation tells the truth: each of its programs runs, and says everything in both languages.

A fenced block marked `python` or `ts` is a whole program that ends by itself; `python pytest` and `ts vitest` are test
files. A block with the further word `fragment` shows something and is not run. The two programs of the README do not
end: they are one scene.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"^```(python|ts)\b *(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DEADLINE = 60.0


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    kind: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def save(self, folder: Path) -> Path:
        name = f"test_{self.page.stem}.py" if self.language == "python" else f"{self.page.stem}.test.ts"
        path = folder / name.replace("-", "_")
        path.write_text(self.code)
        return path

    def command(self, folder: Path) -> list[str]:
        program = str(self.save(folder))
        return {
            ("python", ""): [sys.executable, "-u", "-W", "error", program],
            ("python", "pytest"): [sys.executable, "-m", "pytest", "-q", "--noconftest", "-c", "/dev/null", program],
            ("ts", ""): ["node", "--import", "tsx", program],
            ("ts", "vitest"): ["node", str(ROOT / "node_modules/vitest/vitest.mjs"), "run", "--root", str(folder)],
        }[self.language, self.kind]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[1], found[2].strip(), found[3])
        for found in FENCE.finditer(text)
    ]


PROGRAMS = [block for page in PAGES for block in blocks(page) if "fragment" not in block.kind]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in the repository, where Node finds the package under its own name."""
    folder = Path(tempfile.mkdtemp(prefix=".run-", dir=Path(__file__).parent))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_said_in_one_language_is_said_in_the_other(page: Path) -> None:
    count = Counter(block.language for block in blocks(page))
    assert count["python"] == count["ts"]


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_runs(block: Block, folder: Path) -> None:
    ended = subprocess.run(block.command(folder), cwd=folder, capture_output=True, text=True, timeout=DEADLINE)
    assert ended.returncode == 0, f"{block}\n{ended.stdout}\n{ended.stderr}"


def test_the_two_programs_of_the_readme_meet(folder: Path) -> None:
    scene = {block.language: block for block in blocks(ROOT / "README.md")}
    processes = []
    try:
        for language, expected in (("ts", "waiting for orders"), ("python", "shipment.packed o-1 ")):
            command = scene[language].command(folder)
            processes.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True))
            assert processes[-1].stdout is not None
            assert processes[-1].stdout.readline().startswith(expected)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
