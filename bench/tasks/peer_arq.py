"""arq: 100 jobs at once, a poll every 10 ms (its defaults, 10 and 500 ms, end at 209 per second), no results."""

import asyncio
import sys
from pathlib import Path
from typing import Any

# It wants an older redis-py: requirements-arq.txt.
sys.path.insert(0, str(Path(sys.prefix) / "arq"))

from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker
from common import ask, now, payload, say, spread, wait_for_go

settings = RedisSettings.from_dsn(ask.url)
handled = settled = 0
done = asyncio.Event()


async def count(context: Any, event: Any) -> None:
    global handled
    handled += 1


async def after(context: Any) -> None:
    global settled
    settled += 1
    if settled == ask.events:
        done.set()


async def produce() -> None:
    pool = await create_pool(settings)
    wait_for_go()
    started = now()
    await spread(ask.events, 100, lambda i: pool.enqueue_job("count", payload(i)))
    say(started=started, ended=now())
    await pool.aclose()


async def consume() -> None:
    worker = Worker(
        [func(count, name="count", keep_result=0)],
        redis_settings=settings,
        max_jobs=100,
        poll_delay=0.01,
        after_job_end=after,
        handle_signals=False,
        log_results=False,
    )
    running = asyncio.create_task(worker.async_run())
    await asyncio.sleep(0.2)
    say(ready=True)
    await done.wait()
    say(ended=now(), handled=handled)
    running.cancel()
    await asyncio.wait([running])


asyncio.run({"produce": produce, "consume": consume}[ask.part]())
