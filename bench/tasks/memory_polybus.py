"""Memory: `publish_many` of 1,000, an async handler that counts, 1,024 in flight; the end is the last one handled."""

import asyncio

from common import IN_FLIGHT, TYPE, ask, batches, now, payload, rate, say

from polybus import Bus, Event


async def main() -> None:
    handled, done = 0, asyncio.Event()

    async def count(event: Event) -> None:
        nonlocal handled
        handled += 1
        if handled == ask.events:
            done.set()

    def make(batch: range) -> list[Event]:
        return [Event.create(TYPE, payload(i)) for i in batch]

    async with Bus("memory://", service="bench", buffer_size=2 * IN_FLIGHT) as bus:
        await bus.subscribe("order.*", count, concurrency=IN_FLIGHT)
        work = batches(ask.events, 1000)
        built = [make(batch) for batch in work] if ask.prebuilt else None
        started = now()
        for i, batch in enumerate(work):
            await bus.publish_many(built[i] if built else make(batch))
        await done.wait()
        say(rate=rate(ask.events, started))


asyncio.run(main())
