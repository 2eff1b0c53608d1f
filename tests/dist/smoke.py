"""A user's first program, against the installed wheel."""

import asyncio
import sys

from polybus import Bus, Event


async def main(url: str) -> None:
    """Publish one event and see it arrive."""
    arrived: asyncio.Queue[Event] = asyncio.Queue()
    async with Bus(url, service="smoke") as bus:
        await bus.subscribe("order.*", arrived.put, name="smoke")
        receipt = await bus.publish("order.created", {"orderId": "o-1"})
        event = await asyncio.wait_for(arrived.get(), 10)
        assert (event.meta.id, event.payload) == (receipt.id, {"orderId": "o-1"})


asyncio.run(main(sys.argv[1]))
print("wheel: ok")
