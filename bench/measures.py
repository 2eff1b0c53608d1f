"""What is measured, how much of it, and which figures are put side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from harness import Facts, alone, crowd, pair, pattern_example


@dataclass(frozen=True)
class Row:
    """One line of the table: a figure of ours, beside a peer's. Both are `<runner>.<fact>`."""

    what: str
    ours: str
    peer: str = ""
    at_least: float | None = None
    at_most: float | None = None
    ratio_at_least: float | None = None
    ratio_at_most: float | None = None


@dataclass(frozen=True)
class Measure:
    title: str
    unit: str
    runners: dict[str, Callable[[], Facts]]
    rows: list[Row] = field(default_factory=list)


def measures(quick: bool) -> dict[str, Measure]:
    """By the name that `--only` takes. Quick ones show that all of it runs, not how fast it is."""

    def size(full: int, small: int) -> int:
        return small if quick else full

    return {
        "patterns": patterns(),
        "memory": memory(size(300_000, 20_000), size(1_000_000, 100_000)),
        "end-to-end": end_to_end(size(200_000, 10_000), size(30_000, 1_000), size(8_000, 500)),
        "publish": publish(size(5_000, 300), size(64_000, 3_200)),
        "latency": latency(size(20, 3)),
        "idle": idle(size(10, 2)),
    }


def patterns() -> Measure:
    return Measure(
        "Patterns: 100,000 live ones",
        "",
        {"core": pattern_example},
        [
            Row("match one event type, ns", "core.match_ns", at_most=150),
            Row("match, 20,000 types in turn (cold caches), ns", "core.match_cold_ns"),
            Row("subscribe and unsubscribe one, µs", "core.subscribe_unsubscribe_us", at_most=2),
        ],
    )


def memory(python: int, node: int) -> Measure:
    runners: dict[str, Callable[[], Facts]] = {}
    rows: list[Row] = []
    languages = [
        ("Python", "memory_polybus.py", python, 150_000, "memory_peers.py", ("create_task", "pyee", "blinker")),
        ("Node", "memory_polybus.mjs", node, 250_000, "memory_peers.mjs", ("eventemitter3", "emittery")),
    ]
    for language, ours, events, target, theirs, peers in languages:
        for prebuilt, suffix in ((False, ""), (True, ", events prebuilt")):
            what = language + suffix
            runners[what] = partial(alone, ours, events=events, prebuilt=prebuilt)
            rows.append(Row(what, f"{what}.rate", at_least=None if prebuilt else target))
            for peer in peers:
                runners[peer + suffix] = partial(alone, theirs, events=events, prebuilt=prebuilt, peer=peer)
                ratio = 0.5 if peer == "create_task" else None
                rows.append(Row(what, f"{what}.rate", f"{peer}{suffix}.rate", ratio_at_least=ratio))
    return Measure("Memory: publish_many of 1,000, async handler, 1,024 in flight", "events/s", runners, rows)


def end_to_end(ours: int, fast: int, slow: int) -> Measure:
    """`fast` and `slow`: events for peers, so that each takes a few seconds."""
    honker = partial(pair, "peer_honker.py", "peer_honker.py")
    flexiq = partial(pair, "peer_flexiq.py", "peer_flexiq.py")
    runners: dict[str, Callable[[], Facts]] = {
        "Python": partial(pair, "consume_polybus.py", "produce_polybus.py", events=ours, durability="normal"),
        "Node": partial(pair, "consume_polybus.mjs", "produce_polybus.mjs", events=ours, durability="normal"),
        "hand-written sqlite3": partial(pair, "peer_loop.py", "peer_loop.py", events=ours),
        "honker claim": partial(honker, how="claim", events=slow),
        "honker claim_batch": partial(honker, how="batch", events=fast),
        "honker stream": partial(honker, how="stream", events=fast),
        "FlexiQ task": partial(flexiq, how="task", events=slow),
        "FlexiQ log topic": partial(flexiq, how="topic", events=slow),
    }
    peers = [name for name in runners if name not in ("Python", "Node")]
    tenfold = ("honker", "FlexiQ")
    rows = [
        Row("Python → Python", "Python.rate", at_least=60_000),
        *[
            Row(
                "Python → Python",
                "Python.rate",
                f"{peer}.rate",
                ratio_at_least=10 if peer.startswith(tenfold) else None,
            )
            for peer in peers
        ],
        Row("Node → Node", "Node.rate", at_least=80_000),
        Row("Node → Node", "Node.rate", "hand-written sqlite3.rate"),
    ]
    return Measure(
        "SQLite end to end: batches of 100 → async handler → settled, durability normal", "events/s", runners, rows
    )


def publish(one: int, many: int) -> Measure:
    floor = "sqlite3 commit loop"
    runners: dict[str, Callable[[], Facts]] = {floor: partial(alone, "sqlite_commits.py", events=one)}
    rows = []
    for name, task in (("Python", "publish_polybus.py"), ("Node", "publish_polybus.mjs")):
        for publishers, events, ratio in ((1, one, 0.8), (64, many, 5)):
            runner = f"{name} {publishers}"
            ask: Facts = {"events": events, "publishers": publishers, "durability": "full"}
            runners[runner] = partial(alone, task, **ask)
            what = f"{name}, one awaited at a time" if publishers == 1 else f"{name}, {publishers} concurrent"
            rows.append(Row(what, f"{runner}.rate", f"{floor}.rate", ratio_at_least=ratio))
    return Measure("SQLite publish only, durability full", "events/s", runners, rows)


def latency(seconds: int) -> Measure:
    paced = partial(pair, latency=True, per_second=200, events=200 * seconds)
    honker = partial(paced, "peer_honker.py", "peer_honker.py")
    runners: dict[str, Callable[[], Facts]] = {}
    rows = []
    for durability in ("full", "normal"):
        for name, consumer in (("Python → Python", "consume_polybus.py"), ("Python → Node", "consume_polybus.mjs")):
            runner = f"{name}, {durability}"
            runners[runner] = partial(paced, consumer, "produce_polybus.py", durability=durability)
            rows += [
                Row(f"{runner}, {fact}", f"{runner}.{fact}", at_most=most) for fact, most in (("p50", 3), ("p99", 15))
            ]
    runners["honker claim"] = partial(honker, how="claim")
    runners["honker stream"] = partial(honker, how="stream")
    runners["FlexiQ task"] = partial(paced, "peer_flexiq.py", "peer_flexiq.py", how="task")
    # The peers' files have synchronous=NORMAL.
    for peer in ("honker claim", "honker stream", "FlexiQ task"):
        rows += [
            Row(f"Python → Python, normal, {fact}", f"Python → Python, normal.{fact}", f"{peer}.{fact}")
            for fact in ("p50", "p99")
        ]
    return Measure("SQLite latency at 200/s: publish → handler entry in another process", "ms", runners, rows)


def idle(seconds: int) -> Measure:
    return Measure(
        "Idle: 20 subscriptions on a SQLite file",
        "% of a core",
        {
            "Python": partial(crowd, "idle_polybus.py", 1, subscriptions=20, seconds=seconds),
            "Node": partial(crowd, "idle_polybus.mjs", 1, subscriptions=20, seconds=seconds),
            "honker": partial(alone, "peer_honker.py", part="idle", seconds=seconds),
            "FlexiQ": partial(alone, "peer_flexiq.py", part="idle", seconds=seconds, latency=False, per_second=0),
        },
        [
            Row("Python", "Python.percent", at_most=1),
            Row("Python", "Python.percent", "honker.percent"),
            Row("Python", "Python.percent", "FlexiQ.percent"),
            Row("Node", "Node.percent", at_most=1),
        ],
    )
