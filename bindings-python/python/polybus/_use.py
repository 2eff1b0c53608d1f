"""The part of a bus that has to do with middleware."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from polybus import _middleware, _native, _runtime
from polybus._native import Event, Receipt

if TYPE_CHECKING:
    from polybus._middleware import Middleware, On
    from polybus.subscription import Subscription

M = TypeVar("M", bound="Middleware")


class Uses:
    """Keeps the middleware of a bus, and publishes through it."""

    _native: _native.NativeBus
    _lock: threading.Lock
    _subscriptions: dict[str, Subscription]
    _replaces: bool
    _handling: _middleware.Around = ()
    _publishing: _middleware.Around = ()

    @overload
    def use(self, middleware: M, /, *, on: On = ...) -> M: ...
    @overload
    def use(self, middleware: None = ..., /, *, on: On = ...) -> Callable[[M], M]: ...
    def use(self, middleware: Any = None, /, *, on: On = "handle") -> Any:
        """Run `async def middleware(event, call_next)` around every handler, or with `on="publish"` around publish.

        `await call_next()` runs the rest and returns what it returns; `call_next(another)` gives it another event. The
        first that was added is the outermost. What it raises, the handler (or publish) raised; not calling on means
        that the handler is done without running, or that nothing is published. Context variables that it sets are seen
        by the handler. Added at any time, it concerns what comes later. Also a decorator: `@bus.use`,
        `@bus.use(on="publish")`. Errors: `InvalidConfig`.
        """
        if middleware is None:
            return functools.partial(self.use, on=on)
        _middleware.check(middleware, on)
        with self._lock:
            if on == "publish":
                self._publishing = _middleware.added(self._publishing, middleware, self._replaces)
            else:
                self._handling = _middleware.added(self._handling, middleware, self._replaces)
        for subscription in list(self._subscriptions.values()):
            subscription.rewire(subscription._handler, self._handling)
        return middleware

    if TYPE_CHECKING:

        def _is_sync(self, given: dict[str, Any] | None) -> bool: ...

        async def _publish_here(self, type: Any, payload: object, raw: Any, meta: dict[str, Any]) -> Receipt: ...

    async def _publish_through(self, type: Any, payload: Any, raw: Any, meta: dict[str, Any], given: Any) -> Receipt:
        sync = self._is_sync(given)

        async def send(event: Event[Any]) -> Receipt:
            if sync:
                return await self._publish_here(event, None, None, {})
            receipt: Receipt = await _runtime.run(self._native.publish(event, None, None, {}, given))
            return receipt

        event = _middleware.event_of(type, payload, raw, meta)
        receipt: Receipt = await _middleware.publish(self._publishing, event, send)
        return receipt

    async def _publish_many_through(self, events: Iterable[Event[Any]]) -> list[Receipt]:
        async def send(events: list[Event[Any]]) -> Any:
            return await _runtime.run(self._native.publish_many(events))

        return await _middleware.publish_many(self._publishing, _middleware.events_of(events), send)
