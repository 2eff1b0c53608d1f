"""A hand-written loop on redis-py: a stream and a consumer group, batches of 100, each way one round trip per batch.

No retries, no patterns, no dead letters, no trimming, no redelivery of what a dead consumer held.
"""

import asyncio
import json
import uuid
from datetime import datetime, timezone
from typing import Any

import redis
from common import BATCH, TYPE, ask, batches, now, pace, payload, percentiles, rate, say, spread, wait_for_go
from redis import asyncio as aioredis

STREAM, GROUP = "events", "bench"


def fields(i: int, sent: int = 0) -> Any:
    """An event as an application writes it by hand: what happened, an id and the time."""
    meta = {"id": str(uuid.uuid4()), "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
    return {
        "t": TYPE,
        "e": json.dumps({"type": TYPE, "payload": payload(i, sent), "meta": meta}, separators=(",", ":")),
    }


def send_batches() -> None:
    """Without asyncio: there is nothing else to do, and it is a little faster."""
    client = redis.Redis.from_url(ask.url)
    for batch in batches(ask.events, BATCH):
        with client.pipeline(transaction=False) as pipe:
            for i in batch:
                pipe.xadd(STREAM, fields(i))
            pipe.execute()


async def send_paced() -> None:
    async with aioredis.Redis.from_url(ask.url) as client:
        async for i in pace(ask.events, ask.per_second):
            await client.xadd(STREAM, fields(i, now()))


def produce() -> None:
    redis.Redis.from_url(ask.url).ping()
    wait_for_go()
    started = now()
    if ask.per_second:
        asyncio.run(send_paced())
    else:
        send_batches()
    say(started=started, ended=now())


async def consume() -> None:
    handled, delays = 0, []

    async def count(event: Any) -> None:
        nonlocal handled
        handled += 1

    async def clock(event: Any) -> None:
        entered = now()
        delays.append(entered - json.loads(event[b"e"])["payload"]["sent"])
        await count(event)

    handler = clock if ask.latency else count
    async with aioredis.Redis.from_url(ask.url) as client:
        await client.xgroup_create(STREAM, GROUP, mkstream=True)
        say(ready=True)
        done: list[bytes] = []
        while handled < ask.events:
            # What was handled is acknowledged on the way to the next batch.
            pipe = client.pipeline(transaction=False)
            if done:
                pipe.xack(STREAM, GROUP, *done)
            pipe.xreadgroup(GROUP, "one", {STREAM: ">"}, count=BATCH, block=1000)
            *_, answer = await pipe.execute()
            taken = answer[0][1] if answer else []
            done = [id_ for id_, _ in taken]
            for _, event in taken:
                await handler(event)
        await client.xack(STREAM, GROUP, *done)
    say(ended=now(), handled=handled, **(percentiles(delays) if delays else {}))


async def publish() -> None:
    if not ask.publishers:
        started = now()
        send_batches()
        say(rate=rate(ask.events, started))
        return
    async with aioredis.Redis.from_url(ask.url) as client:
        await spread(ask.publishers, ask.publishers, lambda i: client.xadd(STREAM, fields(i)))  # opens the connections
        started = now()
        count = await spread(ask.events, ask.publishers, lambda i: client.xadd(STREAM, fields(i)))
        say(rate=rate(count, started))


if ask.part == "produce":
    produce()
else:
    asyncio.run({"consume": consume, "publish": publish}[ask.part]())
