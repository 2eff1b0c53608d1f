"""A relay: with `rows` until the last one is delivered, and it says when that was; otherwise until it is killed."""

import asyncio

import psycopg
from common import ask, now, say, wait_for_go

from polybus import Bus
from polybus.outbox import Relay


async def main() -> None:
    async with Bus(ask.url, service="bench", durability="warn") as bus:
        relay = Relay(ask.db, bus, batch=ask.batch, workers=ask.workers)
        await relay.check()
        await bus.publish("warm.up", 1)
        wait_for_go()
        started = now()
        running = asyncio.create_task(relay.run())
        say(started=started)
        if not ask.rows:
            await running
        with psycopg.connect(ask.db, autocommit=True) as db:
            # Asks for the last row only, which costs the server next to nothing.
            last = "SELECT status FROM polybus_outbox ORDER BY seq DESC LIMIT 1"
            while db.execute(last).fetchone() != ("delivered",):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            left = "SELECT 1 FROM polybus_outbox WHERE status = 'pending' LIMIT 1"
            while db.execute(left).fetchone():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            ended = now()
        relay.stop()
        await running
        say(ended=ended)


asyncio.run(main())
