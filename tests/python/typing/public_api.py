"""Checked by mypy, never run: what users write must type-check, and what they must not write must not.

An error that must be reported stands as `# type: ignore[code]`; strict mode fails when it is not reported.
"""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypedDict

import structlog
from typing_extensions import assert_type

import polybus
from polybus import (
    Aggregate,
    BatchFailed,
    Bus,
    DeadLetter,
    Delivery,
    Event,
    Guarantees,
    HandlerError,
    HistoryEntry,
    PolybusError,
    Receipt,
    Reject,
    Remote,
    ReplayResult,
    RetryPolicy,
    Subscription,
    SubscriptionStats,
    with_retry,
)
from polybus.opentelemetry import instrument
from polybus.testing import MockHandler, TestBus

version: str = polybus.version()
wrong: int = polybus.version()  # type: ignore[assignment]


class Order(TypedDict):
    orderId: str


bus = Bus("sqlite:///events.db", service="shop", lease=timedelta(seconds=5), retry=RetryPolicy(max_retries=5))
Bus("memory://")  # type: ignore[call-arg]
Bus(service="shop", leese=3.0)  # type: ignore[call-arg]
Bus(service="shop", mode="snyc")  # type: ignore[arg-type]
Bus(service=5)  # type: ignore[arg-type]


@bus.on("order.*", retry=RetryPolicy(max_retries=5), timeout=5.0)
async def send_mail(event: Event[Order]) -> None:
    assert_type(event.payload, Order)
    assert_type(event.payload["orderId"], str)
    assert_type(event.type, str)
    assert_type(event.raw, bytes)
    assert_type(event.meta.correlation_id, str | None)
    assert_type(event.meta.id, str)
    assert_type(event.meta.aggregate, Aggregate | None)
    assert_type(event.delivery, Delivery | None)
    event.type = "other"  # type: ignore[misc]


@bus.on("order.*", start="beginning", broadcast=True)
def plain(event: Event) -> str:
    assert_type(event.payload, Any)
    return "fine"


@bus.on("order.*", name="book", ordered=True)
async def book(event: Event) -> None: ...


@bus.on("x", start="middle")  # type: ignore[arg-type]
async def misplaced(event: Event) -> None: ...


@bus.on("x", batch={"size": 10, "wait": timedelta(seconds=1)}, breaker=True)
async def many(events: list[Event[Order]]) -> None:
    raise BatchFailed({events[0].meta.id: Reject("no")})


@bus.on("x", breaker={"treshold": 5})  # type: ignore[arg-type]
async def misspelt(event: Event) -> None: ...


assert_type(plain(Event.create("x")), str)


async def main() -> None:
    async with bus as running:
        assert_type(running, Bus)
    assert_type(await bus.publish("order.created", {"orderId": "o-1"}, partition_key="o-1"), Receipt)
    assert_type(await bus.publish(Event.create("x", 1), delay=1.0), Receipt)
    await bus.publish(Event.create("x"), {"a": 1})  # type: ignore[call-overload]
    await bus.publish("x", partition=3)  # type: ignore[call-overload]
    assert_type(await bus.publish_many([Event.create("x")]), list[Receipt])
    assert_type((await bus.publish("x", 1, idempotency_key="k")).duplicate, bool)
    await bus.subscribe("x", send_mail, idempotent=lambda event: event.payload["id"], idempotent_retention=60)
    subscription = await bus.subscribe("*.*.delete", send_mail, name="audit", idempotent=True)
    await bus.subscribe("x", many, batch=True, breaker={"threshold": 5, "recovery": 30})
    assert_type(subscription, Subscription)
    assert_type(await subscription.stats(), SubscriptionStats)
    await subscription.unsubscribe()
    async for event in bus.events("x", prefetch=10):
        assert_type(event, Event[Any])
        assert_type(event.child("y", {"n": 1}, user_id="u"), Event[Any])
    assert_type(await bus.dead_letters.list(group="a", limit=5), list[DeadLetter])
    assert_type(await bus.dead_letters.replay("id"), int)
    assert_type(await bus.dead_letters.purge(older_than=timedelta(days=7)), int)
    await bus.dead_letters.purge(colour="red")  # type: ignore[call-arg]
    assert_type(await bus.history("x", limit=5, records=True), list[HistoryEntry])
    assert_type(await bus.replay("x", group="g", progress=print), ReplayResult)
    await bus.replay("x")  # type: ignore[call-arg]
    assert_type(await bus.guarantees(), Guarantees)
    assert_type(await bus.stats(), dict[str, SubscriptionStats])
    assert_type(bus.metrics(), str)


async def requests() -> None:
    assert_type(await bus.request("quote", {"n": 1}, timeout=2.0, user_id="u"), Event[Any])
    assert_type(await bus.request(Event.create("quote", 1), timeout=timedelta(seconds=1)), Event[Any])
    assert_type(await bus.respond("quote", answer, concurrency=2), Subscription)
    await bus.request("quote", 1, colour="red")  # type: ignore[call-overload]
    try:
        await bus.request("quote")
    except HandlerError as error:
        assert_type(error.remote, Remote | None)


@bus.respond("quote", name="answer")
async def answer(event: Event[Any]) -> dict[str, int]:
    return {"total": event.payload["n"]}


async def twice(number: int, *, word: str) -> bytes:
    return word.encode() * number


async def retried() -> None:
    assert_type(await with_retry(twice, RetryPolicy(1))(2, word="a"), bytes)
    await with_retry(twice)("2", word="a")  # type: ignore[arg-type]


async def middleware() -> None:
    @bus.use
    async def around(event: Event[Any], call_next: Callable[..., Awaitable[Any]]) -> Any:
        return await call_next(event.with_meta(user_id="u"))

    @bus.use(on="publish")
    async def stamp(event: Event[Any], call_next: Callable[..., Awaitable[Receipt]]) -> Receipt:
        return await call_next()

    assert_type(await stamp(Event.create("x"), bus.publish), Receipt)
    bus.use(around, on="subscribe")  # type: ignore[call-overload]
    assert_type(instrument(TestBus()), TestBus)
    assert_type(Bus.shared("memory://", service="a", on_duplicate="replace"), Bus)
    Bus("memory://", service="a", logger=structlog.get_logger())
    Bus("memory://", service="a", logger=print)  # type: ignore[arg-type]
    async with polybus.lifespan(bus, drain=1)(None):
        await polybus.serve(bus)


def blocking() -> None:
    with bus.blocking as b:
        assert_type(b.publish("x", 1), Receipt)
        for event in b.events("x"):
            assert_type(event, Event[Any])
        assert_type(b.dead_letters.count(), int)
        assert_type(b.history(), list[HistoryEntry])
        assert_type(b.replay(group="g"), ReplayResult)


async def testing() -> None:
    async with TestBus() as test:
        assert_type(test, TestBus)
        assert_type(test.mock_handler("x"), MockHandler)
        assert_type(await test.publish("x"), Receipt)
        assert_type(await test.wait_for("x", timeout=1.0), Event[Any])
        assert_type(test.published("x"), list[Event[Any]])
        await test.advance(1.0)


def errors(error: PolybusError) -> None:
    assert_type(error.code, str)
    assert_type(error.retryable, bool)
    assert_type(list(error.failures), list[tuple[int, PolybusError]])
