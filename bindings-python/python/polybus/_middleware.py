"""What runs around handlers and around publish.

Around handlers a chain is made when middleware is added, not for each event; without middleware there is none, and
nothing is awaited more. Middleware are coroutines: around a plain function they run on the loop, and its thread waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from polybus._native import Event, Receipt
from polybus.errors import InvalidConfig, InvalidHandler

On = Literal["handle", "publish"]
Middleware = Callable[[Event[Any], Callable[..., Awaitable[Any]]], object]
"""Called with the event, and with what runs the rest: `await call_next()`, or `await call_next(another_event)`."""

Step = Callable[[Any], Awaitable[Any]]
Around = tuple[Middleware, ...]

if TYPE_CHECKING:
    Tasks = set[asyncio.Task[None]]
    Turns = queue.SimpleQueue["tuple[contextvars.Context, Any, asyncio.Future[Any]] | _Ended"]


class LoopGone(Exception):
    """The loop was closed with a chain in the middle: nobody knows what it would have said."""


def check(middleware: object, on: object) -> None:
    """Refuse what cannot be middleware."""
    if on not in ("handle", "publish"):
        raise InvalidConfig(f"on={on!r} is not valid; known: handle, publish")
    if not callable(middleware):
        raise InvalidHandler(f"the middleware is a {type(middleware).__qualname__}; give an async function")
    try:
        inspect.signature(middleware).bind(object(), object())
    except TypeError as cause:
        raise InvalidHandler(f"middleware is called with the event and call_next; this one is not: {cause}") from None
    except ValueError:  # some builtins have no signature
        pass


def added(around: Around, middleware: Middleware, replace: bool) -> Around:
    """With one more at the end, or in the place of the one of that name."""
    name = getattr(middleware, "__qualname__", None)
    if replace and name is not None and "<lambda>" not in name:
        for at, other in enumerate(around):
            if getattr(other, "__qualname__", None) == name:
                return (*around[:at], middleware, *around[at + 1 :])
    return (*around, middleware)


def chain(around: Around, innermost: Step) -> Step:
    """One function that runs all: the first is the outermost."""
    for middleware in reversed(around):
        innermost = _step(middleware, innermost)
    return innermost


def _step(middleware: Middleware, inner: Step) -> Step:
    async def step(event: Any) -> Any:
        async def call_next(other: Any = None) -> Any:
            return await inner(event if other is None else other)

        result = middleware(event, call_next)
        return await result if inspect.isawaitable(result) else result

    return step


async def run(around: Around, event: Event[Any], innermost: Step) -> Any:
    """Run the chain once."""
    return await chain(around, innermost)(event)


# ---- publish ------------------------------------------------------------------------------------------------------


async def publish(around: Around, event: Event[Any], send: Step) -> Any:
    """One event through the chain. What the middleware return is the receipt; if they return nothing, the real one."""
    sent: Receipt | None = None

    async def step(at: int, event: Event[Any]) -> Any:
        nonlocal sent
        if at == len(around):
            sent = await send(event)
            return sent
        said = around[at](event, lambda other=None: step(at + 1, event if other is None else other))
        if inspect.isawaitable(said):
            said = await said
        return said if said is not None else sent or Receipt(event.meta.id)

    return await step(0, event)


async def publish_many(around: Around, events: Sequence[Event[Any]], send_all: Step) -> list[Any]:
    """Each event through a chain of its own, at the same time; when all have called on, all are sent together."""
    loop = asyncio.get_running_loop()
    arrived: dict[int, tuple[Event[Any], asyncio.Future[Receipt]]] = {}
    undecided, ready, sent = len(events), loop.create_future(), False

    def decided() -> None:
        nonlocal undecided
        undecided -= 1
        if undecided == 0 and not ready.done():
            ready.set_result(None)

    async def one(index: int, event: Event[Any]) -> Any:
        async def send(event: Event[Any]) -> Receipt:
            if sent or index in arrived:  # a middleware that tries again
                (receipt,) = await send_all([event])
                return receipt  # type: ignore[no-any-return]
            arrived[index] = event, loop.create_future()
            decided()
            return await arrived[index][1]

        try:
            return await publish(around, event, send)
        finally:
            if index not in arrived:
                decided()

    tasks = [loop.create_task(one(index, event)) for index, event in enumerate(events)]
    try:
        if tasks:
            await ready
        _raise_first(task for task in tasks if task.done())
        order = sorted(arrived)
        sent = True
        try:
            receipts = await send_all([arrived[index][0] for index in order]) if order else []
        except Exception as error:
            if failures := getattr(error, "failures", None):
                error.failures = [(order[at], failure) for at, failure in failures]  # type: ignore[attr-defined]
            for index in order:
                arrived[index][1].set_exception(error)
        else:
            for index, receipt in zip(order, receipts, strict=True):
                arrived[index][1].set_result(receipt)
        if tasks:
            await asyncio.wait(tasks)
        _raise_first(tasks)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_first(tasks: Iterable[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.result()


def event_of(type: Any, payload: Any, raw: Any, meta: dict[str, Any]) -> Event[Any]:
    """The event of what `publish` was given."""
    if not isinstance(type, Event):
        return Event.create(type, payload, raw=raw, **meta)
    if payload is not None or raw is not None or meta:
        raise TypeError("publish takes an event alone, or a type with payload and meta")
    return type


def events_of(events: Iterable[Any]) -> list[Event[Any]]:
    """The events of what `publish_many` was given."""
    given = list(events)
    if not all(isinstance(event, Event) for event in given):
        raise TypeError("publish_many takes events; make them with Event.create(type, payload)")
    return given


# ---- threads ------------------------------------------------------------------------------------------------------


def from_thread(
    loop: asyncio.AbstractEventLoop, whole: Callable[[Step], Coroutine[Any, Any, Any]], call: Callable[[Any], Any]
) -> Any:
    """Run `whole(innermost)` on `loop`, and whatever it gives to `innermost` with `call` in this thread, meanwhile.

    `call` runs in the context of the chain, so it sees the context variables that middleware set.
    """
    turns: Turns = queue.SimpleQueue()

    async def innermost(argument: Any) -> Any:
        future: asyncio.Future[Any] = loop.create_future()
        turns.put((contextvars.copy_context(), argument, future))
        result = await future
        return await result if inspect.isawaitable(result) else result

    async def run() -> None:
        try:
            result = await whole(innermost)
        except BaseException as error:  # also SystemExit: it is the thread's to decide
            turns.put(_Ended(None, error))
            if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
                raise
        else:
            turns.put(_Ended(result, None))

    tasks: Tasks = set()
    _call_soon(loop, lambda: tasks.add(loop.create_task(run())))
    try:
        return _take_turns(loop, turns, call)
    except BaseException:  # Ctrl-C, say: nobody waits for the rest
        with contextlib.suppress(LoopGone):
            _call_soon(loop, lambda: [task.cancel() for task in tasks])
        raise


def _take_turns(loop: asyncio.AbstractEventLoop, turns: Turns, call: Callable[[Any], Any]) -> Any:
    while True:
        try:
            turn = turns.get(timeout=1.0)
        except queue.Empty:
            if loop.is_closed():
                raise LoopGone("the event loop was closed while middleware ran on it") from None
            continue
        if isinstance(turn, _Ended):
            return turn.open()
        context, argument, future = turn
        result: Any = None
        error: BaseException | None = None
        try:
            result = context.run(call, argument)
        except StopIteration as stop:  # a future refuses it
            error = RuntimeError("raised StopIteration")
            error.__cause__ = stop
        except BaseException as raised:
            error = raised
        _call_soon(loop, _settle, future, result, error)


class _Ended:
    def __init__(self, result: Any, error: BaseException | None) -> None:
        self._result, self._error = result, error

    def open(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        raise LoopGone("the event loop is closed, so middleware cannot run on it") from None


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


_own: asyncio.AbstractEventLoop | None = None
_lock = threading.Lock()


def own_loop() -> asyncio.AbstractEventLoop:
    """The loop for middleware in programs without one, on a thread of its own; made on first use."""
    global _own
    with _lock:
        if _own is None:
            loop = _own = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(loop,), name="polybus-middleware", daemon=True).start()
        return _own


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def end_own_loop() -> None:
    """At exit."""
    if _own is not None and not _own.is_closed():
        _own.call_soon_threadsafe(_own.stop)


def forget_own_loop() -> object:
    """In a forked child: the thread is not here. Returns what must not be touched."""
    global _own, _lock
    old, _own, _lock = _own, None, threading.Lock()
    return old
