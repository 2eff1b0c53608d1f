"""The producer: `publish_many` of 100, or so many `publishers` at once, or one event at a time at a given rate."""

import asyncio

from common import BATCH, TYPE, ask, batches, now, pace, payload, say, spread, wait_for_go

from polybus import Bus, Event


async def main() -> None:
    async with Bus(ask.url, service="bench", durability=ask.durability) as bus:
        wait_for_go()
        started = now()
        if ask.per_second:
            async for i in pace(ask.events, ask.per_second):
                await bus.publish(TYPE, payload(i, now()))
        elif ask.publishers:
            await spread(ask.events, ask.publishers, lambda i: bus.publish(TYPE, payload(i)))
        else:
            for batch in batches(ask.events, BATCH):
                await bus.publish_many([Event.create(TYPE, payload(i)) for i in batch])
        say(started=started, ended=now())


asyncio.run(main())
