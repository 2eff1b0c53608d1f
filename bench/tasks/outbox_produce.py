"""The application: transactions with a row of its own and events; 100 events each, or one each and so many a second."""

import asyncio

import asyncpg
from common import BATCH, TYPE, ask, batches, now, pace, payload, say, wait_for_go

from polybus import Event
from polybus.outbox import Outbox

ORDER = "INSERT INTO orders (what) VALUES ($1)"


async def main() -> None:
    outbox = Outbox(service="bench")
    db = await asyncpg.connect(ask.db)
    wait_for_go()
    if ask.per_second:
        committed = []
        async for i in pace(ask.events, ask.per_second):
            async with db.transaction():
                await db.execute(ORDER, "order")
                await outbox.store_async(Event.create(TYPE, payload(i)), db)
            committed.append(now())
        say(committed=committed)
        return
    say(started=now())
    for batch in batches(ask.events, BATCH):
        async with db.transaction():
            await db.execute(ORDER, "order")
            await outbox.store_async([Event.create(TYPE, payload(i)) for i in batch], db)
    say(ended=now())
    await db.close()


asyncio.run(main())
