"""BullMQ for Python: addBulk of 100, a worker with concurrency 50, finished jobs removed. The end is its last event."""

import asyncio
from typing import Any

from bullmq import Queue, Worker
from common import BATCH, TYPE, ask, batches, now, payload, say, wait_for_go

OPTIONS = {"removeOnComplete": True}


async def produce() -> None:
    queue = Queue("events", {"connection": ask.url})
    await queue.getJobCounts("wait")
    wait_for_go()
    started = now()
    for batch in batches(ask.events, BATCH):
        await queue.addBulk([{"name": TYPE, "data": payload(i), "opts": OPTIONS} for i in batch])
    say(started=started, ended=now())
    await queue.close()


async def consume() -> None:
    handled = settled = 0
    done = asyncio.Event()

    async def count(job: Any, token: str) -> None:
        nonlocal handled
        handled += 1

    def completed(*_: Any) -> None:
        nonlocal settled
        settled += 1
        if settled == ask.events:
            done.set()

    worker = Worker("events", count, {"connection": ask.url, "concurrency": 50})
    worker.on("completed", completed)
    await asyncio.sleep(0.2)
    say(ready=True)
    await done.wait()
    say(ended=now(), handled=handled)
    await worker.close(force=True)


asyncio.run({"produce": produce, "consume": consume}[ask.part]())
