"""OpenTelemetry for a bus: spans for publish and for handling, in one trace across processes and languages.

Needs the package `opentelemetry-api`; nothing else of this package does.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from polybus._native import Event, version

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

    from polybus.bus import Bus

__all__ = ["instrument"]

B = TypeVar("B", bound="Bus")
_instrumented: weakref.WeakSet[Bus] = weakref.WeakSet()


def instrument(bus: B, tracer_provider: TracerProvider | None = None) -> B:
    """Add middleware that traces the bus, and return the bus. The first middleware is the outermost: call it first.

    Publishing makes a PRODUCER span and writes `traceparent` and `tracestate` into the event's meta; handling makes a
    CONSUMER span that continues that trace. Without a provider the global one is used. A second call does nothing.
    Errors: `ImportError` that says what to install.
    """
    try:
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ModuleNotFoundError as missing:
        raise ImportError(f"{missing}; polybus.opentelemetry needs it: pip install opentelemetry-api") from missing
    if bus in _instrumented:
        return bus
    _instrumented.add(bus)
    tracer = trace.get_tracer("polybus", version(), tracer_provider)
    w3c = TraceContextTextMapPropagator()

    def carried(event: Event[Any]) -> context.Context:
        """The current context, with the span that the event names."""
        meta = event.meta
        pairs = {"traceparent": meta.traceparent, "tracestate": meta.tracestate}
        carrier = {name: value for name, value in pairs.items() if value is not None}
        return w3c.extract(carrier, context.get_current())

    async def trace_publish(event: Event[Any], call_next: Callable[..., Awaitable[Any]]) -> Any:
        here, there = trace.get_current_span().get_span_context(), carried(event)
        named = trace.get_current_span(there).get_span_context()
        # An event that was made in another trace, perhaps long ago, stays there; in the same one, the span that is
        # active now is the nearer parent.
        parent = there if named.trace_id != here.trace_id else None
        facts = _facts("publish", "send", event)
        kind = trace.SpanKind.PRODUCER
        with tracer.start_as_current_span(f"publish {event.type}", parent, kind, facts) as span, _errors(span):
            carrier: dict[str, Any] = {}
            w3c.inject(carrier)
            return await call_next(event.with_meta(**carrier))

    async def trace_handle(event: Event[Any], call_next: Callable[..., Awaitable[Any]]) -> Any:
        facts = _facts("process", "process", event)
        if event.delivery is not None:
            facts["messaging.consumer.group.name"] = event.delivery.group
            facts["messaging.polybus.attempt"] = event.delivery.attempt
        kind = trace.SpanKind.CONSUMER
        with tracer.start_as_current_span(f"process {event.type}", carried(event), kind, facts) as span, _errors(span):
            return await call_next()

    bus.use(trace_publish, on="publish")
    bus.use(trace_handle)
    return bus


def _facts(name: str, kind: str, event: Event[Any]) -> dict[str, Any]:
    """The attributes of the semantic conventions for messaging."""
    facts: dict[str, Any] = {
        "messaging.system": "polybus",
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": event.type,
        "messaging.message.id": event.meta.id,
    }
    if event.meta.correlation_id is not None:
        facts["messaging.message.conversation_id"] = event.meta.correlation_id
    return facts


@contextmanager
def _errors(span: Span) -> Iterator[None]:
    """Names the error; its record and the span's status are the tracer's doing."""
    try:
        yield
    except Exception as error:
        span.set_attribute("error.type", type(error).__qualname__)
        raise
