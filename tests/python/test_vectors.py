"""The golden vectors that three languages share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import polybus
from polybus import Event, InvalidEvent, InvalidPattern, PolybusError, RetryPolicy
from polybus.testing import TestBus

VECTORS = Path(__file__).parents[1] / "vectors"


def read(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def test_codec() -> None:
    vectors = read("codec.json")
    assert len(vectors["valid"]) > 5
    for case in vectors["valid"]:
        event = Event._from_wire(case["wire"].encode())
        assert event._to_wire().decode() == case.get("canonical", case["wire"]), case["name"]
        # Not the payload: 1e999 is JSON, and infinite to Python.
        shown = {**event.to_dict(), "payload": None}
        assert Event.from_dict(shown).to_dict() == shown, case["name"]
    for case in vectors["invalid"]:
        with pytest.raises(InvalidEvent):
            Event._from_wire(case["wire"].encode())


def test_event_types() -> None:
    vectors = read("event_types.json")
    for text in vectors["valid"]:
        assert Event.create(text).type == text
    for text in vectors["invalid"]:
        with pytest.raises(InvalidEvent):
            Event.create(text)


async def test_patterns() -> None:
    vectors = read("patterns.json")
    async with TestBus() as bus:
        types = sorted({case["event_type"] for case in vectors["matches"]})
        await bus.publish_many([Event.create(text) for text in types])
        for case in vectors["matches"]:
            found = {event.type for event in bus.published(case["pattern"])}
            assert (case["event_type"] in found) == case["matches"], case
        for case in vectors["invalid"]:
            with pytest.raises(InvalidPattern):
                bus.on(case["pattern"], name="x")
            with pytest.raises(InvalidPattern):
                bus.published(case["pattern"])


def test_retry() -> None:
    cases = read("retry.json")["cases"]
    assert len(cases) > 10
    for case in cases:
        given = {
            name.removesuffix("_ms"): value / 1000 if name.endswith("_ms") else value
            for name, value in case["policy"].items()
        }
        delay = RetryPolicy(**given).delay(case["attempt"], case["random"])
        wanted = case["delay_ms"]
        assert (delay is None) == (wanted is None), case
        if delay is not None:
            assert delay * 1000 == pytest.approx(wanted, rel=1e-9, abs=1e-5), case


def test_errors() -> None:
    table = read("errors.json")
    assert [(row["class"], row["code"], row["retryable"]) for row in table] == polybus._native.error_kinds()
    for row in table:
        error = getattr(polybus, row["class"])
        assert error is getattr(polybus.errors, row["class"])
        assert issubclass(error, PolybusError)
        assert (error.code, error.retryable) == (row["code"], row["retryable"])
    assert set(polybus.errors.BY_CODE) == {row["code"] for row in table}
