"""The mailer: a plain function on worker threads, with trouble of its own.

One order in a hundred fails twice and then succeeds; one order always fails.
"""

from __future__ import annotations

import signal
import sys
import threading

from ledger import Ledger

from polybus import Bus, Event, RetryPolicy

ALWAYS_FAILS = 777
FAILS_TWICE = 100


def main(url: str, bus_name: str, folder: str) -> None:
    ledger = Ledger(folder, "mailer")
    bus = Bus(url, service="mailer", bus=bus_name, lease=2.0)

    @bus.on("order.placed", retry=RetryPolicy(max_retries=3, initial_delay=0.2, max_delay=1.0), concurrency=8)
    def send_mail(event: Event) -> None:
        number, attempt = event.payload["number"], event.delivery.attempt if event.delivery else 0
        ledger.write("try", id=event.meta.id, order=event.payload["orderId"], attempt=attempt)
        if number == ALWAYS_FAILS:
            raise ValueError(f"order {number} has no address")
        if number % FAILS_TWICE == 0 and attempt <= 2:
            raise ConnectionError("the mail server is busy")
        ledger.write("mailed", id=event.meta.id, order=event.payload["orderId"])

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    bus.blocking.start()
    ledger.write("ready")
    stopped.wait()
    bus.blocking.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
