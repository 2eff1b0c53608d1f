"""From start to a signal: what a worker process, and a web server's life, do with a bus."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polybus._options import Seconds
    from polybus.bus import Bus

__all__ = ["lifespan", "run", "serve"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(*buses: Bus, drain: Seconds = 10.0) -> None:
    """A worker's main program: `asyncio.run(serve(*buses))`. Returns after SIGTERM or SIGINT, when all is closed."""
    asyncio.run(serve(*buses, drain=drain))


async def serve(*buses: Bus, drain: Seconds = 10.0, signals: Iterable[signal.Signals] = SIGNALS) -> None:
    """Start the buses, wait for a signal, close them, return.

    Closing stops intake, lets running handlers end for up to `drain` seconds, and hands back the rest: another process
    gets it at once, and the attempt does not count. A second signal hands back at once. Cancelling closes, too.
    Signals reach only the main thread; in another one, cancel. Errors: those of `Bus.start`, with all buses closed.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    with _listening(signals, lambda: (hurry if stop.is_set() else stop).set()):
        starting = asyncio.ensure_future(_start(buses))
        try:
            await _first(starting, stop)
            await stop.wait()
        finally:
            closing = asyncio.gather(*(bus.close(drain) for bus in buses))
            await _first(closing, hurry)
            await asyncio.gather(closing, *(bus.close(0) for bus in buses))
            # Not before: a start that is cancelled hands back at once what its first handlers hold.
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)


def lifespan(*buses: Bus, drain: Seconds = 10.0) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """For an ASGI application: `FastAPI(lifespan=lifespan(bus))`, also Starlette and Litestar.

    The buses start before the first request, and close after the last one as in `serve`. Inside a lifespan of your own:
    `async with lifespan(bus)(app): yield`.
    """

    @asynccontextmanager
    async def during(app: object) -> AsyncGenerator[None, None]:
        try:
            await _start(buses)
            yield
        finally:
            await asyncio.gather(*(bus.close(drain) for bus in buses))

    return during


async def _start(buses: Iterable[Bus]) -> None:
    for bus in buses:
        await bus.start()


async def _first(work: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Wait for the work, or until the event is set; the work goes on."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
    finally:
        waiting.cancel()


@contextlib.contextmanager
def _listening(signals: Iterable[signal.Signals], call: Callable[[], None]) -> Generator[None, None, None]:
    loop, before = asyncio.get_running_loop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in signals:
            before[number] = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, call)
            except NotImplementedError:  # Windows
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)
