"""Retries around any function, in process, with the arithmetic of the core."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from polybus import _log
from polybus._native import RetryPolicy
from polybus.errors import Reject, Retry

if TYPE_CHECKING:
    from polybus._log import AnyLogger

__all__ = ["RetryPolicy", "with_retry"]

P = ParamSpec("P")
T = TypeVar("T")


def with_retry(
    handler: Callable[P, Awaitable[T]],
    policy: RetryPolicy | None = None,
    *,
    on_dead: Callable[..., object] | None = None,
    name: str | None = None,
    logger: AnyLogger | None = None,
) -> Callable[P, Awaitable[T]]:
    """Wrap an async function so that it is tried again when it raises, as `policy` says (default: `RetryPolicy()`).

    When the policy gives up, or the function raises `Reject`, `on_dead` is called with the error and the
    function's arguments, and awaited if it returns an awaitable; then the last error is raised. `Retry(after=…)`
    overrules the policy's delay and counts as an attempt. Cancellation is never retried.
    """
    if not callable(handler):
        raise TypeError(f"with_retry takes a function, not {type(handler).__qualname__}")
    if policy is None:
        policy = RetryPolicy()
    elif not isinstance(policy, RetryPolicy):
        raise TypeError(f"policy is a {type(policy).__qualname__}; give RetryPolicy(max_retries=…)")
    rules, log = policy, _log.check(logger)
    label = name or getattr(handler, "__qualname__", type(handler).__qualname__)

    tell = functools.partial(_log.write, log)

    @functools.wraps(handler, updated=())
    async def attempts(*args: P.args, **kwargs: P.kwargs) -> T:
        attempt = 0
        while True:
            attempt += 1
            try:
                return await handler(*args, **kwargs)
            except Exception as error:
                delay = None if isinstance(error, Reject) else rules.delay(attempt)
                if delay is None:
                    tell(logging.WARNING, f"{label} gave up after {attempt} attempts: {type(error).__qualname__}")
                    await bury(error, *args, **kwargs)
                    raise
                if isinstance(error, Retry) and error.after is not None:
                    delay = error.after
                kind = type(error).__qualname__
                tell(logging.INFO, f"{label}: attempt {attempt} raised {kind}, again in {delay:.3f} s")
            await asyncio.sleep(delay)

    async def bury(error: Exception, *args: object, **kwargs: object) -> None:
        if on_dead is None:
            return
        try:
            result = on_dead(error, *args, **kwargs)
            if inspect.isawaitable(result):
                await result
        except Exception as failure:  # the handler's own error is the one to raise
            tell(logging.ERROR, f"on_dead of {label} failed", failure)

    return attempts
