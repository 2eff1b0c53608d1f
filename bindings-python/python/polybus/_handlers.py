"""Running handlers: coroutines as tasks of the loop that subscribed, plain functions on threads.

What a handler says goes to the core as it is; what becomes of the event is decided there.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import functools
import inspect
import itertools
import sys
import threading
import traceback
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from polybus import _middleware, _native
from polybus._runtime import drain_logs
from polybus.errors import InvalidConfig, InvalidHandler, PolybusError, Reject, Retry

if TYPE_CHECKING:
    from polybus._native import Event

Handler = Callable[["Event[Any]"], object]

numbers = itertools.count()
"""Names subscriptions in what bridges hand out."""


current: contextvars.ContextVar[_native.NativeBus | None] = contextvars.ContextVar("polybus_handler_of", default=None)
"""The bus whose handler is running: `close()` from inside must not wait for itself."""


class HandBack(BaseException):
    """Raised into the handler of an iterator that ended: the event goes back, the attempt does not count."""


# ---- what was given as a handler ----------------------------------------------------------------------------------


def check(handler: object) -> Handler:
    """Refuse what cannot be called with an event."""
    if not callable(handler):
        raise InvalidHandler(f"the handler is a {type(handler).__qualname__}, which is not callable; give a function")
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # some builtins have none
        return handler
    try:
        signature.bind(object())
    except TypeError as cause:
        raise InvalidHandler(
            f"the handler {name_of(handler) or handler!r} cannot be called with one argument, the event: {cause}"
        ) from None
    return handler


def name_of(handler: object) -> str | None:
    """The qualified name; None for what has no name of its own, such as a lambda."""
    while isinstance(handler, functools.partial):
        return None
    name = getattr(handler, "__qualname__", None)
    if name is None:
        name = type(handler).__qualname__
    return None if name is None or "<lambda>" in name else str(name)


def is_async(handler: object) -> bool:
    """Whether calling it gives a coroutine."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(type(handler), "__call__", None))  # noqa: B004


KeyFunction = Callable[["Event[Any]"], object]


def key_function(options: dict[str, Any]) -> KeyFunction | None:
    """The function that tells the keys of an idempotent subscription, if one was given."""
    key: KeyFunction | None = options.get("idempotent")
    if not callable(key):
        return None
    if is_async(key):
        raise InvalidConfig("idempotent= is a coroutine function; give a plain function: it runs before each event")
    return key


def tell_key(reporter: _native.Reporter, job: int, key: KeyFunction, event: Event[Any]) -> None:
    """Answer the core, which asked for the key of an event."""
    try:
        told = key(event)
        if isinstance(told, int) and not isinstance(told, bool):
            told = str(told)
        if told is not None and not isinstance(told, str):
            raise TypeError(f"idempotent= told a key that is a {type(told).__qualname__}; return a str, an int or None")
        reporter.key(job, told)
    except BaseException as error:
        report(reporter, job, error)
        if not isinstance(error, Exception):
            raise


# ---- what a handler said ------------------------------------------------------------------------------------------


def describe(error: BaseException) -> tuple[str, str, str]:
    """Class, message and traceback, whatever the error does to stop us."""
    kind = type(error).__qualname__
    try:
        message = str(error)
    except Exception as failure:
        message = f"<str() of it raised {type(failure).__qualname__}>"
    try:
        stack = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:
        stack = "".join(traceback.format_tb(error.__traceback__))
    return tuple(part.encode("utf-8", "replace").decode() for part in (kind, message, stack))  # type: ignore[return-value]


def report(reporter: _native.Reporter, job: int, error: BaseException) -> None:
    """Tell the core what the handler raised."""
    code = error.code if isinstance(error, PolybusError) else None
    if isinstance(error, (HandBack, _middleware.LoopGone, KeyboardInterrupt, GeneratorExit)):
        reporter.abandoned([job])  # stopped from outside: not the event's fault
    elif isinstance(error, Reject):
        reporter.rejected(job, *describe(error))
    elif isinstance(error, Retry):
        reporter.failed(job, *describe(error), error.after)
    else:
        reporter.failed(job, *describe(error), None, code)


# ---- coroutines ---------------------------------------------------------------------------------------------------


class LoopHandler:
    """An async handler on its loop: a task for each event, so that context variables stay apart."""

    reporter: _native.Reporter

    def __init__(
        self,
        bus: _native.NativeBus,
        name: str,
        handler: Callable[..., Awaitable[object]],
        loop: asyncio.AbstractEventLoop,
        around: _middleware.Around,
        answers: bool = False,
        key: KeyFunction | None = None,
    ) -> None:
        self._bus = bus
        self._key = key
        self._name = name
        self._loop = loop
        self._tasks: dict[Any, asyncio.Task[None]] = {}
        self._cancelled: set[Any] = set()
        self._done: list[int] = []
        self._answers = answers
        self.rewire(handler, around)
        self.gone = False
        self.subscription: _native.NativeSubscription | None = None
        # The context of each task is a copy of this one; Python 3.10 cannot be told, see `_runner`.
        self._context = contextvars.Context()
        self._context.run(current.set, bus)

    def rewire(self, handler: Callable[[Event[Any]], Awaitable[object]], around: _middleware.Around) -> None:
        """From the next event on, run this handler inside this middleware."""
        run = self._answerer if self._answers else self._runner
        self._run = run(_middleware.chain(around, handler) if around else handler)

    def serves(self) -> bool:
        """Whether it runs for the caller: on the caller's loop, or on any if the caller has none."""
        running = asyncio._get_running_loop()
        return running is None or running is self._loop

    def start(self, batch: list[tuple[Any, Any]]) -> None:
        """Run the handler in a task of its own for each event."""
        if self._key is not None:
            batch = self._tell_keys(batch, self._key)
        started = 0
        task_of = self._task_maker()
        try:
            for started, (job, event) in enumerate(batch, 1):  # noqa: B007
                task = task_of(self._run(job, event))
                if not task.done():
                    self._tasks[job] = task
        except BaseException:
            self.hand_back(batch[started:])
            raise

    def hand_back(self, batch: list[tuple[Any, Any]]) -> None:
        """These were not started."""
        self.reporter.abandoned([job for job, _ in batch])

    def _tell_keys(self, batch: list[tuple[int, Event[Any]]], key: KeyFunction) -> list[tuple[int, Event[Any]]]:
        """Answer the jobs that only ask for a key; the rest are to be run."""
        run = []
        for job, event in batch:
            if event.delivery is not None and event.delivery.attempt == 0:
                self._context.copy().run(tell_key, self.reporter, job, key, event)
            else:
                run.append((job, event))
        return run

    def _task_maker(self) -> Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]:
        loop, name, context = self._loop, self._name, self._context
        task = asyncio.Task
        if sys.version_info < (3, 11):
            return lambda coroutine: loop.create_task(coroutine, name=name)
        elif loop.get_task_factory() is not None:
            return lambda coroutine: loop.create_task(coroutine, name=name, context=context.copy())
        elif sys.version_info < (3, 12):
            return lambda coroutine: task(coroutine, loop=loop, name=name, context=context.copy())
        else:  # a handler that does not wait ends here, without a turn of the loop
            return lambda coroutine: task(coroutine, loop=loop, name=name, context=context.copy(), eager_start=True)

    def _runner(self, handler: Callable[..., Awaitable[object]]) -> Callable[..., Coroutine[Any, Any, None]]:
        """The coroutine of one event. A closure, because it is the innermost loop."""
        done, forget, failed = self._done, self._tasks.pop, self._failed
        call_soon, flush = self._loop.call_soon, self._flush
        enter = None if sys.version_info >= (3, 11) else functools.partial(current.set, self._bus)

        async def run(job: int, event: Event[Any]) -> None:
            if enter is not None:
                enter()
            try:
                await handler(event)
            except BaseException as error:
                forget(job, None)
                failed(job, error)
                if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                    raise
            else:
                forget(job, None)
                if not done:
                    call_soon(flush)
                done.append(job)

        return run

    def _answerer(self, handler: Callable[[Event[Any]], Awaitable[object]]) -> Callable[..., Coroutine[Any, Any, None]]:
        """As `_runner`, where what the handler returns is a reply."""

        async def run(job: int, event: Event[Any]) -> None:
            current.set(self._bus)
            try:
                self.reporter.replied(job, await handler(event))
            except BaseException as error:
                self._tasks.pop(job, None)
                self._failed(job, error)
                if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                    raise
            else:
                self._tasks.pop(job, None)

        return run

    def _flush(self) -> None:
        done = self._done.copy()
        self._done.clear()
        self.reporter.done(done)

    def _failed(self, job: int, error: BaseException) -> None:
        if job in self._cancelled:
            self._cancelled.discard(job)
            self.reporter.abandoned([job])  # the core has decided already
        elif isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            # Raised by our own `await`: what the handler returned is no awaitable.
            message = f"{error}: the handler looks like a coroutine function, and returned something else"
            self.reporter.failed(job, "TypeError", message, "")
        else:
            report(self.reporter, job, error)

    def cancel(self, job: Any) -> None:
        """Stop the task of a job: its time is up, or the event is somebody else's now."""
        task = self._tasks.get(job)
        if task is not None and not task.done():
            self._cancelled.add(job)
            task.cancel()

    def abandon(self) -> None:
        """The loop is going: hand everything back."""
        self.gone = True
        if self._done:
            self._flush()
        for task in self._tasks.values():
            # A loop that was closed by hand drops its tasks, with a complaint for each: these are accounted for.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        if self.subscription is not None:
            self.subscription.abandon()


# ---- plain functions ----------------------------------------------------------------------------------------------


class ThreadPool:
    """Threads for the plain functions of one bus: grown when all are busy, up to the sum of their concurrencies.

    They wait inside the core, with the GIL released. A thread whose job was cancelled cannot be stopped: it is given
    up, another may take its place, and it ends when the function returns.
    """

    def __init__(self) -> None:
        self.native = _native.Bridge(True)
        self._handlers: dict[int, ThreadHandler] = {}
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._running: dict[tuple[int, Any], threading.Thread] = {}
        self._limit = 0

    def add(self, number: int, handler: ThreadHandler, concurrency: int) -> None:
        """Make room for a handler."""
        self._handlers[number] = handler
        with self._lock:
            self._limit += concurrency
        handler.concurrency = concurrency
        self._grow()

    def remove(self, number: int) -> None:
        """Its subscription has ended."""
        self.native.remove(number)
        if (handler := self._handlers.pop(number, None)) is not None:
            with self._lock:
                self._limit -= handler.concurrency

    def _grow(self) -> None:
        """One thread waits, if there may be another one.

        It is one more than the handlers may need: somebody has to hear that a job was cancelled.
        """
        with self._lock:
            if self.native.idle() > 0 or len(self._threads) > self._limit:
                return
            thread = threading.Thread(target=self._work, name=f"polybus-{len(self._threads) + 1}", daemon=True)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is going
            self._threads.discard(thread)

    def _work(self) -> None:
        thread = threading.current_thread()
        while thread in self._threads and (taken := self.native.wait(False)) is not None:
            jobs, cancelled = taken
            for key in cancelled:
                self._give_up(key)
            for number, batch in jobs:
                handler = self._handlers.get(number)
                if handler is None:
                    continue
                for job, event in batch:
                    self._running[number, job] = thread
                    self._grow()
                    try:
                        handler.run(job, event)
                    finally:
                        self._running.pop((number, job), None)
            drain_logs()
        self._threads.discard(thread)

    def _give_up(self, key: tuple[int, int]) -> None:
        thread = self._running.pop(key, None)
        if thread is None:  # one job of a batch stands for all
            number, job = key
            running = list(self._running)
            batch = (other for other in running if other[0] == number and isinstance(other[1], tuple))
            thread = self._running.pop(next((other for other in batch if job in other[1]), key), None)
        if thread is not None:
            self._threads.discard(thread)
            self._grow()

    def stop(self, timeout: float) -> None:
        """End the waiting threads; those that run a function end after it."""
        self.native.stop()
        busy = set(self._running.values()) | {threading.current_thread()}
        for thread in list(self._threads - busy):
            thread.join(timeout)


class ThreadHandler:
    """A plain function, called on the pool's threads, each time in a context of its own."""

    reporter: _native.Reporter
    concurrency: int = 0
    gone = False

    def __init__(
        self,
        bus: _native.NativeBus,
        handler: Handler,
        loop: asyncio.AbstractEventLoop | None,
        around: _middleware.Around,
        answers: bool = False,
        key: KeyFunction | None = None,
    ) -> None:
        self._bus = bus
        self._answers = answers
        self._key = key
        self.rewire(handler, around)
        self._loop = None if loop is None else weakref.ref(loop)
        self.subscription: _native.NativeSubscription | None = None

    def rewire(self, handler: Handler, around: _middleware.Around) -> None:
        """From the next event on, call this function inside this middleware."""
        self._handler, self._around = handler, around

    def serves(self) -> bool:
        """Threads serve everybody."""
        return True

    def run(self, job: Any, event: Any) -> None:
        """Call the function and say what came of it."""
        if self._key is not None and event.delivery is not None and event.delivery.attempt == 0:
            contextvars.copy_context().run(tell_key, self.reporter, job, self._key, event)
            return
        try:
            result = contextvars.copy_context().run(self._call, event)
            if inspect.isawaitable(result):
                result = self._finish(result)
            if self._answers:
                self.reporter.replied(job, result)
        except BaseException as error:
            self._failed(job, event, error)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                self._end_program(error)
        else:
            if not self._answers:
                self._done(job)

    def _done(self, job: Any) -> None:
        self.reporter.done([job])

    def _failed(self, job: Any, event: Any, error: BaseException) -> None:
        report(self.reporter, job, error)

    def _call(self, event: Any) -> object:
        current.set(self._bus)
        handler, around = self._handler, self._around
        if not around:
            return handler(event)
        loop = None if self._loop is None else self._loop()
        if loop is None or loop.is_closed():
            loop = _middleware.own_loop()
        return _middleware.from_thread(loop, lambda inner: _middleware.run(around, event, inner), handler)

    def _finish(self, result: Awaitable[object]) -> object:
        """A plain function that returned an awaitable, such as a lambda around a coroutine: the loop runs it."""
        loop = None if self._loop is None else self._loop()

        async def finish() -> object:
            return await result

        if loop is None or loop.is_closed():
            return asyncio.run(finish())
        return asyncio.run_coroutine_threadsafe(finish(), loop).result()

    def _end_program(self, error: BaseException) -> None:
        """`sys.exit()` in a handler means the program, not a thread of ours."""
        loop = None if self._loop is None else self._loop()

        def end() -> None:
            raise error

        if loop is not None and loop.is_running():
            loop.call_soon_threadsafe(end)
        else:
            _thread.interrupt_main()


def call(handler: Handler, event: Event[Any], around: _middleware.Around) -> Coroutine[Any, Any, object]:
    """Run a handler of either kind once, inside its middleware, for a synchronous publish."""

    async def run(event: Event[Any]) -> object:
        if is_async(handler):
            return await handler(event)  # type: ignore[misc]
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(None, contextvars.copy_context().run, handler, event)
        return await result if inspect.isawaitable(result) else result

    return _middleware.run(around, event, run)


def call_here(handler: Handler, event: Event[Any], around: _middleware.Around) -> object:
    """The same, in the calling thread, which has no loop; returns an awaitable if the handler does."""
    if not around:
        return handler(event)
    return _middleware.from_thread(_middleware.own_loop(), lambda inner: _middleware.run(around, event, inner), handler)
