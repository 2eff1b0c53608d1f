"""Spans of publish and of handling, as an exporter in memory sees them."""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from polybus import Bus, Event, RetryPolicy
from polybus.opentelemetry import instrument
from polybus.testing import TestBus
from store import Store


class Spans:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


def ids(span: ReadableSpan) -> tuple[int, int]:
    assert span.context is not None
    return span.context.trace_id, span.context.span_id


def parent(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


@pytest.mark.every_transport
@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_chain_of_events_is_one_trace(store: Store, kind: str) -> None:
    spans, done = Spans(), asyncio.Event()
    loop = asyncio.get_running_loop()
    inside: list[Any] = []
    async with instrument(store.bus(), spans.provider) as bus:
        assert instrument(bus, spans.provider) is bus  # and not twice

        def handle(event: Event[Any]) -> None:
            inside.append(trace.get_current_span().get_span_context().span_id)
            bus.blocking.publish(event.child("b", 2))

        async def handle_async(event: Event[Any]) -> None:
            inside.append(trace.get_current_span().get_span_context().span_id)
            await bus.publish(event.child("b", 2))

        async def last(event: Event[Any]) -> None:
            inside.append(event.meta.traceparent)
            loop.call_soon(done.set)

        await bus.subscribe("a", handle if kind == "plain" else handle_async, name="h")
        await bus.subscribe("b", last, name="last")
        tracer = spans.provider.get_tracer("test")
        with tracer.start_as_current_span("request"):
            receipt = await bus.publish("a", 1)
        await asyncio.wait_for(done.wait(), 10)
    names = ["request", "publish a", "process a", "publish b", "process b"]
    chain = [spans.one(name) for name in names]
    for outer, inner in itertools.pairwise(chain):
        assert parent(inner) == ids(outer), (outer.name, inner.name)
    assert [span.kind for span in chain[1:]] == [SpanKind.PRODUCER, SpanKind.CONSUMER] * 2
    assert inside[0] == ids(chain[2])[1]
    assert inside[1][:52] == "00-{:032x}-{:016x}".format(*ids(chain[3]))
    assert chain[1].attributes == {
        "messaging.system": "polybus",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.destination.name": "a",
        "messaging.message.id": receipt.id,
        "messaging.message.conversation_id": receipt.id,
    }


async def test_errors_are_recorded_and_attempts_are_siblings() -> None:
    spans = Spans()
    bus = instrument(TestBus(retry=RetryPolicy(max_retries=1, initial_delay=1, jitter="none")), spans.provider)

    @bus.on("a", name="h")
    async def handle(event: Event[Any]) -> None:
        if event.delivery and event.delivery.attempt == 1:
            raise LookupError("nobody there")

    await bus.publish("a")
    await bus.idle()
    await bus.advance(1)
    first, second = spans.named("process a")
    assert (first.status.status_code, second.status.status_code) == (StatusCode.ERROR, StatusCode.UNSET)
    assert first.attributes is not None
    assert second.attributes is not None
    assert first.attributes["error.type"] == "LookupError"
    assert first.events[0].name == "exception"
    assert [span.attributes["messaging.polybus.attempt"] for span in (first, second)] == [1, 2]
    assert parent(first) == parent(second) == ids(spans.one("publish a"))
    await bus.close()
    with pytest.raises(Exception, match="closed"):
        await bus.publish("a")
    assert spans.named("publish a")[-1].status.status_code == StatusCode.ERROR


async def test_an_event_of_another_trace_stays_there() -> None:
    spans = Spans()
    bus = instrument(TestBus(), spans.provider)
    there = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with spans.provider.get_tracer("test").start_as_current_span("relay"):
        await bus.publish("a", traceparent=there, tracestate="vendor=x")
        await bus.publish("b", traceparent="nonsense")
    assert parent(spans.one("publish a")) == (0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331)
    assert parent(spans.one("publish b")) == ids(spans.one("relay"))
    a, b = bus.published()
    assert a.meta.traceparent == f"00-0af7651916cd43dd8448eb211c80319c-{ids(spans.one('publish a'))[1]:016x}-01"
    assert a.meta.tracestate == "vendor=x"
    assert b.meta.traceparent is not None
    await bus.close()


async def test_each_of_many_has_its_span() -> None:
    spans = Spans()
    bus = instrument(TestBus(), spans.provider)
    with spans.provider.get_tracer("test").start_as_current_span("request"):
        await bus.publish_many([Event.create("a", n) for n in range(3)])
    assert [parent(span) for span in spans.named("publish a")] == [ids(spans.one("request"))] * 3
    assert len({event.meta.traceparent for event in bus.published()}) == 3
    await bus.close()


async def test_without_an_sdk_the_trace_is_passed_on() -> None:
    bus = instrument(TestBus())
    there = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await bus.publish("a", traceparent=there)
    await bus.publish("a")
    assert [event.meta.traceparent for event in bus.published()] == [there, None]
    await bus.close()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match="pip install opentelemetry-api"):
        instrument(Bus("memory://", service="shop"))
