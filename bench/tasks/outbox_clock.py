"""The consumer: says when its handler was entered, for each event."""

import asyncio

from common import ask, now, say

from polybus import Bus, Event


async def main() -> None:
    entered, done = [0] * ask.events, asyncio.Event()
    left = ask.events

    async def clock(event: Event) -> None:
        nonlocal left
        entered[int(event.payload["orderId"].rpartition("-")[2])] = now()
        left -= 1
        if not left:
            done.set()

    async with Bus(ask.url, service="bench", durability=ask.durability) as bus:
        await bus.subscribe("order.*", clock, name="bench")
        say(ready=True)
        await done.wait()
        say(entered=entered)


asyncio.run(main())
