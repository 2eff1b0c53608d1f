"""Measures polybus beside its peers and rewrites the tables of bench/README.md; `--help` lists the options."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Iterable

from harness import BENCH, ROOT, Failed
from measures import Measure, Row, measures
from measures_outbox import outbox_measures
from measures_redis import redis_measures

README = BENCH / "README.md"


class Results:
    """The figures of one measure's rounds, and what went wrong instead."""

    def __init__(self) -> None:
        self.samples: dict[str, list[float]] = {}
        self.errors: dict[str, str] = {}

    def run(self, measure: Measure, rounds: int) -> None:
        for n in range(rounds):
            for name, runner in measure.runners.items():
                if name in self.errors:
                    continue  # it would fail again
                try:
                    facts = runner()
                except (Failed, OSError, subprocess.TimeoutExpired) as error:
                    self.errors[name] = str(error) or type(error).__name__
                    print(f"  round {n + 1}: {name}: failed: {self.errors[name]}", flush=True)
                    continue
                figures = {fact: value for fact, value in facts.items() if fact not in ("ended", "handled")}
                for fact, value in figures.items():
                    self.samples.setdefault(f"{name}.{fact}", []).append(value)
                shown = ", ".join(f"{fact} {number(value)}" for fact, value in figures.items())
                print(f"  round {n + 1}: {name}: {shown}", flush=True)

    def median(self, figure: str) -> float | None:
        found = self.samples.get(figure)
        return statistics.median(found) if found else None

    def show(self, figure: str) -> str:
        """Median (min - max), or why there is none."""
        found, (name, _, _) = self.samples.get(figure), figure.rpartition(".")
        if name in self.errors:
            return f"failed: {self.errors[name][:160]}".replace("|", "\\|")
        if not found:
            return "not measured"
        return f"**{number(statistics.median(found))}** ({number(min(found))} - {number(max(found))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def line(row: Row, results: Results) -> Iterable[str]:
    ours, theirs = results.median(row.ours), results.median(row.peer)
    ratio = ours / theirs if ours and theirs else None
    wanted = [
        (row.at_least, "≥ {}", ours, 1),
        (row.at_most, "≤ {}", ours, -1),
        (row.ratio_at_least, "≥ {} x", ratio, 1),
        (row.ratio_at_most, "≤ {} x", ratio, -1),
    ]
    targets = [(text.format(number(goal)), got, goal, sign) for goal, text, got, sign in wanted if goal is not None]
    met = [got is not None and got * sign >= goal * sign for _, got, goal, sign in targets]
    beside = f"{row.peer.rpartition('.')[0]}: {results.show(row.peer)}" if row.peer else ""
    yield row.what
    yield results.show(row.ours)
    yield beside
    yield f"{ratio:.3g} x" if ratio else ""
    yield ", ".join(text for text, *_ in targets)
    if not targets or any(got is None for _, got, _, _ in targets):
        yield "not measured" if targets else ""
    else:
        yield "yes" if all(met) else "**no**"


def table(measure: Measure, results: Results, rounds: int) -> str:
    head = ["measure", f"polybus{measure.unit and f', {measure.unit}'}", "beside it", "ratio", "target", "reached"]
    lines = [head, ["---"] * len(head), *[list(line(row, results)) for row in measure.rows]]
    commit = output("git", "rev-parse", "--short", "HEAD") or "unknown"
    ran = f"{datetime.date.today()}, commit {commit}, {rounds} round{'s' if rounds > 1 else ''}, "
    ran += f"load at the end {os.getloadavg()[0]:.1f}"
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in lines] + ["", f"({ran})"])


def output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "not found"


def pins() -> str:
    """The peers, each in its exact version."""
    lines = [line for file in BENCH.glob("requirements*.txt") for line in file.read_text(encoding="utf-8").splitlines()]
    found = [re.sub(r"\[.*\]", "", line).split("==") for line in sorted(set(lines)) if "==" in line]
    wanted = json.loads((BENCH / "package.json").read_text(encoding="utf-8"))["dependencies"]
    python = ", ".join(" ".join(pin) for pin in found)
    return f"Python: {python}; Node: " + ", ".join(f"{name} {version}" for name, version in wanted.items())


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = re.search(r"model name\s*:\s*(.+)", file.read())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = [
        f"{os.cpu_count()} cores, {model[1] if model else 'processor unknown'}, {memory:.0f} GiB, {platform.system()}",
        f"Python {platform.python_version()} with SQLite {sqlite3.sqlite_version}, Node {output('node', '--version')}, "
        + " ".join(output("rustc", "--version").split()[:2]),
        (re.search(r"v=\S+", output("redis-server", "--version")) or ["no redis-server"])[0].replace("v=", "Redis "),
        pins(),
    ]
    return "\n".join(f"- {fact}" for fact in facts)


def rewrite(section: str, text: str) -> None:
    """Replace what stands between the section's two markers in the README."""
    first, last = f"<!-- {section}: written by run.py -->", f"<!-- end of {section} -->"
    before, found, rest = README.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not found or not end:
        raise SystemExit(f"{README} has lost its markers of {section!r}: {first} … {last}")
    README.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = list(measures(quick=False) | redis_measures(quick=False) | outbox_measures(quick=False))
    local = list(measures(quick=False))
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*known, "redis", "outbox"],
        default=local,
        metavar="MEASURE",
        help=f"{', '.join(known)}; redis, outbox: all of those (without this option: all others)",
    )
    parser.add_argument("--rounds", type=int, help="rounds of each program, interleaved (5; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small runs that show that all works; README.md stays")
    parser.add_argument("--dry", action="store_true", help="only print; README.md stays")
    options = parser.parse_args()
    # As Ctrl+C does: whatever was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = options.rounds or (1 if options.quick else 5)

    groups = {"redis": redis_measures(options.quick), "outbox": outbox_measures(options.quick)}
    chosen = measures(options.quick) | groups["redis"] | groups["outbox"]
    names = [name for only in options.only for name in groups.get(only, [only])]

    print(machine(), flush=True)
    for name in names:
        measure, results = chosen[name], Results()
        print(f"\n{name}: {measure.title}", flush=True)
        results.run(measure, rounds)
        text = table(measure, results, rounds)
        print(f"\n{text}", flush=True)
        if not options.quick and not options.dry:
            rewrite(name, text)
            rewrite("machine", machine())


if __name__ == "__main__":
    main()
