"""SQLite, publish only: each of `publishers` coroutines awaits one publish at a time. A group waits for the events."""

import asyncio

from common import TYPE, ask, now, payload, rate, say

from polybus import Bus, Event


async def later(event: Event) -> None:
    """Never called: its bus closes at once, its group stays."""


async def main() -> None:
    url = f"sqlite:///{ask.path}"
    async with Bus(url, service="bench", durability=ask.durability) as bus:
        await bus.subscribe("order.*", later, name="bench")
    async with Bus(url, service="bench", durability=ask.durability) as bus:
        each = ask.events // ask.publishers

        async def publisher(first: int) -> None:
            for i in range(first, first + each):
                await bus.publish(TYPE, payload(i))

        await bus.publish(TYPE, payload(0))
        started = now()
        await asyncio.gather(*[publisher(n * each) for n in range(ask.publishers)])
        say(rate=rate(each * ask.publishers, started))


asyncio.run(main())
