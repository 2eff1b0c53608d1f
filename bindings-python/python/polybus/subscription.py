"""The handle of a running subscription."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine, Generator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from polybus import _native, _runtime
from polybus._batches import single, takes_batches
from polybus._handlers import LoopHandler, ThreadHandler, call, is_async
from polybus._views import SubscriptionStats

if TYPE_CHECKING:
    from polybus._handlers import Handler
    from polybus._middleware import Around
    from polybus._native import Event


class Done:
    """What a method returns that is done when it returns, and may be awaited all the same."""

    def __await__(self) -> Generator[Any, None, None]:
        """Nothing to wait for."""
        return iter(())  # type: ignore[return-value]


class Subscription:
    """A running subscription; `Bus.subscribe` makes it. Dropping this object does not end it."""

    def __init__(
        self,
        native: _native.NativeSubscription,
        handler: Handler,
        timeout: float | None,
        runner: LoopHandler | ThreadHandler,
        ended: Callable[[], None],
        options: dict[str, Any],
    ) -> None:
        self._native = native
        self._handler = handler
        self._timeout = timeout
        # Weak: what runs the handler lives with its loop.
        self._runner = weakref.ref(runner)
        self._ended = ended
        self._options = options
        self._on_closing: list[Callable[[], None]] = []

    @property
    def name(self) -> str:
        """Unique on its bus."""
        return self._native.name

    @property
    def group(self) -> str:
        """The durable group."""
        return self._native.group

    @property
    def pattern(self) -> str:
        """As given."""
        return self._native.pattern

    @property
    def active(self) -> bool:
        """False after `unsubscribe`, after the bus was closed, and in a forked child."""
        return self._native.active

    async def unsubscribe(self, timeout: float | timedelta = 10.0) -> None:
        """Take nothing more, let running handlers end for up to `timeout` seconds, hand back the rest.

        The durable group stays and collects; `Bus.delete_group` forgets it.
        """
        await _runtime.run(self._native.drain(timeout))
        self._ended()

    async def drain(self, timeout: float | timedelta = 10.0) -> None:
        """As `unsubscribe`."""
        await self.unsubscribe(timeout)

    def pause(self) -> Done:
        """Take nothing more until `resume`; running handlers go on. `BusClosed` when it has ended."""
        self._native.pause()
        return Done()

    def resume(self) -> Done:
        """Take again."""
        self._native.resume()
        return Done()

    async def stats(self) -> SubscriptionStats:
        """Its numbers. `BusClosed` when it has ended."""
        stats: SubscriptionStats = await _runtime.run(self._native.stats())
        return stats

    def on_closing(self, call: Callable[[], None]) -> None:
        """`call` runs when the bus begins to close."""
        self._on_closing.append(call)

    def takes(self, pattern: str, handler: Handler, options: dict[str, Any]) -> bool:
        """Whether this handler can take the place of ours with nothing else changed."""
        runner = self._runner()
        same = pattern == self.pattern and options == self._options and is_async(handler) == is_async(self._handler)
        return same and runner is not None and not runner.gone and runner.serves()

    def rewire(self, handler: Handler, around: Around) -> None:
        """From the next event on, run this handler inside this middleware."""
        self._handler = handler
        if (runner := self._runner()) is not None:
            runner.rewire(handler, around)  # type: ignore[arg-type]

    def call(self, event: Event[Any], around: Around) -> Coroutine[Any, Any, object]:
        """Handle one event here and now, for a synchronous publish; batches have no middleware."""
        if takes_batches(self._options):
            return call(single(self._handler), event, ())
        return call(self._handler, event, around)

    def closing(self) -> None:
        """The bus begins to close."""
        for tell in self._on_closing:
            tell()

    @property
    def orphaned(self) -> bool:
        """Whether its loop is gone."""
        runner = self._runner()
        return runner is None or runner.gone

    def __repr__(self) -> str:
        state = "" if self.active else " (ended)"
        return f"<Subscription {self.name} {self.pattern!r} group={self.group!r}{state}>"
