"""honker, in three ways: `claim` (its iterator over a queue), `batch` (claim_batch and ack_batch), `stream` (pub/sub).

It opens its file with synchronous=NORMAL and has no option for that.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import honker
from common import BATCH, ask, batches, now, pace, payload, percentiles, say, wait_for_go

Handler = Callable[[Any], Awaitable[None]]


async def produce(db: honker.Database) -> None:
    queue, stream = db.queue("orders"), db.stream("orders")
    put = stream.publish if ask.how == "stream" else queue.enqueue
    wait_for_go()
    started = now()
    if ask.per_second:
        async for i in pace(ask.events, ask.per_second):
            put(payload(i, now()))
    else:
        for batch in batches(ask.events, BATCH):
            with db.transaction() as tx:
                for i in batch:
                    put(payload(i), tx=tx)
    say(started=started, ended=now())


async def claim(db: honker.Database, handler: Handler) -> None:
    done = 0
    async for job in db.queue("orders").claim("worker"):
        await handler(job)
        job.ack()
        done += 1
        if done == ask.events:
            return


async def batch(db: honker.Database, handler: Handler) -> None:
    queue, done = db.queue("orders"), 0
    updates = db.update_events()
    while done < ask.events:
        jobs = queue.claim_batch("worker", 128)
        if not jobs:
            await updates.__anext__()
            continue
        for job in jobs:
            await handler(job)
        done += queue.ack_batch([job.id for job in jobs], "worker")


async def stream(db: honker.Database, handler: Handler) -> None:
    events, done = db.stream("orders"), 0
    async for event in events.subscribe(consumer="worker"):
        await handler(event)
        done += 1
        if done == ask.events:
            events.save_offset("worker", event.offset)
            return


async def consume(db: honker.Database) -> None:
    handled, delays = 0, []

    async def count(job: Any) -> None:
        nonlocal handled
        handled += 1

    async def clock(job: Any) -> None:
        entered = now()
        delays.append(entered - job.payload["sent"])
        await count(job)

    db.queue("orders")
    say(ready=True)
    run = {"claim": claim, "batch": batch, "stream": stream}[ask.how]
    await run(db, clock if ask.latency else count)
    say(ended=now(), handled=handled, **(percentiles(delays) if delays else {}))


async def idle(db: honker.Database) -> None:
    import time

    async def listen(name: str) -> None:
        async for job in db.queue(name).claim("worker"):
            job.ack()

    tasks = [asyncio.create_task(listen(f"orders{i}")) for i in range(20)]
    await asyncio.sleep(2)
    cpu, wall = time.process_time(), time.monotonic()
    await asyncio.sleep(ask.seconds)
    say(percent=100 * (time.process_time() - cpu) / (time.monotonic() - wall))
    for task in tasks:
        task.cancel()


asyncio.run({"produce": produce, "consume": consume, "idle": idle}[ask.part](honker.open(ask.path)))
