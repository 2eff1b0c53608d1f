"""The bus of an asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, overload

from polybus import _development, _handlers, _log, _native, _runtime
from polybus._batches import BatchLoopHandler, BatchThreadHandler, takes_batches
from polybus._handlers import HandBack, Handler, LoopHandler, ThreadHandler, ThreadPool
from polybus._look import Looks
from polybus._native import Event, Receipt
from polybus._requests import Requests
from polybus._use import Uses
from polybus.dead_letters import DeadLetters
from polybus.errors import DuplicateSubscription, HandlerError, HandlerTimeout, InvalidConfig, Unsupported
from polybus.subscription import Subscription

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from polybus._log import AnyLogger
    from polybus._options import BusOptions, MetaOptions, Mode, Seconds, SubscribeOptions
    from polybus.blocking import Blocking

_shared: dict[object, Any] = {}
_shared_lock = threading.Lock()

H = TypeVar("H", bound=Callable[..., object])

__all__ = ["Bus"]


class Bus(Uses, Requests, Looks):
    """An event bus. Making one opens nothing, so it may stand at the top of a module.

    One bus may be used from several event loops and threads, and in a forked child, which connects anew and has no
    subscriptions until it starts. Errors: `InvalidConfig` for a URL or a value that can never work, `TypeError` for an
    unknown keyword; both name the nearest right word.
    """

    _lazy = False
    """Whether the first use starts it: so does a test bus."""

    def __init__(self, url: str | None = None, **options: Unpack[BusOptions]) -> None:
        given: dict[str, Any] = dict(options)
        self.logger: AnyLogger = _log.check(given.pop("logger", None))
        address: Any = "memory://" if url is None else url
        if not isinstance(address, str):
            raise InvalidConfig(f"the URL is a {type(url).__qualname__}; write a str like 'sqlite:///events.db'")
        self._set_up(_native.NativeBus(address, given))

    def _set_up(self, native: _native.NativeBus) -> None:
        self._native = native
        self._replaces = native.on_duplicate == "replace" or (native.on_duplicate is None and _development.reloads())
        self._registered: dict[str, tuple[str, Handler, dict[str, Any]]] = {}
        self._forget_process()
        _runtime.watch_bus(self)

    def _forget_process(self) -> object:
        """What belongs to one process id: made anew in a forked child, which keeps the parent's untouched."""
        old = self.__dict__.get("_subscriptions"), self.__dict__.get("_pool")
        self._subscriptions: dict[str, Subscription] = {}
        self._pool: ThreadPool | None = None
        self._started = False
        self._late: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        return old

    @classmethod
    def from_env(cls, *, logger: AnyLogger | None = None) -> Self:
        """A bus from `POLYBUS_URL`, `POLYBUS_SERVICE` and `POLYBUS_<OPTION>` for every other option."""
        return cls._from(_native.options_from_env(dict(os.environ)), logger)

    @classmethod
    def from_config(
        cls, config: str | os.PathLike[str] | Mapping[str, Any], *, logger: AnyLogger | None = None
    ) -> Self:
        """A bus from a JSON or YAML file, or from a dict of the same shape.

        Names are those of the keyword arguments, and `url`; `${VAR}` and `${VAR:-default}` take environment variables.
        `InvalidConfig` for a missing or malformed file, an unset variable, an unknown name.
        """
        if isinstance(config, Mapping):
            return cls._from(_native.options_from_dict(dict(config), dict(os.environ)), logger)
        return cls._from(_native.options_from_file(os.fspath(config), dict(os.environ)), logger)

    @classmethod
    def _from(cls, found: tuple[str | None, str], logger: AnyLogger | None) -> Self:
        bus = cls.__new__(cls)
        url, options = found
        bus.logger = _log.check(logger)
        bus._set_up(_native.NativeBus.from_json("memory://" if url is None else url, options))
        return bus

    @classmethod
    def shared(cls, url: str | None = None, **options: Unpack[BusOptions]) -> Self:
        """The bus of this process for that URL, bus name and service: made by the first call, found by later ones.

        For modules that are loaded again, such as a notebook's cell or `importlib.reload`: a second bus would leave the
        first one's handlers running. The options of the first call hold.
        """
        key = (cls, url, options.get("bus"), options.get("service"))
        with _shared_lock:
            found = _shared.get(key)
            if found is None:
                found = _shared[key] = cls(url, **options)
        return found

    @property
    def url(self) -> str:
        """Where it connects, with `***` in place of a password."""
        return self._native.url

    @property
    def service(self) -> str:
        """The service that it belongs to."""
        return self._native.service

    @functools.cached_property
    def dead_letters(self) -> DeadLetters:
        """What no handler could finish."""
        return DeadLetters(self._native)

    @functools.cached_property
    def blocking(self) -> Blocking:
        """The same methods for threads without an event loop."""
        from polybus.blocking import Blocking

        return Blocking(self)

    # ---- life ----

    async def start(self) -> Self:
        """Open the transport and subscribe what `on` registered. A bus that only publishes need not be started.

        Idempotent; opens a closed bus again. Errors: `ConnectionFailed`, `InvalidConfig`, those of `subscribe`.
        """
        await self._open()
        try:
            for pattern, handler, options in self._missing():
                await self._subscribe(pattern, handler, options)
        except BaseException:
            await self.close(0)
            raise
        return self

    async def _open(self) -> None:
        _runtime.set_log_level()
        await _runtime.run(self._native.start())
        # What a closed loop left behind ends first: its names are needed again.
        for name, subscription in list(self._subscriptions.items()):
            if not subscription.active or subscription.orphaned:
                await _runtime.run(subscription._native.drain(0))
                self._subscriptions.pop(name, None)
        self._started = True

    def _missing(self) -> list[tuple[str, Handler, dict[str, Any]]]:
        running = self._subscriptions
        return [
            entry
            for name, entry in self._registered.items()
            if name not in running or (self._replaces and running[name]._handler is not entry[1])
        ]

    async def close(self, timeout: Seconds = 10.0) -> None:
        """Take nothing more, let running handlers end for up to `timeout` seconds, hand back the rest, close.

        Idempotent. Called by one of the bus's own handlers, or by a task that it started, it returns at once, and the
        bus closes when that handler has ended.
        Afterwards everything fails with `BusClosed` until `start`.
        """
        if self._in_handler():
            self._native.close_soon(timeout)
            self._started = False
            return
        subscriptions = self._closing()
        await _runtime.run(self._native.close(timeout))
        self._closed(subscriptions)

    def _closing(self) -> list[Subscription]:
        self._started = False
        subscriptions = list(self._subscriptions.values())
        for subscription in subscriptions:
            subscription.closing()
        return subscriptions

    def _closed(self, subscriptions: list[Subscription]) -> None:
        for subscription in subscriptions:
            subscription._ended()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop(1.0)
        _runtime.drain_logs()

    def _in_handler(self) -> bool:
        return _handlers.current.get() is self._native

    def _close_at_exit(self, timeout: float) -> None:
        if self._native.opened:
            with contextlib.suppress(Exception):
                self._native.close(timeout).wait()
        if self._pool is not None:
            self._pool.stop(0.1)

    async def __aenter__(self) -> Self:
        """`start`."""
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        """`close`."""
        await self.close()

    # ---- publish ----

    @overload
    async def publish(
        self,
        event: Event[Any],
        /,
        *,
        delay: Seconds | None = ...,
        expires_in: Seconds | None = ...,
        mode: Mode | None = ...,
    ) -> Receipt: ...
    @overload
    async def publish(
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
    async def publish(
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
        """Publish an event, and return when it is as safe as the transport makes it.

        `delay` and `expires_in` are seconds: not delivered before, and not after. `raw` is a payload that is JSON text
        already. An `idempotency_key` that was published on this bus before, within its `idempotency_window`, stores
        nothing: the receipt says `duplicate` and names the first event. With `mode="sync"`, run this process's matching
        handlers in order of subscription and raise `HandlerError` with the first failure; nothing goes to the
        transport.

        Errors: `InvalidEvent`, `PayloadTooLarge`, `BusClosed`, `PublishTimeout` (nothing stored), `PublishUnknown`
        (perhaps stored), `ConnectionFailed`, `BufferFull`. Cancelling the call does not take the event back.
        """
        given = None
        if delay is not None or expires_in is not None or mode is not None:
            given = {"delay": delay, "expires_in": expires_in, "mode": mode}
        if self._late or self._lazy:
            await self._settle()
        if self._publishing:
            return await self._publish_through(type, payload, raw, meta, given)
        if self._is_sync(given):
            return await self._publish_here(type, payload, raw, meta)
        receipt: Receipt = await _runtime.run(self._native.publish(type, payload, raw, meta, given))
        return receipt

    def _is_sync(self, given: dict[str, Any] | None) -> bool:
        if given is None:
            return self._native.mode == "sync"
        sync = self._native.mode_of(given) == "sync"
        if sync and (given["delay"] is not None or given["expires_in"] is not None):
            raise Unsupported("a synchronous publish runs the handlers now: leave out delay= and expires_in=")
        return sync

    async def publish_many(self, events: Iterable[Event[Any]]) -> list[Receipt]:
        """Publish events in order, all or none. The error's `.failures` lists which were refused, and why.

        Publish middleware runs for each of them, for all at the same time; then all are stored together.
        """
        if self._late or self._lazy:
            await self._settle()
        if self._native.mode == "sync":
            return [await self.publish(event) for event in events]
        if self._publishing:
            return await self._publish_many_through(events)
        receipts: list[Receipt] = await _runtime.run(self._native.publish_many(events))
        return receipts

    async def _ready(self) -> None:
        if self._late or self._lazy:
            await self._settle()

    async def _settle(self) -> None:
        """What must have happened before anything else does."""
        if self._lazy and not self._started and not self._native.closed:
            await self.start()
        if self._late:
            await asyncio.wait(self._late)

    async def _publish_here(self, type: Any, payload: object, raw: Any, meta: dict[str, Any]) -> Receipt:
        if not self._started and self._registered and not self._native.closed:
            await self.start()  # handlers that nobody subscribed would be left out in silence
        event, names = self._native.prepare(type, payload, raw, meta)
        for name in names:
            subscription = self._subscriptions.get(name)
            if subscription is None:
                continue  # subscribed, and not yet told to us
            task = asyncio.ensure_future(self._call(subscription, event))
            try:
                done, _ = await asyncio.wait({task}, timeout=subscription._timeout)
            except BaseException:
                task.cancel()
                raise
            if not done:
                task.cancel()
                raise HandlerTimeout(f"{name} ran longer than {subscription._timeout} s; later handlers were not run")
            try:
                task.result()
            except Exception as error:
                raise _failed(name, error) from error
        return Receipt(event.meta.id)

    def _call(self, subscription: Subscription, event: Event[Any]) -> Coroutine[Any, Any, object]:
        return subscription.call(event._delivered(subscription.group), self._handling)

    # ---- subscribe ----

    def on(self, pattern: str, **options: Unpack[SubscribeOptions]) -> Callable[[H], H]:
        """Register a handler, to be subscribed by `start`.

        On a bus that has started, the handler is subscribed at once in the background, and later publishes of this bus
        wait for that; use `subscribe` to wait for it yourself. Errors, at once: `InvalidPattern`, `InvalidConfig`,
        `DuplicateSubscription`, `TypeError`.
        """
        self._native.check_subscription(pattern, {"name": "handler", **options})

        def register(handler: H) -> H:
            entry = self._register(pattern, handler, dict(options))
            if self._started:
                if self._swapped(*entry) is not None:
                    return handler
                try:
                    asyncio.get_running_loop()
                except RuntimeError:
                    return handler  # the next start() finds it
                task = asyncio.ensure_future(self._subscribe_late(*entry, after=set(self._late)))
                self._late.add(task)
                task.add_done_callback(self._late.discard)
            return handler

        return register

    def _register(self, pattern: str, handler: object, options: dict[str, Any]) -> tuple[str, Handler, dict[str, Any]]:
        checked, options, name, _ = self._checked(pattern, handler, options)
        if name in self._registered and not self._replaces:
            raise DuplicateSubscription(
                f'this bus has a handler named {name!r}; pass another name=, or on_duplicate="replace" to the bus if a '
                "module is loaded again"
            )
        self._registered[name] = pattern, checked, options
        return self._registered[name]

    def _checked(
        self, pattern: str, handler: object, options: dict[str, Any]
    ) -> tuple[Handler, dict[str, Any], str, int]:
        """Everything that can be known to be wrong before anything is opened."""
        checked = _handlers.check(handler)
        if options.get("name") is None:
            options = {**options, "name": _handlers.name_of(handler)}
        _handlers.key_function(options)
        name, concurrency = self._native.check_subscription(pattern, options)
        return checked, options, name, concurrency

    async def _subscribe_late(
        self, pattern: str, handler: Handler, options: dict[str, Any], after: set[asyncio.Task[None]]
    ) -> None:
        try:
            if self._replaces and after:
                await asyncio.wait(after)  # the last handler of a name is to have it
            await self._subscribe(pattern, handler, options)
        except Exception as error:
            _log.write(self.logger, logging.ERROR, f"{options['name']} is not subscribed to {pattern}", error)

    async def subscribe(
        self,
        pattern: str,
        handler: Callable[[Event[Any]], object] | Callable[[list[Event[Any]]], object],
        **options: Unpack[SubscribeOptions],
    ) -> Subscription:
        """Hand every matching event to `handler`. Once this returns, every later publish is seen, whoever makes it.

        Return = done. Raise = retry by policy, then dead letter. Raise `Retry(after=…)` = again then. Raise
        `Reject("why")` = dead letter now. A plain function runs on a thread. With `batch` the handler takes a list, and
        `BatchFailed` names those that failed. Errors: `InvalidPattern`, `InvalidConfig`,
        `DuplicateSubscription`, `BusClosed`, `ConnectionFailed`; `TypeError` for an unknown keyword.
        """
        if self._lazy:
            await self._settle()
        return await self._subscribe(pattern, handler, dict(options))

    def _in_the_way(self, options: dict[str, Any]) -> Subscription | None:
        """The running subscription whose name this one wants, if it may have it."""
        old = self._subscriptions.get(options["name"])
        return old if self._replaces and old is not None and old.active else None

    def _swapped(self, pattern: str, handler: Handler, options: dict[str, Any]) -> Subscription | None:
        """The running subscription, with this handler from its next event on; None if more than that has changed."""
        old = self._in_the_way(options)
        if old is None or not old.takes(pattern, handler, options):
            return None
        old.rewire(handler, self._handling)
        return old

    async def _subscribe(
        self, pattern: str, handler: object, options: dict[str, Any], replace: bool = True
    ) -> Subscription:
        checked, options, _, concurrency = self._checked(pattern, handler, options)
        if replace and (swapped := self._swapped(pattern, checked, options)) is not None:
            return swapped
        if replace and (old := self._in_the_way(options)) is not None:
            await old.unsubscribe()
        loop = asyncio.get_running_loop()
        if not _handlers.is_async(checked):
            operation, claim = self._on_threads(pattern, checked, options, concurrency, loop)
        else:
            operation, claim = self._on_loop(pattern, checked, options, loop)
        try:
            native = await _runtime.run_or_forget(operation)
        except BaseException:
            claim(None)
            raise
        subscription: Subscription = claim(native)
        return subscription

    def _on_loop(
        self, pattern: str, handler: Any, options: dict[str, Any], loop: asyncio.AbstractEventLoop
    ) -> tuple[_native.Operation, Callable[..., Any]]:
        bridge = _runtime.bridge()
        number = next(_handlers.numbers)
        kind = BatchLoopHandler if takes_batches(options) else LoopHandler
        answers, key = bool(options.get("respond")), _handlers.key_function(options)
        runner = bridge.handlers[number] = kind(
            self._native, options["name"], handler, loop, self._handling, answers, key
        )
        handlers = weakref.ref(bridge)

        def ended() -> None:
            if (alive := handlers()) is not None:
                alive.handlers.pop(number, None)
                alive.native.remove(number)

        operation, runner.reporter = self._native.subscribe(bridge.native, number, pattern, options)
        return operation, functools.partial(self._claim, handler, options, runner, ended)

    def _on_threads(
        self,
        pattern: str,
        handler: Handler,
        options: dict[str, Any],
        concurrency: int,
        loop: asyncio.AbstractEventLoop | None,
    ) -> tuple[_native.Operation, Callable[..., Any]]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPool()
            pool = self._pool
        number = next(_handlers.numbers)
        kind = BatchThreadHandler if takes_batches(options) else ThreadHandler
        answers, key = bool(options.get("respond")), _handlers.key_function(options)
        runner = kind(self._native, handler, loop, self._handling, answers, key)
        operation, runner.reporter = self._native.subscribe(pool.native, number, pattern, options)
        pool.add(number, runner, concurrency)
        return operation, functools.partial(
            self._claim, handler, options, runner, functools.partial(pool.remove, number)
        )

    def _claim(
        self,
        handler: Handler,
        options: dict[str, Any],
        runner: LoopHandler | ThreadHandler,
        ended: Callable[[], None],
        native: _native.NativeSubscription | None,
    ) -> Subscription | None:
        """The subscription has begun, or (None) has not."""
        if native is None:
            ended()
            return None
        runner.subscription = native
        timeout = options.get("timeout")
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout

        def forget() -> None:
            ended()
            if self._subscriptions.get(native.name) is subscription:
                del self._subscriptions[native.name]

        subscription = Subscription(native, handler, seconds, runner, forget, options)
        self._subscriptions[native.name] = subscription
        subscription.rewire(handler, self._handling)  # some may have been added meanwhile
        return subscription

    async def events(self, pattern: str, **options: Unpack[SubscribeOptions]) -> AsyncGenerator[Event[Any], None]:
        """Iterate over matching events. Each is done when the next one is asked for.

        Leaving the loop in the middle hands the current event back; it will come again. The subscription ends with the
        iterator; its durable group (default name `events:<pattern>`) stays. One event is held at a time, unless
        `prefetch` or `concurrency` say more. Ends when the bus is closed.
        """
        options.setdefault("name", f"events:{pattern}")
        options.setdefault("concurrency", 1)
        one_by_one(options)
        waiting: asyncio.Queue[tuple[Event[Any], asyncio.Future[None]] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        async def hold(event: Event[Any]) -> None:
            done = loop.create_future()
            waiting.put_nowait((event, done))
            await done

        subscription = await self._subscribe(pattern, hold, dict(options), replace=False)
        subscription.on_closing(functools.partial(waiting.put_nowait, None))
        done: asyncio.Future[None] | None = None
        try:
            while (item := await waiting.get()) is not None:
                event, done = item
                if done.done():
                    continue  # cancelled while it waited: the lease is lost
                yield event
                if not done.done():
                    done.set_result(None)
        finally:
            held = [done] if done is not None else []
            while not waiting.empty():
                if (item := waiting.get_nowait()) is not None:
                    held.append(item[1])
            for future in held:
                if not future.done():
                    future.set_exception(HandBack())
            await subscription.unsubscribe(0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} service={self.service!r}>"


def one_by_one(options: Mapping[str, Any]) -> None:
    """Refuse a batch where events are read one by one."""
    if takes_batches(options):
        raise InvalidConfig("events() gives one event at a time; leave out batch=, or subscribe a handler")


def _failed(name: str, error: Exception) -> HandlerError:
    return HandlerError(f"{name} raised {type(error).__qualname__}; later handlers were not run")
