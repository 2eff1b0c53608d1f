"""The bus for threads without an event loop: scripts, WSGI, Celery. `bus.blocking` is one of these."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Generator, Iterable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, overload

from polybus import _handlers, _middleware, _native, _runtime, history
from polybus._native import DeadLetter, Event, Receipt
from polybus._views import Guarantees, HistoryEntry, ReplayResult, SubscriptionStats
from polybus.dead_letters import _which
from polybus.errors import HandlerTimeout, InvalidHandler
from polybus.subscription import Subscription

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from polybus._options import DeadLetterFilter, MetaOptions, Mode, Seconds, SubscribeOptions
    from polybus.bus import Bus

__all__ = ["Blocking", "BlockingDeadLetters", "BlockingSubscription"]


def _wait(operation: _native.Operation) -> Any:
    """Wait with the GIL released; Ctrl-C is seen within 50 ms."""
    try:
        return operation.wait()
    finally:
        _runtime.drain_logs()


class BlockingSubscription:
    """A running subscription, seen from a thread without an event loop."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self.name = subscription.name
        self.group = subscription.group
        self.pattern = subscription.pattern

    @property
    def active(self) -> bool:
        """As `Subscription.active`."""
        return self._subscription.active

    def unsubscribe(self, timeout: float | timedelta = 10.0) -> None:
        """As `Subscription.unsubscribe`."""
        _wait(self._subscription._native.drain(timeout))
        self._subscription._ended()

    def drain(self, timeout: float | timedelta = 10.0) -> None:
        """As `unsubscribe`."""
        self.unsubscribe(timeout)

    def pause(self) -> None:
        """As `Subscription.pause`."""
        self._subscription.pause()

    def resume(self) -> None:
        """As `Subscription.resume`."""
        self._subscription.resume()

    def stats(self) -> SubscriptionStats:
        """As `Subscription.stats`."""
        stats: SubscriptionStats = _wait(self._subscription._native.stats())
        return stats

    def __repr__(self) -> str:
        return repr(self._subscription)


class BlockingDeadLetters:
    """As `DeadLetters`."""

    def __init__(self, native: _native.NativeBus) -> None:
        self._native = native

    def list(
        self,
        group: str | None = None,
        pattern: str | None = None,
        since: datetime | float | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[DeadLetter]:
        """As `DeadLetters.list`."""
        given = {"group": group, "pattern": pattern, "since": since, "limit": limit, "after": after}
        letters: list[DeadLetter] = _wait(self._native.dead_list(given))
        return letters

    def get(self, id: str) -> DeadLetter:
        """As `DeadLetters.get`."""
        letter: DeadLetter = _wait(self._native.dead_get(id))
        return letter

    def replay(
        self, which: str | DeadLetter | DeadLetterFilter | None = None, /, **filter: Unpack[DeadLetterFilter]
    ) -> int:
        """As `DeadLetters.replay`."""
        count: int = _wait(self._native.dead_replay(_which("replay", which, dict(filter))))
        return count

    def purge(
        self,
        which: str | DeadLetter | DeadLetterFilter | float | timedelta | None = None,
        /,
        **filter: Unpack[DeadLetterFilter],
    ) -> int:
        """As `DeadLetters.purge`."""
        count: int = _wait(self._native.dead_purge(_which("purge", which, dict(filter))))
        return count

    def count(self, **filter: Unpack[DeadLetterFilter]) -> int:
        """As `DeadLetters.count`."""
        count: int = _wait(self._native.dead_count(dict(filter)))
        return count


class Blocking:
    """The methods of `Bus`, each waiting in the calling thread with the GIL released. Safe in threads."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._native = bus._native
        self.dead_letters = BlockingDeadLetters(bus._native)

    def start(self) -> Self:
        """As `Bus.start`. Handlers must be plain functions: without a loop there is nobody to run a coroutine."""
        bus = self._bus
        _runtime.set_log_level()
        _wait(self._native.start())
        for name, subscription in list(bus._subscriptions.items()):
            if not subscription.active or subscription.orphaned:
                _wait(subscription._native.drain(0))
                bus._subscriptions.pop(name, None)
        bus._started = True
        try:
            for pattern, handler, options in bus._missing():
                self._subscribe(pattern, handler, options)
        except BaseException:
            self.close(0)
            raise
        return self

    def close(self, timeout: Seconds = 10.0) -> None:
        """As `Bus.close`."""
        bus = self._bus
        if bus._in_handler():
            self._native.close_soon(timeout)
            bus._started = False
            return
        subscriptions = bus._closing()
        _wait(self._native.close(timeout))
        bus._closed(subscriptions)

    def __enter__(self) -> Self:
        """`start`."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """`close`."""
        self.close()

    @overload
    def publish(
        self,
        event: Event[Any],
        /,
        *,
        delay: Seconds | None = ...,
        expires_in: Seconds | None = ...,
        mode: Mode | None = ...,
    ) -> Receipt: ...
    @overload
    def publish(
        self,
        type: str,
        payload: object = ...,
        *,
        delay: Seconds | None = ...,
        expires_in: Seconds | None = ...,
        mode: Mode | None = ...,
        raw: bytes | str | None = ...,
        **meta: Unpack[MetaOptions],
    ) -> Receipt: ...
    def publish(
        self,
        type: Any,
        payload: object = None,
        *,
        delay: Seconds | None = None,
        expires_in: Seconds | None = None,
        mode: Mode | None = None,
        raw: bytes | str | None = None,
        **meta: Any,
    ) -> Receipt:
        """As `Bus.publish`. Publish middleware runs on a loop of the package's own, while this thread waits."""
        given = None
        if delay is not None or expires_in is not None or mode is not None:
            given = {"delay": delay, "expires_in": expires_in, "mode": mode}
        if self._bus._publishing:
            return self._publish_through(type, payload, raw, meta, given)
        if self._bus._is_sync(given):
            return self._publish_here(type, payload, raw, meta)
        receipt: Receipt = _wait(self._native.publish(type, payload, raw, meta, given))
        return receipt

    def publish_many(self, events: Iterable[Event[Any]]) -> list[Receipt]:
        """As `Bus.publish_many`."""
        if self._native.mode == "sync":
            return [self.publish(event) for event in events]
        if around := self._bus._publishing:
            given = _middleware.events_of(events)
            return _middleware.from_thread(  # type: ignore[no-any-return]
                _middleware.own_loop(),
                lambda send: _middleware.publish_many(around, given, send),
                lambda events: _wait(self._native.publish_many(events)),
            )
        receipts: list[Receipt] = _wait(self._native.publish_many(events))
        return receipts

    def _publish_through(self, type: Any, payload: Any, raw: Any, meta: dict[str, Any], given: Any) -> Receipt:
        around, sync = self._bus._publishing, self._bus._is_sync(given)
        given_event = _middleware.event_of(type, payload, raw, meta)

        def send(event: Event[Any]) -> Any:
            if sync:
                return self._publish_here(event, None, None, {})
            return _wait(self._native.publish(event, None, None, {}, given))

        loop = _middleware.own_loop()
        receipt: Receipt = _middleware.from_thread(
            loop, lambda inner: _middleware.publish(around, given_event, inner), send
        )
        return receipt

    def _publish_here(self, type: Any, payload: object, raw: Any, meta: dict[str, Any]) -> Receipt:
        from polybus.bus import _failed

        bus = self._bus
        if not bus._started and bus._registered and not self._native.closed:
            self.start()
        event, names = self._native.prepare(type, payload, raw, meta)
        for name in names:
            subscription = bus._subscriptions.get(name)
            if subscription is None:
                continue
            delivered = event._delivered(subscription.group)
            try:
                result = _handlers.call_here(subscription._handler, delivered, bus._handling)
                if inspect.isawaitable(result):

                    async def finish(result: Any = result) -> None:
                        await result

                    asyncio.run(asyncio.wait_for(finish(), subscription._timeout))
            except asyncio.TimeoutError as error:
                raise HandlerTimeout(f"{name} ran longer than {subscription._timeout} s") from error
            except Exception as error:
                raise _failed(name, error) from error
        return Receipt(event.meta.id)

    def subscribe(
        self,
        pattern: str,
        handler: Callable[[Event[Any]], object] | Callable[[list[Event[Any]]], object],
        **options: Unpack[SubscribeOptions],
    ) -> BlockingSubscription:
        """As `Bus.subscribe`, for plain functions."""
        return BlockingSubscription(self._subscribe(pattern, handler, dict(options)))

    def _subscribe(self, pattern: str, handler: object, options: dict[str, Any]) -> Subscription:
        checked, options, name, concurrency = self._bus._checked(pattern, handler, options)
        if _handlers.is_async(checked):
            raise InvalidHandler(f"{name} is async; bus.blocking runs plain functions, await bus.start() runs both")
        if (swapped := self._bus._swapped(pattern, checked, options)) is not None:
            return swapped
        if (old := self._bus._in_the_way(options)) is not None:
            _wait(old._native.drain(10.0))
            old._ended()
        operation, claim = self._bus._on_threads(pattern, checked, options, concurrency, None)
        try:
            native = _wait(operation)
        except BaseException:
            claim(None)
            raise
        subscription: Subscription = claim(native)
        return subscription

    def events(self, pattern: str, **options: Unpack[SubscribeOptions]) -> Generator[Event[Any], None, None]:
        """As `Bus.events`, in the calling thread."""
        from polybus.bus import one_by_one

        one_by_one(options)
        given: dict[str, Any] = {"name": f"events:{pattern}", "concurrency": 1, **options}
        self._native.check_subscription(pattern, given)
        bridge = _native.Bridge(True)
        number = next(_handlers.numbers)
        operation, reporter = self._native.subscribe(bridge, number, pattern, given)
        native = _wait(operation)
        job: int | None = None
        try:
            while native.active and (taken := bridge.wait(True)) is not None:
                _runtime.drain_logs()
                for _, batch in taken[0]:
                    for job, event in batch:
                        yield event
                        reporter.done([job])
                        job = None
        finally:
            if job is not None:
                reporter.abandoned([job])
            _wait(native.drain(0))

    @overload
    def request(self, event: Event[Any], /, *, timeout: Seconds = ...) -> Event[Any]: ...
    @overload
    def request(
        self,
        type: str,
        payload: object = ...,
        *,
        timeout: Seconds = ...,
        raw: bytes | str | None = ...,
        **meta: Unpack[MetaOptions],
    ) -> Event[Any]: ...
    def request(
        self,
        type: Any,
        payload: object = None,
        *,
        timeout: Seconds = 5.0,
        raw: bytes | str | None = None,
        **meta: Any,
    ) -> Event[Any]:
        """As `Bus.request`."""
        reply: Event[Any] = _wait(self._native.request(type, payload, raw, meta, {"timeout": timeout}))
        return reply

    def respond(
        self, pattern: str, handler: Callable[[Event[Any]], object], **options: Unpack[SubscribeOptions]
    ) -> BlockingSubscription:
        """As `Bus.respond`, for plain functions."""
        return BlockingSubscription(self._subscribe(pattern, handler, {**options, "respond": True}))

    def guarantees(self) -> Guarantees:
        """As `Bus.guarantees`."""
        guarantees: Guarantees = _wait(self._native.guarantees())
        return guarantees

    def stats(self) -> dict[str, SubscriptionStats]:
        """As `Bus.stats`."""
        stats: dict[str, SubscriptionStats] = _wait(self._native.stats())
        return stats

    def metrics(self) -> str:
        """As `Bus.metrics`."""
        return self._bus.metrics()

    def history(
        self,
        pattern: str = "*",
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        limit: int = 100,
        after: str | None = None,
        records: bool = False,
    ) -> list[HistoryEntry]:
        """As `Bus.history`."""
        given = {"pattern": pattern, "since": since, "until": until, "limit": limit, "after": after, "records": records}
        entries: list[HistoryEntry] = _wait(self._native.history(given))
        return entries

    def replay(
        self,
        pattern: str = "*",
        *,
        group: str,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        after: str | None = None,
        limit: int | None = None,
        progress: Callable[[ReplayResult], object] | None = None,
    ) -> ReplayResult:
        """As `Bus.replay`, with a plain function for `progress`."""
        given = {"pattern": pattern, "since": since, "until": until, "group": group, "after": after, "limit": limit}
        return history.run_blocking(self._native, given, progress, _wait)

    def delete_group(self, group: str) -> bool:
        """As `Bus.delete_group`."""
        existed: bool = _wait(self._native.delete_group(group))
        return existed
