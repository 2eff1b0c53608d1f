"""procrastinate: jobs are deferred by 100; a worker with ten at once. Its connector has connections of its own."""

import asyncio
import contextlib

import procrastinate
from common import BATCH, ask, batches, now, payload, say, wait_for_go

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=ask.db))
handled, done = 0, asyncio.Event()


@app.task(name="order")
async def order(**job: object) -> None:
    global handled
    handled += 1
    if handled == ask.events:
        done.set()


async def produce() -> None:
    await app.schema_manager.apply_schema_async()
    wait_for_go()
    say(started=now())
    for batch in batches(ask.events, BATCH):
        await order.batch_defer_async(*[payload(i) for i in batch])
    say(ended=now())


async def consume() -> None:
    wait_for_go()
    say(started=now())
    worker = asyncio.create_task(app.run_worker_async(concurrency=10, install_signal_handlers=False))
    await done.wait()
    say(ended=now())
    worker.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await worker


async def main() -> None:
    async with app.open_async():
        await (produce() if ask.part == "produce" else consume())


asyncio.run(main())
