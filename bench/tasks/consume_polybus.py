"""The consumer: one subscription; ends when its group has nothing unfinished. Says the delays, if asked."""

import asyncio

from common import IN_FLIGHT, ask, now, percentiles, say

from polybus import Bus, Event


async def main() -> None:
    handled, done = 0, asyncio.Event()
    delays: list[int] = []

    async def count(event: Event) -> None:
        nonlocal handled
        handled += 1
        if handled == ask.events:
            done.set()

    async def clock(event: Event) -> None:
        entered = now()
        delays.append(entered - event.payload["sent"])
        await count(event)

    async with Bus(ask.url, service="bench", durability=ask.durability, buffer_size=2 * IN_FLIGHT) as bus:
        handler = clock if ask.latency else count
        subscription = await bus.subscribe("order.*", handler, name="bench", concurrency=IN_FLIGHT)
        say(ready=True)
        await done.wait()
        while (await subscription.stats()).pending:  # noqa: ASYNC110 - the store says it, no event does
            await asyncio.sleep(0.001)
        say(ended=now(), handled=handled, **(percentiles(delays) if delays else {}))


asyncio.run(main())
