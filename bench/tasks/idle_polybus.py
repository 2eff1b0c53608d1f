"""Idle: so many subscriptions, nothing happens; the CPU time of the process, all threads."""

import asyncio
import time

from common import ask, say, wait_for_go

from polybus import Bus, Event


async def main() -> None:
    async def handler(event: Event) -> None: ...

    async with Bus(ask.url, service="bench") as bus:
        for i in range(ask.subscriptions):
            await bus.subscribe(f"order{i}.*", handler, name=f"idle{i}")
        await asyncio.to_thread(wait_for_go)  # on a thread: a blocked loop would be idle for another reason
        await asyncio.sleep(2)
        cpu, wall = time.process_time(), time.monotonic()
        await asyncio.sleep(ask.seconds)
        say(percent=100 * (time.process_time() - cpu) / (time.monotonic() - wall))
        await asyncio.to_thread(wait_for_go)  # open until its connections are counted


asyncio.run(main())
