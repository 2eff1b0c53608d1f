"""Memory, the others: the same handler, called 1,024 at a time; each batch is awaited before the next one."""

import asyncio
from typing import Any

from common import IN_FLIGHT, TYPE, ask, batches, now, payload, rate, say

handled = 0


async def count(event: Any) -> None:
    global handled
    handled += 1


async def create_task(events: list[Any]) -> None:
    await asyncio.gather(*[asyncio.create_task(count(event)) for event in events])


def with_pyee() -> Any:
    from pyee.asyncio import AsyncIOEventEmitter

    emitter = AsyncIOEventEmitter()
    emitter.on(TYPE, count)

    async def emit(events: list[Any]) -> None:
        for event in events:
            emitter.emit(TYPE, event)
        await emitter.wait_for_complete()

    return emit


def with_blinker() -> Any:
    from blinker import signal

    created = signal(TYPE)

    async def receive(_sender: str, event: Any) -> None:
        global handled
        handled += 1

    created.connect(receive, weak=False)

    async def send(events: list[Any]) -> None:
        await asyncio.gather(*[created.send_async("bench", event=event) for event in events])

    return send


async def main() -> None:
    run = {"create_task": lambda: create_task, "pyee": with_pyee, "blinker": with_blinker}[ask.peer]()
    work = batches(ask.events, IN_FLIGHT)
    built = [[payload(i) for i in batch] for batch in work] if ask.prebuilt else None
    started = now()
    for i, batch in enumerate(work):
        await run(built[i] if built else [payload(i) for i in batch])
    assert handled == ask.events, f"{handled} of {ask.events} handled"
    say(rate=rate(ask.events, started))


asyncio.run(main())
