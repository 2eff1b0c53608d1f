"""Loggers of either shape: the standard library's, and objects with `info`, `warning` and `error`, as structlog's."""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import Any, Protocol, TypeAlias

from polybus.errors import InvalidConfig


class LoggerLike(Protocol):
    """What structlog, loguru and others offer. `debug` is used if it is there."""

    def info(self, message: str, /) -> object:
        """Something that happened."""

    def warning(self, message: str, /) -> object:
        """Something to look at."""

    def error(self, message: str, /) -> object:
        """Something that failed."""


AnyLogger: TypeAlias = "logging.Logger | logging.LoggerAdapter[Any] | LoggerLike"

_METHODS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}
_STANDARD = (logging.Logger, logging.LoggerAdapter)


def default() -> logging.Logger:
    """Where records go unless told otherwise; Python prints its warnings to stderr if nobody configured logging."""
    return logging.getLogger("polybus")


def check(logger: object) -> AnyLogger:
    """The logger to use. `InvalidConfig` for what cannot log."""
    if logger is None:
        return default()
    if isinstance(logger, _STANDARD) or all(callable(_method(logger, name)) for name in ("info", "warning", "error")):
        return logger  # type: ignore[return-value]
    raise InvalidConfig(
        f"logger is a {type(logger).__qualname__}; give a logging.Logger, or an object with info, warning and error"
    )


def _method(logger: object, name: str) -> Any:
    try:
        return getattr(logger, name, None)
    except Exception:
        return None


def level_of(logger: AnyLogger) -> int:
    """The lowest level that it wants. One that cannot be asked wants `info`."""
    if isinstance(logger, _STANDARD):
        return logger.getEffectiveLevel()
    wants = _method(logger, "is_enabled_for") or _method(logger, "isEnabledFor")
    if not callable(wants):
        return logging.INFO
    with contextlib.suppress(Exception):
        return next((level for level in _METHODS if wants(level)), logging.CRITICAL)
    return logging.INFO


def write(logger: AnyLogger, level: int, message: str, error: BaseException | None = None) -> None:
    """One record, ready: nothing in the message is formatted. A logger that fails must not stop deliveries."""
    with contextlib.suppress(Exception):
        if isinstance(logger, _STANDARD):
            logger.log(level, "%s", message, exc_info=error)
            return
        if level < level_of(logger):  # another bus of this process wants more
            return
        if error is not None:
            message += "\n" + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        call = _method(logger, _METHODS.get(max(level, logging.DEBUG), "error"))
        if callable(call):
            call(message)
