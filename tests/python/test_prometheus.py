"""What a metrics endpoint shows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from polybus import Bus, Event, Reject, RetryPolicy
from polybus.prometheus import register
from store import Store


async def shows(registry: CollectorRegistry, name: str, labels: dict[str, str], expected: float) -> None:
    """Waits: the store's numbers are counted in the background."""

    async def ask() -> None:
        while registry.get_sample_value(name, labels) != expected:  # noqa: ASYNC110 - nobody tells when it is
            await asyncio.sleep(0.005)

    await asyncio.wait_for(ask(), 10)


@pytest.mark.every_transport
async def test_attempts_are_told_apart_by_how_they_ended(store: Store) -> None:
    registry = CollectorRegistry()
    async with store.bus() as bus:
        register(bus, registry)
        register(bus, registry)  # changes nothing

        async def handler(event: Event[Any]) -> None:
            assert event.delivery is not None
            if event.payload == "reject":
                raise Reject("no")
            if event.payload == "retry" and event.delivery.attempt == 1:
                raise RuntimeError

        await bus.subscribe(
            "order.*", handler, name="h", concurrency=1, retry=RetryPolicy(initial_delay=0.001, jitter="none")
        )
        for payload in ("fine", "reject", "retry"):
            await bus.publish("order.placed", payload)
        labels = {"service": "shop", "bus": store.name}
        origin = {**labels, "source": "shop", "type": "order.placed"}

        def processed(status: str) -> dict[str, str]:
            return {**origin, "group": "shop/h", "status": status}

        await shows(registry, "polybus_events_processed_total", processed("completed"), 2)
        for status in ("dead_lettered", "retried"):
            await shows(registry, "polybus_events_processed_total", processed(status), 1)
        assert registry.get_sample_value("polybus_events_published_total", origin) == 3
        group = {**labels, "subscription": "h", "group": "shop/h"}
        assert registry.get_sample_value("polybus_dead_letters_total", group) == 1
        seconds = {**origin, "group": "shop/h"}
        assert registry.get_sample_value("polybus_events_processing_duration_seconds_count", seconds) == 4
        bucket = {**seconds, "le": "+Inf"}
        assert registry.get_sample_value("polybus_events_processing_duration_seconds_bucket", bucket) == 4
        await shows(registry, "polybus_group_dead_letters", {**labels, "group": "shop/h"}, 1)


async def test_an_answered_request_is_completed() -> None:
    registry = CollectorRegistry()
    async with Bus("memory://", service="shop") as bus:
        register(bus, registry)
        await bus.respond("ask", lambda event: event.payload, name="answers")
        assert (await bus.request("ask", 1)).payload == 1
        origin = {"service": "shop", "bus": "default", "source": "shop", "type": "ask"}
        completed = {**origin, "group": "shop/answers", "status": "completed"}
        await shows(registry, "polybus_events_processed_total", completed, 1)


async def test_two_buses_share_a_registry() -> None:
    registry = CollectorRegistry()
    one, two = Bus("memory://", service="one"), Bus("memory://", service="two")
    register(one, registry)
    register(two, registry)
    text = generate_latest(registry).decode()
    assert text.count("# TYPE polybus_publish_failed_total counter\n") == 1
    for service in ("one", "two"):
        assert f'polybus_publish_failed_total{{bus="default",service="{service}"}} 0.0\n' in text
    del one
    assert 'service="one"' not in generate_latest(registry).decode()


def test_only_a_bus_can_be_registered() -> None:
    with pytest.raises(TypeError, match="Bus"):
        register("bus", CollectorRegistry())  # type: ignore[arg-type]
