"""The shop: publishes ``order.placed``, and follows every shipment back to its order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from ledger import Ledger

from polybus import Bus, Event


async def main(url: str, bus_name: str, folder: str, orders: int, per_second: float) -> None:
    ledger = Ledger(folder, "shop")
    bus = Bus(url, service="shop", bus=bus_name, lease=2.0)

    @bus.on("shipment.**", concurrency=100)
    async def follow_shipment(event: Event) -> None:
        ledger.write(
            "shipment",
            type=event.type,
            id=event.meta.id,
            order=event.payload["orderId"],
            correlation=event.meta.correlation_id,
            causation=event.meta.causation_id,
            attempt=event.delivery.attempt if event.delivery else 0,
        )

    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    async with bus:
        ledger.write("ready")
        await asyncio.to_thread(sys.stdin.readline)  # the others have subscribed
        for number in range(orders):
            order = f"o-{number:04d}"
            event = Event.create(
                "order.placed",
                {"orderId": order, "number": number, "total": round(9.99 + number / 7, 2)},
                partition_key=order,
                idempotency_key=f"order:{order}:placed",
                headers={"channel": "web"},
            )
            receipt = await bus.publish(event)  # returned: from here on the event may not get lost
            ledger.write("placed", id=receipt.id, order=order)
            await asyncio.sleep(1 / per_second)
        ledger.write("all placed")
        await stopped.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(os.environ["ORDERS"]), float(os.environ["PER_SECOND"])))
