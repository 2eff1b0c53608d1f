"""FastStream on a Redis stream with a consumer group: `one` (max_records of 100, one by one) or `batch`.

Logs and dependency injection are off. Batches are published through its pipeline.
"""

import asyncio
from typing import Any

from common import BATCH, ask, batches, now, payload, say, wait_for_go
from faststream.redis import RedisBroker, StreamSub
from redis import asyncio as aioredis

STREAM, GROUP = "events", "bench"


async def produce() -> None:
    async with RedisBroker(ask.url, logger=None) as broker, aioredis.Redis.from_url(ask.url) as client:
        wait_for_go()
        started = now()
        for batch in batches(ask.events, BATCH):
            async with client.pipeline(transaction=False) as raw:
                for i in batch:
                    await broker.publish(payload(i), stream=STREAM, pipeline=raw)
                await raw.execute()
        say(started=started, ended=now())


async def consume() -> None:
    handled, done = 0, asyncio.Event()
    broker = RedisBroker(ask.url, logger=None, apply_types=False)
    whole = ask.how == "batch"

    @broker.subscriber(stream=StreamSub(STREAM, group=GROUP, consumer="one", batch=whole, max_records=BATCH))
    async def count(body: Any) -> None:
        nonlocal handled
        handled += len(body) if whole else 1
        if handled == ask.events:
            done.set()

    async with broker, aioredis.Redis.from_url(ask.url) as client:
        await broker.start()
        await asyncio.sleep(0.2)  # its reader starts behind it
        say(ready=True)
        await done.wait()
        while (await client.xpending(STREAM, GROUP))["pending"]:  # noqa: ASYNC110 - nothing else says it
            await asyncio.sleep(0.001)
        say(ended=now(), handled=handled)


asyncio.run({"produce": produce, "consume": consume}[ask.part]())
