"""Loggers of every shape, and what a program sees that has none."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import structlog

from polybus import Bus, Event, InvalidConfig, RetryPolicy, with_retry
from polybus.testing import TestBus
from program import Program

SECRET = {"card": "4111"}


class Shaped:
    """As structlog's loggers: methods by level, and a question."""

    def __init__(self, level: int) -> None:
        self.records: list[tuple[str, str]] = []
        self._level = level

    def is_enabled_for(self, level: int) -> bool:
        return level >= self._level

    def __getattr__(self, name: str) -> Any:
        if name not in ("debug", "info", "warning", "error"):
            raise AttributeError(name)
        return lambda message: self.records.append((name, message))


async def bury_one(logger: Any) -> None:
    """An event that dies: the core says so, at `debug` and at `warning`."""
    bus = TestBus(logger=logger, retry=RetryPolicy(max_retries=0))

    @bus.on("a", name="h")
    async def handle(event: Event[Any]) -> None:
        raise LookupError("100% {no} %s")

    await bus.publish("a", SECRET)
    await bus.idle()
    await bus.close()


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
async def test_a_shaped_logger(level: int) -> None:
    logger = Shaped(level)
    await bury_one(logger)
    levels = {name for name, _ in logger.records}
    assert levels == ({"debug", "warning"} if level == logging.DEBUG else {"warning"})
    (warning,) = (text for name, text in logger.records if name == "warning")
    assert warning == "test/h (a): dead letter (exhausted): LookupError: 100% {no} %s"
    assert "4111" not in str(logger.records)


async def test_structlog() -> None:
    records: list[dict[str, Any]] = []

    def keep(_: Any, name: str, event: dict[str, Any]) -> Any:
        records.append({"level": name, **event})
        raise structlog.DropEvent

    wrapper = structlog.make_filtering_bound_logger(logging.WARNING)
    logger = structlog.wrap_logger(None, processors=[keep], wrapper_class=wrapper).bind(service="shop")
    await bury_one(logger)
    (record,) = records
    assert (record["level"], record["service"]) == ("warning", "shop")
    assert record["event"].endswith("LookupError: 100% {no} %s")


@pytest.mark.parametrize("adapter", [False, True])
async def test_the_standard_library(adapter: bool) -> None:
    logger, handler = logging.Logger("mine", logging.INFO), logging.Handler()
    records: list[str] = []
    handler.emit = lambda record: records.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger.addHandler(handler)
    await bury_one(logging.LoggerAdapter(logger, {}) if adapter else logger)
    assert records == ["WARNING test/h (a): dead letter (exhausted): LookupError: 100% {no} %s"]


async def test_a_logger_that_fails_stops_nothing() -> None:
    class Failing(Shaped):
        def __getattr__(self, name: str) -> Any:
            def fail(message: str) -> None:
                raise OSError("disk full")

            super().__getattr__(name)
            return fail

    bus = TestBus(logger=Failing(logging.DEBUG), retry=RetryPolicy(max_retries=1, initial_delay=1, jitter="none"))
    attempts: list[Any] = []

    @bus.on("a", name="h")
    async def handle(event: Event[Any]) -> None:
        attempts.append(event.payload)
        raise LookupError

    await bus.publish("a", 1)
    await bus.idle()
    await bus.advance(1)
    assert attempts == [1, 1]
    await bus.close()


async def test_what_fails_in_the_background_is_told() -> None:
    logger = Shaped(logging.INFO)
    async with Bus("memory://", service="shop", logger=logger) as bus:
        await bus.subscribe("a", print, name="taken")
        bus.on("a", name="taken")(repr)
        await bus.publish("b")
    (error,) = (text for name, text in logger.records if name == "error")
    assert error.startswith("taken is not subscribed to a\n")
    assert "DuplicateSubscription" in error


async def test_around_any_function() -> None:
    logger = Shaped(logging.INFO)

    async def fail() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await with_retry(fail, RetryPolicy(max_retries=1, initial_delay=0, jitter="none"), name="it", logger=logger)()
    assert logger.records == [
        ("info", "it: attempt 1 raised LookupError, again in 0.000 s"),
        ("warning", "it gave up after 2 attempts: LookupError"),
    ]


def test_what_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYBUS_SERVICE", "shop")
    logger = Shaped(logging.INFO)
    assert Bus.from_env(logger=logger).logger is logger
    assert Bus.from_config({"service": "shop"}, logger=logger).logger is logger
    assert Bus.from_env().logger is logging.getLogger("polybus")
    for wrong in (print, "polybus", object()):
        with pytest.raises(InvalidConfig, match="info, warning and error"):
            Bus("memory://", service="shop", logger=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fails", "expected"), [(False, ""), (True, "shop/h (a): dead letter (exhausted): ")])
def test_by_default_it_is_quiet_until_something_is_wrong(fails: bool, expected: str) -> None:
    program = Program(
        """
        bus = Bus("memory://", service="shop", retry=RetryPolicy(max_retries=0))
        async def main():
            done = asyncio.Event()
            @bus.on("a", name="h")
            async def handle(event):
                done.set()
                if len(sys.argv) > 2:
                    raise LookupError("why")
            async with bus:
                await bus.publish("a", {"card": "4111"})
                await done.wait()
        asyncio.run(main())
        """,
        "memory://",
        *(["fail"] if fails else []),
    )
    status, out, err = program.end()
    assert (status, out) == (0, "")
    assert err == (f"{expected}LookupError: why\n" if fails else "")
