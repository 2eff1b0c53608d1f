"""What is measured over Redis, how much of it, and which figures are put side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from harness import Facts, alone, crowd, pair
from measures import Measure, Row
from recovery import after_flush, after_kill, after_restart
from server import fresh_server, redis_benchmark

Runners = dict[str, Callable[[], Facts]]

both = partial(pair, fresh=fresh_server, durability="warn")
one = partial(alone, fresh=fresh_server, durability="warn")


def redis_measures(quick: bool) -> dict[str, Measure]:
    """By the name that `--only` takes. Quick ones show that all of it runs, not how fast it is."""

    def size(full: int, small: int) -> int:
        return small if quick else full

    return {
        "redis-end-to-end": end_to_end(size(200_000, 5_000), size(100, 10)),
        "redis-publish": publish(size(10_000, 500), size(100_000, 5_000)),
        "redis-latency": latency(size(20, 3)),
        "redis-idle": idle(size(10, 2)),
        "redis-recovery": recovery(),
    }


def end_to_end(fast: int, slow: int) -> Measure:
    """`slow`: per cent of what a slow peer takes in a few seconds."""
    redis_py, ioredis = "hand-written redis-py", "hand-written ioredis"
    python = partial(both, "consume_polybus.py", "produce_polybus.py", events=fast)
    node = partial(both, "consume_polybus.mjs", "produce_polybus.mjs", events=fast)
    rust = partial(both, "redis_bench", "redis_bench", events=fast)

    def peer(task: str, events: int, how: str = "") -> Callable[[], Facts]:
        return partial(both, task, task, events=events, how=how)

    runners: Runners = {
        "Python": python,
        "Python, 100 publishers": partial(python, publishers=100),
        redis_py: peer("peer_redis_py.py", fast // 2),
        "FastStream": peer("peer_faststream.py", 150 * slow, "one"),
        "FastStream batch": peer("peer_faststream.py", 500 * slow, "batch"),
        "taskiq-redis": peer("peer_taskiq.py", 100 * slow),
        "dramatiq": peer("peer_dramatiq.py", 50 * slow),
        "celery": peer("peer_celery.py", 20 * slow),
        "arq": peer("peer_arq.py", 50 * slow),
        "BullMQ for Python": peer("peer_bullmq.py", 50 * slow),
        "Node": node,
        "Node, 100 publishers": partial(node, publishers=100),
        ioredis: peer("peer_ioredis.mjs", fast, "loop"),
        "BullMQ addBulk": peer("peer_bullmq.mjs", 200 * slow, "bulk"),
        "BullMQ 100 adds": peer("peer_bullmq.mjs", 200 * slow, "add"),
        "Rust": partial(rust, how="polybus"),
        "bare redis-rs": partial(rust, how="bare"),
    }
    targets: dict[str, list[tuple[str, float | None]]] = {
        "Python": [
            (redis_py, 1.5),
            ("FastStream", 20),
            ("FastStream batch", 3),
            *[(name, None) for name in ("taskiq-redis", "dramatiq", "celery", "arq", "BullMQ for Python")],
        ],
        "Python, 100 publishers": [(redis_py, 1.3)],
        "Node": [(ioredis, 1.3), ("BullMQ addBulk", 8), ("BullMQ 100 adds", 8)],
        "Node, 100 publishers": [(ioredis, 1.1)],
        "Rust": [("bare redis-rs", 0.8)],
    }
    rows = [
        Row(f"{ours}, events/s", f"{ours}.rate", f"{theirs}.rate", ratio_at_least=ratio)
        for ours, beside in targets.items()
        for theirs, ratio in beside
    ]
    rows += [
        Row(f"{ours}, Redis CPU per event, µs", f"{ours}.cpu", f"{theirs}.cpu", ratio_at_most=1.3)
        for ours, theirs in (("Python", redis_py), ("Node", ioredis), ("Rust", "bare redis-rs"))
    ]
    return Measure("Redis end to end: batches of 100 → async handler → settled", "", runners, rows)


def publish(alone_: int, many: int) -> Measure:
    def ours(task: str, publishers: int, events: int) -> Callable[[], Facts]:
        return partial(one, task, publishers=publishers, events=events)

    def theirs(task: str, publishers: int, events: int, how: str = "") -> Callable[[], Facts]:
        return partial(one, task, part="publish", publishers=publishers, events=events, how=how)

    loop, node = "peer_redis_py.py", "peer_ioredis.mjs"
    server = [f"redis-benchmark, {what}" for what in ("1 client", "100 clients", "50 pipelines of 100")]
    runners: Runners = {
        "Python 1": ours("publish_polybus.py", 1, alone_),
        "Python 100": ours("publish_polybus.py", 100, many),
        "Python batches": ours("publish_polybus.py", 0, many),
        "redis-py, 1": theirs(loop, 1, alone_),
        "redis-py, 100": theirs(loop, 100, many // 5),
        "redis-py, pipelines of 100": theirs(loop, 0, many),
        "Node 1": ours("publish_polybus.mjs", 1, alone_),
        "Node 100": ours("publish_polybus.mjs", 100, many),
        "Node batches": ours("publish_polybus.mjs", 0, many),
        "ioredis, 1": theirs(node, 1, alone_),
        "ioredis, 100": theirs(node, 100, many),
        "ioredis, 100, autopipelining": theirs(node, 100, many, "autopipelining"),
        "ioredis, pipelines of 100": theirs(node, 0, many),
        server[0]: partial(redis_benchmark, alone_, 1, 1),
        server[1]: partial(redis_benchmark, many, 100, 1),
        server[2]: partial(redis_benchmark, 5 * many, 50, 100),
    }
    kinds = [("1", "one awaited at a time"), ("100", "100 concurrent"), ("batches", "publish_many of 100")]
    beside: dict[str, list[tuple[str, float | None]]] = {
        "Python 1": [("redis-py, 1", 1), (server[0], None)],
        "Python 100": [("redis-py, 100", 6), (server[1], None)],
        "Python batches": [("redis-py, pipelines of 100", None), (server[2], None)],
        "Node 1": [("ioredis, 1", 1), (server[0], None)],
        "Node 100": [("ioredis, 100", 1.2), ("ioredis, 100, autopipelining", 1.2), (server[1], None)],
        "Node batches": [("ioredis, pipelines of 100", None), (server[2], None)],
    }
    rows = [
        Row(f"{language}, {what}", f"{language} {kind}.rate", f"{peer}.rate", ratio_at_least=ratio)
        for language in ("Python", "Node")
        for kind, what in kinds
        for peer, ratio in beside[f"{language} {kind}"]
    ]
    return Measure("Redis publish only", "events/s", runners, rows)


def latency(seconds: int) -> Measure:
    paced = partial(both, latency=True, per_second=200, events=200 * seconds, how="loop")
    runners: Runners = {
        "Python": partial(paced, "consume_polybus.py", "produce_polybus.py"),
        "hand-written redis-py": partial(paced, "peer_redis_py.py", "peer_redis_py.py"),
        "Node": partial(paced, "consume_polybus.mjs", "produce_polybus.mjs"),
        "hand-written ioredis": partial(paced, "peer_ioredis.mjs", "peer_ioredis.mjs"),
    }
    rows = [
        Row(f"{ours} → {ours}, {fact}", f"{ours}.{fact}", f"{theirs}.{fact}", ratio_at_most=1)
        for ours, theirs in (("Python", "hand-written redis-py"), ("Node", "hand-written ioredis"))
        for fact in ("p50", "p99")
    ]
    return Measure("Redis latency at 200/s: publish → handler entry in another process", "ms", runners, rows)


def idle(seconds: int) -> Measure:
    crowds = partial(crowd, processes=10, fresh=fresh_server, subscriptions=50, seconds=seconds)
    runners: Runners = {
        "Python": partial(crowds, "idle_polybus.py"),
        "Node": partial(crowds, "idle_polybus.mjs"),
    }
    rows = []
    for name in runners:
        rows += [
            Row(f"{name}, a process, % of a core", f"{name}.percent", at_most=1),
            Row(f"{name}, the busiest process, % of a core", f"{name}.most", at_most=1),
            Row(f"{name}, the server, % of a core", f"{name}.server"),
            Row(f"{name}, connections of a process", f"{name}.connections"),
        ]
    return Measure("Idle on Redis: 10 processes with 50 subscriptions each", "", runners, rows)


def recovery() -> Measure:
    runners: Runners = {"kill": after_kill, "flush": after_flush, "restart": after_restart}
    rows = [
        Row("last redelivery after kill -9 of a consumer, leases", "kill.leases", at_most=2),
        Row("first event after FLUSHALL, s", "flush.seconds", at_most=2),
        Row("first event after the server is back, s", "restart.seconds", at_most=2),
        *[Row(f"lost ({name})", f"{name}.lost", at_most=0) for name in runners],
    ]
    return Measure("Redis recovery: a dead consumer, an emptied server, a restarted server", "", runners, rows)
