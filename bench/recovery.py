"""How long events stay away after a consumer or the server has gone, and how many never come."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import Facts, Failed, Program
from server import Server, fresh_server

#: Seconds.
LEASE = 2.0
HELD = 100
LONG = 10**6

Notes = dict[int, int]


def task(server: Server, part: str, **ask: Any) -> Program:
    return Program("recover_polybus.py", {**server.told, "part": part, "lease": LEASE, "hold": False, **ask})


def seen(consumer: Program) -> Notes:
    """By event, when a handler first got it."""
    consumer.go()
    return dict(reversed(consumer.hear()["seen"]))


def wait(reached: Callable[[], bool], seconds: float) -> None:
    """Until it is so, or has not become so in time: the figures tell."""
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.05)


def after_kill() -> Facts:
    """After `kill -9` of a process that holds 100 events, while another one of its group is there."""
    with fresh_server() as server, task(server, "consume", hold=True) as holder:
        holder.hear()
        with task(server, "produce", events=HELD) as producer:
            producer.hear()
            producer.go()
            producer.hear()
            producer.go()
        wait(lambda: len(seen(holder)) == HELD, 10)
        with task(server, "consume") as heir:
            heir.hear()
            killed = time.monotonic_ns()
            holder.kill()
            wait(lambda: len(seen(heir)) == HELD, 10 * LEASE)
            notes = seen(heir)
            heir.kill()
    if not notes:
        raise Failed("nothing was redelivered")
    return {"leases": (max(notes.values()) - killed) / 1e9 / LEASE, "lost": HELD - len(notes)}


def disturbed(disturb: Callable[[Server], None], forgets: bool) -> Facts:
    """100 events per second flow all the time; those count as lost whose publish was confirmed.

    Of a server that `forgets`, only those whose publish began afterwards.
    """
    with (
        fresh_server() as server,
        task(server, "consume") as consumer,
        task(server, "produce", events=LONG) as producer,
    ):
        consumer.hear()
        producer.hear()
        producer.go()
        time.sleep(2)
        disturb(server)
        since = time.monotonic_ns()
        time.sleep(5)
        producer.go()
        published = producer.hear()["published"]
        wanted = {i for i, started in published if started >= since or not forgets}
        wait(lambda: wanted <= seen(consumer).keys(), 10)
        notes = seen(consumer)
        consumer.kill()
        producer.kill()
    later = [at for i, at in notes.items() if i in wanted and at >= since]
    if not later:
        raise Failed("no event came any more")
    return {"seconds": (min(later) - since) / 1e9, "lost": len(wanted - notes.keys())}


def flush(server: Server) -> None:
    server.say("FLUSHALL")


def restart(server: Server) -> None:
    server.stop()
    time.sleep(1)
    server.start()


after_flush = partial(disturbed, flush, forgets=True)
after_restart = partial(disturbed, restart, forgets=False)
