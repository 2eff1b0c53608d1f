"""taskiq-redis: a stream broker without results, its receiver in this process, 100 tasks at once."""

import asyncio
import logging
from typing import Any

from common import ask, now, payload, say, spread, wait_for_go
from redis import asyncio as aioredis
from taskiq.api import run_receiver_task
from taskiq_redis import RedisStreamBroker

logging.disable(logging.CRITICAL)
broker = RedisStreamBroker(ask.url)
handled = 0
done = asyncio.Event()


@broker.task(task_name="count")
async def count(event: Any) -> None:
    global handled
    handled += 1
    if handled == ask.events:
        done.set()


async def produce() -> None:
    await broker.startup()
    wait_for_go()
    started = now()
    await spread(ask.events, 100, lambda i: count.kiq(payload(i)))
    say(started=started, ended=now())
    await broker.shutdown()


async def consume() -> None:
    broker.is_worker_process = True
    await broker.startup()
    worker = asyncio.create_task(run_receiver_task(broker, validate_params=False))
    async with aioredis.Redis.from_url(ask.url) as client:
        say(ready=True)
        await done.wait()
        while (await client.xpending("taskiq", "taskiq"))["pending"]:  # noqa: ASYNC110 - nothing else says it
            await asyncio.sleep(0.001)
    say(ended=now(), handled=handled)
    worker.cancel()
    await asyncio.wait([worker])
    await broker.shutdown()


asyncio.run({"produce": produce, "consume": consume}[ask.part]())
