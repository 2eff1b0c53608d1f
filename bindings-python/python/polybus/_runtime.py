"""What belongs to the process: one bridge for each event loop, the log, fork and exit.

A bridge lives as long as its loop: the loop's watch on the bridge's descriptor is what keeps it. When the loop closes,
the bridge goes, its subscriptions end and what they held is handed back.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import logging
import os
import selectors
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from polybus import _log, _middleware, _native

if TYPE_CHECKING:
    from polybus._handlers import LoopHandler
    from polybus.bus import Bus

MOST_JOBS = 256
"""Jobs that are started in one turn of the loop, so that it stays responsive."""

_bridges: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[LoopBridge]] = weakref.WeakKeyDictionary()
_buses: weakref.WeakSet[Bus] = weakref.WeakSet()
_lock = threading.Lock()


class LoopBridge:
    """Brings jobs and results of the core to one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.native = _native.Bridge(False)
        self.handlers: dict[int, LoopHandler] = {}
        self._create_future = loop.create_future
        self._immediate = 0
        self._loop = loop
        try:
            loop.add_reader(self.native.fileno(), self._drain)
        except NotImplementedError:  # Windows' default loop: a thread watches instead
            watch = threading.Thread(target=_watch, args=(weakref.ref(self), loop), name="polybus-wake", daemon=True)
            loop._polybus_bridge = self  # type: ignore[attr-defined]
            watch.start()
        self._guard = _guard(weakref.ref(self))
        with contextlib.suppress(StopIteration):
            self._guard.__anext__().send(None)

    def begin(self, operation: _native.Operation) -> asyncio.Future[Any]:
        """Start an operation; the future gets its result. Cancelling the future does not stop it."""
        future = self._create_future()
        self.native.spawn(operation, future)
        return future

    def must_yield(self) -> bool:
        """Whether the loop should turn, although there is nothing to wait for: others would starve."""
        self._immediate += 1
        return self._immediate % 32 == 0

    def _drain(self) -> None:
        jobs, cancelled = self.native.take(MOST_JOBS)
        if cancelled:
            for number, job in cancelled:
                if handler := self.handlers.get(number):
                    handler.cancel(job)
        if jobs:
            started = 0
            try:
                for started, (number, batch) in enumerate(jobs, 1):  # noqa: B007
                    # A handler that is not there: its subscription has ended.
                    if handler := self.handlers.get(number):
                        handler.start(batch)
            except BaseException:  # a handler ended the program at once: the others' events go back
                for number, batch in jobs[started:]:
                    if handler := self.handlers.get(number):
                        handler.hand_back(batch)
                raise
        drain_logs()

    def shut_down(self) -> None:
        """End this loop's subscriptions: what they hold is handed back."""
        handlers, self.handlers = self.handlers, {}
        for handler in handlers.values():
            handler.abandon()
        self.native.stop()
        if not self._loop.is_closed():
            with contextlib.suppress(Exception):
                self._loop.remove_reader(self.native.fileno())
        if (known := _bridges.get(self._loop)) is not None and known() in (self, None):
            del _bridges[self._loop]

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.shut_down()


async def _guard(bridge: weakref.ref[LoopBridge]) -> AsyncGenerator[None, None]:
    """Parked on the loop: `asyncio.run` closes it at its end, while the loop still works."""
    try:
        yield
    finally:
        if (alive := bridge()) is not None:
            alive.shut_down()


def _watch(bridge: weakref.ref[LoopBridge], loop: asyncio.AbstractEventLoop) -> None:
    """For loops without `add_reader`."""
    with selectors.DefaultSelector() as selector:
        if (alive := bridge()) is not None:
            selector.register(alive.native.fileno(), selectors.EVENT_READ)
        while alive is not None and not loop.is_closed():
            alive = None
            ready = selector.select(1.0)
            alive = bridge()
            if ready and alive is not None:
                drained = threading.Event()

                def drain(alive: LoopBridge = alive, drained: threading.Event = drained) -> None:
                    try:
                        alive._drain()
                    finally:
                        drained.set()

                loop.call_soon_threadsafe(drain)
                drained.wait()


def bridge() -> LoopBridge:
    """The bridge of the running loop."""
    loop = asyncio.get_running_loop()
    found = _bridges.get(loop)
    alive = None if found is None else found()
    if alive is None:
        # In an empty context: handlers must not inherit the variables of whoever used the bus first.
        alive = contextvars.Context().run(LoopBridge, loop)
        with _lock:
            _bridges[loop] = weakref.ref(alive)
    return alive


# These two keep no reference to the bridge while they wait: a traceback that somebody keeps must not keep it alive.


async def run(operation: _native.Operation) -> Any:
    """Await an operation of the core on the running loop. Whoever stops waiting does not stop it."""
    here = bridge()
    future = here.begin(operation)
    pause = future.done() and here.must_yield()
    del here
    if pause:
        await asyncio.sleep(0)
    return await future


async def run_or_forget(operation: _native.Operation) -> Any:
    """Await an operation that ends when nobody waits for it any more."""
    native = bridge().native
    future = asyncio.get_running_loop().create_future()
    key = native.spawn(operation, future)
    try:
        return await future
    finally:
        if future.cancelled():
            native.forget(key)


# ---- log ----------------------------------------------------------------------------------------------------------


def watch_bus(bus: Bus) -> None:
    """Close it at exit, reset it after fork, log to its logger."""
    with _lock:
        _buses.add(bus)
    set_log_level()


def _live() -> list[Bus]:
    with _lock:
        return list(_buses)


def set_log_level() -> None:
    """Keep only what some logger wants."""
    _native.set_log_level(min((_log.level_of(bus.logger) for bus in _live()), default=logging.WARNING))


def drain_logs() -> None:
    """Hand the core's records to Python's logging."""
    records = _native.take_logs()
    if records:
        # The core does not know which bus a record is about: each logger once.
        loggers = list({id(bus.logger): bus.logger for bus in _live()}.values()) or [_log.default()]
        for level, message in records:
            for logger in loggers:
                _log.write(logger, level, message)


# ---- fork and exit ------------------------------------------------------------------------------------------------

_leaked: list[object] = []


def _after_fork() -> None:
    """In the child: everything is made anew. The parent's things are kept, untouched: their threads are not here."""
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    _leaked.extend(found() for found in _bridges.values())
    _bridges.clear()
    _leaked.extend(bus._forget_process() for bus in _live())
    _leaked.append(_middleware.forget_own_loop())


def _at_exit() -> None:
    """Close what is open, briefly: a durable event that is not finished stays where it is."""
    deadline = time.monotonic() + 0.25
    for bus in _live():
        bus._close_at_exit(max(0.0, deadline - time.monotonic()))
    _middleware.end_own_loop()
    drain_logs()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
