"""dramatiq: a worker with 8 threads in this process, middleware as it comes. The end is its last acknowledgement."""

import logging
import os
import threading
from typing import Any

import dramatiq
from common import ask, now, payload, say, wait_for_go
from dramatiq.brokers.redis import RedisBroker

logging.disable(logging.CRITICAL)
broker = RedisBroker(url=ask.url)
dramatiq.set_broker(broker)


class Acknowledged(dramatiq.Middleware):
    def __init__(self) -> None:
        self.count, self.done, self._lock = 0, threading.Event(), threading.Lock()

    def after_ack(self, broker: Any, message: Any) -> None:
        with self._lock:
            self.count += 1
        if self.count == ask.events:
            self.done.set()


@dramatiq.actor
def count(event: Any) -> None: ...


def produce() -> None:
    wait_for_go()
    started = now()
    for i in range(ask.events):
        count.send(payload(i))
    say(started=started, ended=now())


def consume() -> None:
    acknowledged = Acknowledged()
    broker.add_middleware(acknowledged)
    dramatiq.Worker(broker, worker_threads=8).start()
    say(ready=True)
    acknowledged.done.wait()
    say(ended=now(), handled=acknowledged.count)
    os._exit(0)


{"produce": produce, "consume": consume}[ask.part]()
