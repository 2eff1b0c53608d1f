"""Recovery: a consumer that notes what it is handed and when, and a producer that notes what was confirmed.

Each line from the runner asks the consumer for its notes, and the producer to begin, then to end. A consumer with
`hold` never ends a handler.
"""

import asyncio
import sys

from common import TYPE, ask, now, pace, say, wait_for_go

from polybus import Bus, Event
from polybus.errors import PolybusError


async def produce() -> None:
    published: list[tuple[int, int]] = []
    async with Bus(ask.url, service="bench") as bus:
        wait_for_go()
        told_to_end = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        async for i in pace(ask.events, 100):
            started = now()
            try:
                await bus.publish(TYPE, {"i": i})
            except PolybusError:
                continue  # the publisher knows that this one is not there
            published.append((i, started))
            if told_to_end.done():
                break
        say(published=published)
        await told_to_end


async def consume() -> None:
    seen: list[tuple[int, int]] = []

    async def note(event: Event) -> None:
        seen.append((event.payload["i"], now()))
        if ask.hold:
            await asyncio.Event().wait()

    async with Bus(ask.url, service="bench", lease=ask.lease) as bus:
        await bus.subscribe("order.*", note, name="bench", concurrency=100)
        say(ready=True)
        while await asyncio.to_thread(sys.stdin.readline):
            say(seen=seen)


asyncio.run({"produce": produce, "consume": consume}[ask.part]())
