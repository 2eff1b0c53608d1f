"""What the measured Python programs share: one payload, one clock, and lines of JSON to and from the runner."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

#: What the runner asks for: one JSON object, the first argument.
ask = SimpleNamespace(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}"))

TYPE = "order.created"
BATCH = 100
IN_FLIGHT = 1024

#: CLOCK_MONOTONIC on Linux, the clock of Node's `process.hrtime` too: comparable between processes.
now = time.monotonic_ns


def _filled(note: str) -> dict[str, Any]:
    return {"orderId": f"order-{0:08}", "sent": 0, "note": note}


_NOTE = "x" * (200 - len(json.dumps(_filled(""), separators=(",", ":"))))


def payload(i: int, sent: int = 0) -> dict[str, Any]:
    """200 bytes as JSON; a `sent` time makes it a few more."""
    return {"orderId": f"order-{i:08}", "sent": sent, "note": _NOTE}


def batches(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def wait_for_go() -> None:
    """Tells the runner that all is open, and blocks until it says go."""
    say(ready=True)
    sys.stdin.readline()


def rate(count: int, started: int) -> float:
    return count * 1e9 / (now() - started)


def percentiles(nanoseconds: list[int]) -> dict[str, float]:
    """In milliseconds. The first 20 are left out: they pay for imports and caches."""
    rest = sorted(nanoseconds[20:])
    at = {"p50": 0.5, "p99": 0.99}
    return {name: rest[int(len(rest) * part)] / 1e6 for name, part in at.items()} | {"max": rest[-1] / 1e6}


async def pace(count: int, per_second: float) -> AsyncIterator[int]:
    """0, 1, 2 … at that rate; one that comes late does not delay the next one."""
    started = now()
    for i in range(count):
        await asyncio.sleep(max(0, (started + i * 1e9 / per_second - now()) / 1e9))
        yield i


async def spread(count: int, publishers: int, publish: Callable[[int], Awaitable[object]]) -> int:
    """So many coroutines, each awaits one publish at a time; how many there were in all."""
    each = count // publishers

    async def publisher(first: int) -> None:
        for i in range(first, first + each):
            await publish(i)

    await asyncio.gather(*[publisher(n * each) for n in range(publishers)])
    return each * publishers
