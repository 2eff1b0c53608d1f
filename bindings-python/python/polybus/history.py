"""Reading the log, and handing parts of it to one group again: `Bus.history` and `Bus.replay`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from polybus import _native, _runtime
from polybus._views import HistoryEntry, Record, ReplayResult

if TYPE_CHECKING:
    from polybus._look import Looks

__all__ = ["HistoryEntry", "Progress", "Record", "ReplayResult"]

Progress = Callable[[ReplayResult], Awaitable[object] | object]
"""Told after each batch; may be async. What it raises ends the replay after that batch."""


def check(progress: object) -> None:
    """`TypeError` for a progress that cannot be called."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__qualname__}; give a function of one ReplayResult")


async def run(bus: Looks, given: dict[str, Any], progress: Progress | None) -> ReplayResult:
    """Take all batches, and tell `progress` of each between two of them."""
    check(progress)
    replay = bus._native.replay(given)
    last: ReplayResult | None = None
    while (result := await _runtime.run(replay.next())) is not None:
        last = result
        if progress is not None and inspect.isawaitable(answer := progress(result)):
            await answer
    assert last is not None  # there is always a first batch
    return last


def run_blocking(
    native: _native.NativeBus,
    given: dict[str, Any],
    progress: Callable[[ReplayResult], object] | None,
    wait: Callable[[_native.Operation], Any],
) -> ReplayResult:
    """As `run`, on a thread."""
    check(progress)
    replay = native.replay(given)
    last: ReplayResult | None = None
    while (result := wait(replay.next())) is not None:
        last = result
        if progress is not None:
            progress(result)
    assert last is not None
    return last
