"""A bus for tests: in memory, with the same semantics, and with time that stands still until the test moves it."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from polybus import _runtime
from polybus._native import Event
from polybus.bus import Bus

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from polybus._options import SubscribeOptions

__all__ = ["MockHandler", "TestBus"]

_numbers = itertools.count(1)
_ANY = object()


class MockHandler:
    """A handler that remembers its events."""

    def __init__(self) -> None:
        self.events: list[Event[Any]] = []
        """What it was called with, in order; a retried event stands here once for each attempt."""
        self.raises: BaseException | Callable[[Event[Any]], object] | None = None
        """Set it to an exception to raise, or to a function to call."""

    @property
    def called(self) -> bool:
        """Whether it was called."""
        return bool(self.events)

    @property
    def call_count(self) -> int:
        """How often it was called."""
        return len(self.events)

    async def __call__(self, event: Any) -> None:
        """Remember the event, or each of a batch."""
        self.events.extend(event if isinstance(event, list) else [event])
        if isinstance(self.raises, BaseException):
            raise self.raises
        if self.raises is not None:
            self.raises(event)


class TestBus(Bus):
    """A bus in memory whose time the test moves. It starts itself when it is first used."""

    __test__ = False  # for pytest: not a test
    _lazy = True

    def __init__(self, service: str = "test", **options: Any) -> None:
        options.update(service=service, virtual_clock=True)
        super().__init__(f"memory://test-{os.getpid()}-{next(_numbers)}", **options)

    def published(self, pattern: str = "**") -> list[Event[Any]]:
        """What this bus published, in order."""
        return self._native.published(pattern)

    async def wait_for(self, pattern: str, timeout: float | timedelta = 5.0) -> Event[Any]:
        """The first matching event, published before or after this call. `TimeoutError` after real seconds."""
        await self._settle()
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        waiting = asyncio.ensure_future(_runtime.run_or_forget(self._native.wait_for(pattern)))
        done, _ = await asyncio.wait({waiting}, timeout=seconds)
        if not done:
            waiting.cancel()
            raise TimeoutError(f"no event matched {pattern!r} within {seconds} s; {self._seen()}")
        event: Event[Any] = waiting.result()
        return event

    def mock_handler(self, pattern: str, **options: Unpack[SubscribeOptions]) -> MockHandler:
        """Subscribe a handler that remembers its events: `.called`, `.events`."""
        mock = MockHandler()
        options.setdefault("name", f"mock-{next(_numbers)}")
        self.on(pattern, **options)(mock)
        return mock

    def assert_published(self, type: str, payload: object = _ANY) -> Event[Any]:
        """The first event of that type (or pattern) and payload, if given. `AssertionError` if there is none."""
        events = self.published(type)
        for event in events:
            if payload is _ANY or event.payload == payload:
                return event
        if events:
            found = ", ".join(repr(event.payload) for event in events[:5])
            raise AssertionError(
                f"{type!r} was published {len(events)} times, never with {payload!r}; payloads: {found}"
            )
        raise AssertionError(f"{type!r} was not published; {self._seen()}")

    def _seen(self) -> str:
        types = [event.type for event in self.published()]
        return f"published: {', '.join(types[:20])}" if types else "nothing was published"

    async def advance(self, seconds: float | timedelta) -> None:
        """Move time: retries, delays, expiries and timeouts that fall due happen before this returns, each at its time.

        What was published before is handled first, and what falls due because of it within that time happens, too: a
        handler that fails twice, with retries after a second, has succeeded after `advance(2)`. Waits for handlers that
        do not end for a second of real time, a few at most: one that waits for the test itself goes on afterwards.
        """
        await self._settle()
        await _runtime.run_or_forget(self._native.advance(seconds))

    async def idle(self) -> None:
        """Wait until nothing is left to do at this moment of the bus's time; what is paused has nothing to do."""
        await self._settle()
        await _runtime.run_or_forget(self._native.idle())

    def fail_next(self, pattern: str, n: int = 1) -> None:
        """Let the next `n` attempts to handle a matching event fail before the handler sees it."""
        self._native.fail_next(pattern, n)

    def duplicate_next(self, pattern: str, n: int = 1) -> None:
        """Publish the next `n` matching events twice."""
        self._native.duplicate_next(pattern, n)
