"""FlexiQ, in two ways: `task` (enqueue_many, async task) and `topic` (publish, log consumer).

It opens its file with synchronous=NORMAL and has no option for that. Idle is a worker with 20 tasks. A log topic has no
batch publish, and its consumer acknowledges up to 100 events after the last of them, which is left out here.
"""

import logging
import os
import threading
import time
from typing import Any

from common import BATCH, ask, batches, now, payload, percentiles, say, wait_for_go
from flexiq import Queue

logging.disable(logging.CRITICAL)
# The fastest of what we tried. The defaults (1 job per round, a round every 50 ms, a thread per core) end at 75 per
# second; push_dispatch does not reach another process, whose worker then looks every 2 seconds.
queue = Queue(ask.path, scheduler_batch_size=100, scheduler_poll_interval_ms=1, workers=64)
handled = 0
done = threading.Event()
delays: list[int] = []


async def receive(event: dict[str, Any]) -> None:
    global handled
    if ask.latency:
        delays.append(now() - event["sent"])
    handled += 1
    if handled == ask.events:
        done.set()


def produce() -> None:
    wait_for_go()
    started = now()
    if ask.per_second:
        for i in range(ask.events):
            time.sleep(max(0, (started + i * 1e9 / ask.per_second - now()) / 1e9))
            queue.enqueue("receive", (payload(i, now()),))
    elif ask.how == "task":
        for batch in batches(ask.events, BATCH):
            queue.enqueue_many("receive", [(payload(i),) for i in batch])
    else:
        for i in range(ask.events):
            queue.publish("orders", payload(i))
    say(started=started, ended=now())


def unfinished() -> int:
    stats = queue.stats()
    return stats["pending"] + stats["running"]


def watch() -> None:
    say(ready=True)
    done.wait()
    while ask.how == "task" and unfinished():
        time.sleep(0.001)
    say(ended=now(), handled=handled, **(percentiles(delays) if delays else {}))
    os._exit(0)


def idle() -> None:
    time.sleep(2)
    cpu, wall = time.process_time(), time.monotonic()
    time.sleep(ask.seconds)
    say(percent=100 * (time.process_time() - cpu) / (time.monotonic() - wall))
    os._exit(0)


def run_worker(beside: Any) -> None:
    threading.Thread(target=beside, daemon=True).start()
    queue.run_worker()


if ask.part == "produce":
    queue.task("receive")(receive)
    produce()
elif ask.part == "idle":
    for n in range(20):
        queue.task(f"receive{n}")(receive)
    run_worker(idle)
else:
    if ask.how == "task":
        queue.task("receive")(receive)
    else:
        queue.log_consumer("orders", "bench", poll_interval=0.001, batch_size=100)(receive)
    run_worker(watch)
