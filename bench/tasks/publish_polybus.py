"""Publish only: so many `publishers` await one publish at a time; 0 are `publish_many` of 100. A group waits for it."""

import asyncio

from common import BATCH, TYPE, ask, batches, now, payload, rate, say, spread

from polybus import Bus, Event


async def later(event: Event) -> None:
    """Never called: its bus closes at once, its group stays."""


async def main() -> None:
    async with Bus(ask.url, service="bench", durability=ask.durability) as bus:
        await bus.subscribe("order.*", later, name="bench")
    async with Bus(ask.url, service="bench", durability=ask.durability) as bus:
        await bus.publish(TYPE, payload(0))
        started, count = now(), ask.events
        if ask.publishers:
            count = await spread(ask.events, ask.publishers, lambda i: bus.publish(TYPE, payload(i)))
        else:
            for batch in batches(ask.events, BATCH):
                await bus.publish_many([Event.create(TYPE, payload(i)) for i in batch])
        say(rate=rate(count, started))


asyncio.run(main())
