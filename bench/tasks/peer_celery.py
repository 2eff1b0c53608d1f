"""Celery: the solo pool, which was the fastest, `acks_late` as the others, no results. Handlers are not async."""

import logging
import os
import threading
import time
from typing import Any

import redis
from celery import Celery
from celery.signals import worker_ready
from common import ask, now, payload, say, wait_for_go

app = Celery("bench", broker=ask.url)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=100,
    worker_redirect_stdouts=False,  # it would log what we say
)
handled = 0
done = threading.Event()


@app.task(name="count")
def count(event: Any) -> None:
    global handled
    handled += 1
    if handled == ask.events:
        done.set()


def produce() -> None:
    with app.connection_for_write() as connection:
        connection.ensure_connection()
    wait_for_go()
    started = now()
    for i in range(ask.events):
        count.delay(payload(i))
    say(started=started, ended=now())


def watch() -> None:
    client = redis.Redis.from_url(ask.url)
    done.wait()
    while client.hlen("unacked") or client.llen("celery"):
        time.sleep(0.001)
    say(ended=now(), handled=handled)
    os._exit(0)


def consume() -> None:
    logging.disable(logging.CRITICAL)
    worker_ready.connect(lambda **_: say(ready=True), weak=False)
    threading.Thread(target=watch, daemon=True).start()
    app.worker_main(["--quiet", "worker", "--pool=solo", "--without-gossip", "--without-mingle", "--without-heartbeat"])


{"produce": produce, "consume": consume}[ask.part]()
