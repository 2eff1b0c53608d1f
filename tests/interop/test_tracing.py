"""One trace through processes of two languages: the handler's span is a child of the publisher's."""

from __future__ import annotations

import pytest
from test_interop import META, Stage, commands, stage  # noqa: F401

pytestmark = pytest.mark.every_transport


@pytest.mark.parametrize(("publisher", "consumer"), [("python", "node"), ("node", "python")])
def test_the_handlers_span_continues_the_publishers_trace(stage: Stage, publisher: str, consumer: str) -> None:  # noqa: F811
    giver, taker = stage.actor(publisher), stage.actor(consumer)
    for actor in (giver, taker):
        actor.ask("tracing", "trace")
    taker.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    event_id = giver.ask("published", "publish", type="order.placed", payload='{"n":1.10}', meta={})
    line = taker.wait("saw")
    taker.ask("unsubscribed", "unsubscribe")  # also waits until the span has ended
    (sent,), (handled,) = giver.ask("spans", "spans"), taker.ask("spans", "spans")
    assert (sent["name"], handled["name"]) == ("publish order.placed", "process order.placed")
    assert handled["context"]["trace_id"] == sent["context"]["trace_id"]
    assert (sent["parent_id"], handled["parent_id"]) == (None, sent["context"]["span_id"])
    assert line["payload"] == '{"n":1.10}'
    trace, span = (sent["context"][name][2:] for name in ("trace_id", "span_id"))
    assert line["saw"]["meta"]["traceparent"][:52] == f"00-{trace}-{span}"
    assert handled["attributes"] == {
        "messaging.system": "polybus",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "order.placed",
        "messaging.message.id": event_id,
        "messaging.message.conversation_id": event_id,
        "messaging.consumer.group.name": "g",
        "messaging.polybus.attempt": 1,
    }


@pytest.mark.parametrize(("publisher", "consumer"), [("python", "node"), ("node", "python")])
def test_a_process_that_does_not_trace_passes_it_on(stage: Stage, publisher: str, consumer: str) -> None:  # noqa: F811
    giver, taker = stage.actor(publisher), stage.actor(consumer)
    taker.ask("tracing", "trace")
    taker.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    giver.ask("published", "publish", type="order.placed", payload="1", meta=META)
    assert taker.wait("saw")["saw"]["meta"]["traceparent"] == META["traceparent"]
    taker.ask("unsubscribed", "unsubscribe")
    (handled,) = taker.ask("spans", "spans")
    there = [handled["context"]["trace_id"][2:], handled["parent_id"][2:]]
    assert str(META["traceparent"]).split("-")[1:3] == there
