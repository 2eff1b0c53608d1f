"""Idle: 20 subscriptions on a SQLite file, nothing happens; the CPU time of the process, all threads."""

import asyncio
import time

from common import ask, say

from polybus import Bus, Event


async def main() -> None:
    async def handler(event: Event) -> None: ...

    async with Bus(f"sqlite:///{ask.path}", service="bench") as bus:
        for i in range(20):
            await bus.subscribe(f"order{i}.*", handler, name=f"idle{i}")
        await asyncio.sleep(2)
        cpu, wall = time.process_time(), time.monotonic()
        await asyncio.sleep(ask.seconds)
        say(percent=100 * (time.process_time() - cpu) / (time.monotonic() - wall))


asyncio.run(main())
