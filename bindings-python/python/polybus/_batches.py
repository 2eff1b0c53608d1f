"""Handlers that take a list of events: one call for each batch, one outcome for each event.

A batch comes from the core as its jobs, a tuple that names it here, and its events.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from polybus._handlers import HandBack, LoopHandler, ThreadHandler, current, describe, is_async
from polybus.errors import BatchFailed, Reject, Retry

if TYPE_CHECKING:
    from polybus import _native
    from polybus._native import Event

Jobs = tuple[int, ...]


def takes_batches(options: Mapping[str, Any]) -> bool:
    """Whether these are the options of a handler of batches; an empty dict stands for the defaults."""
    return options.get("batch", False) not in (None, False)


def single(handler: Any) -> Any:
    """The same for one event, for a synchronous publish."""
    if is_async(handler):

        async def one_later(event: Event[Any]) -> object:
            return await handler([event])

        return one_later
    return lambda event: handler([event])


def teller(reporter: _native.Reporter, error: object) -> Callable[[int], None]:
    """What tells the core that a job failed so. The error is read once, for however many jobs."""
    cause = error if isinstance(error, BaseException) else Exception(str(error))
    kind, message, stack = describe(cause)
    if isinstance(cause, Reject):
        return lambda job: reporter.rejected(job, kind, message, stack)
    after = cause.after if isinstance(cause, Retry) else None
    return lambda job: reporter.failed(job, kind, message, stack, after)


def report(reporter: _native.Reporter, jobs: Jobs, events: list[Event[Any]], error: BaseException) -> None:
    """Tell the core what became of each event of a batch whose handler raised."""
    if isinstance(error, (HandBack, KeyboardInterrupt, GeneratorExit)):
        reporter.abandoned(list(jobs))
        return
    if not isinstance(error, BatchFailed):
        tell = teller(reporter, error)
        for job in jobs:
            tell(job)
        return
    ids = [event.meta.id for event in events]
    unknown = sorted(error.errors.keys() - set(ids))
    done: list[int] = []
    rest = done.append
    if unknown:
        # Whoever names the wrong thing has not said which events are fine: none is taken for done.
        message = f"BatchFailed names {unknown[0]!r}, which is no event of the batch: name them by event.meta.id"
        rest = teller(reporter, ValueError(message))
    for job, event_id in zip(jobs, ids, strict=True):
        (teller(reporter, error.errors[event_id]) if event_id in error.errors else rest)(job)
    if done:
        reporter.done(done)


class BatchLoopHandler(LoopHandler):
    """An async handler of batches on its loop: a task for each batch."""

    def rewire(self, handler: Callable[..., Awaitable[object]], around: object) -> None:
        """From the next batch on, run this handler. Middleware is made for single events."""
        del around
        self._run = self._runner(handler)

    def _runner(self, handler: Callable[..., Awaitable[object]]) -> Callable[..., Coroutine[Any, Any, None]]:
        forget, bus = self._tasks.pop, self._bus

        async def run(jobs: Jobs, events: list[Event[Any]]) -> None:
            current.set(bus)
            try:
                await handler(events.copy())
            except BaseException as error:
                forget(jobs, None)
                self._batch_failed(jobs, events, error)
                if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
                    raise
            else:
                forget(jobs, None)
                self._cancelled.discard(jobs)
                self.reporter.done(list(jobs))

        return run

    def _batch_failed(self, jobs: Jobs, events: list[Event[Any]], error: BaseException) -> None:
        if jobs in self._cancelled:
            self._cancelled.discard(jobs)
            self.reporter.abandoned(list(jobs))  # the core has decided already
        else:
            report(self.reporter, jobs, events, error)

    def hand_back(self, batch: list[tuple[Any, Any]]) -> None:
        """These were not started."""
        self.reporter.abandoned([job for jobs, _ in batch for job in jobs])

    def cancel(self, job: int) -> None:
        """Stop the task of a batch: one of its jobs stands for all."""
        for jobs in self._tasks:
            if job in jobs and jobs not in self._cancelled:
                super().cancel(jobs)
                return


class BatchThreadHandler(ThreadHandler):
    """A plain function of batches, called on the pool's threads."""

    def rewire(self, handler: Any, around: object) -> None:
        """From the next batch on, call this function. Middleware is made for single events."""
        del around
        super().rewire(handler, ())

    def _call(self, event: Any) -> object:
        return super()._call(event.copy())

    def _done(self, job: Any) -> None:
        self.reporter.done(list(job))

    def _failed(self, job: Any, event: Any, error: BaseException) -> None:
        report(self.reporter, job, event, error)
