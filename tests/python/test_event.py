"""Events as Python sees them: what they are made of, what is refused, and that nothing changes on the way."""

from __future__ import annotations

import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pickle
import sys
import uuid
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polybus import Aggregate, Event, InvalidEvent, PayloadTooLarge

texts = st.text(st.characters(exclude_categories=["Cs"]))
payloads = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=30,
)


@given(payloads)
def test_payload_survives(payload: object) -> None:
    event = Event.create("x", payload)
    assert event.payload == payload
    assert json.loads(event.raw) == payload
    again: Event[Any] = pickle.loads(pickle.dumps(event))
    assert again == event
    assert again.payload == payload
    assert Event.from_dict(event.to_dict()).raw == event.raw


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_exact_and_stay_floats(number: float) -> None:
    payload = Event.create("x", number).payload
    assert type(payload) is float
    assert math.copysign(1, payload) == math.copysign(1, number)
    assert payload == number


class Colour(str, enum.Enum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("payload", "raw"),
    [
        (None, b"null"),
        (True, b"true"),
        (2**70, b"1180591620717411303424"),
        (-(2**63), b"-9223372036854775808"),
        (1.0, b"1.0"),
        (Colour.RED, b'"red"'),
        (Number.ONE, b"1"),
        (Point(1, 2), b"[1,2]"),
        ((), b"[]"),
        (collections.OrderedDict(a=1), b'{"a":1}'),
        (collections.defaultdict(list), b"{}"),
        ('a"\\\n\0é☃\U0001f600', '"a\\"\\\\\\n\\u0000é☃\U0001f600"'.encode()),
        ({"__proto__": {"constructor": 1}}, b'{"__proto__":{"constructor":1}}'),
    ],
)
def test_what_is_json(payload: object, raw: bytes) -> None:
    assert Event.create("x", payload).raw == raw


class Opaque:
    pass


@dataclasses.dataclass
class Order:
    id: int


def cycle() -> list[Any]:
    loop: list[Any] = []
    loop.append({"again": loop})
    return loop


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("payload", "where", "hint"),
    [
        ({"items": [1, 2, {"a": 1}, {"at": datetime.datetime.now()}]}, "payload.items[3].at", "isoformat()"),
        ({"at": datetime.date.today()}, "payload.at", "isoformat()"),
        ([decimal.Decimal("1.10")], "payload[0]", "str(value)"),
        ({"raw": b"abc"}, "payload.raw", "base64"),
        ({"a b": {1, 2}}, 'payload["a b"]', "list(value)"),
        (Order(1), "payload", "dataclasses.asdict"),
        (uuid.uuid4(), "payload", "str(value)"),
        (Opaque(), "payload", "convert it to dict"),
        (datetime.timedelta(1), "payload", "total_seconds()"),
        ({"n": float("nan")}, "payload.n", "None"),
        ([float("-inf")], "payload[0]", "JSON cannot say"),
        ({1: 2}, "payload", "str(key)"),
        ({"a": {None: 2}}, "payload.a", "str(key)"),
        ("\ud800", "payload", "surrogate"),
        ({"\udfff": 1}, "payload", "surrogate"),
        (deep(65), "payload[0]", "64"),
        (deep(1000), "payload[0]", "64"),
        (cycle(), "payload[0].again[0]", "contains itself"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(payload: object, where: str, hint: str) -> None:
    for make in (Event.create, Event.create("parent").child):
        with pytest.raises(InvalidEvent) as refused:
            make("x", payload)
        assert str(refused.value).startswith(where)
        assert hint in str(refused.value)


def test_huge_ints() -> None:
    """Beyond what Python itself prints, not silently something else."""
    limit = sys.get_int_max_str_digits() if hasattr(sys, "get_int_max_str_digits") else 0
    if limit:
        with pytest.raises(InvalidEvent, match="too large an int"):
            Event.create("x", {"n": 10 ** (limit + 1)})
        event = Event.create("x", raw="1" * (limit + 1))
        with pytest.raises(InvalidEvent, match="raw"):
            _ = event.payload
        assert len(event.raw) == limit + 1


def test_numbers_keep_their_text() -> None:
    raw = b'{"a":1.10,"b":12345678901234567890123,"c":1E2}'
    event = Event.create("x", raw=raw)
    assert event.raw == raw
    assert event.payload == {"a": 1.1, "b": 12345678901234567890123, "c": 100.0}
    assert pickle.loads(pickle.dumps(event)).raw == raw


def test_raw() -> None:
    assert Event.create("x", raw='{"a":1}').payload == {"a": 1}
    assert Event.create("x", raw=bytearray(b"[1]")).payload == [1]  # type: ignore[arg-type]
    for wrong in (b"{", b"nan", b"\xff", b"[1,]", b"", b"[" * 65 + b"]" * 65):
        with pytest.raises(InvalidEvent):
            Event.create("x", raw=wrong)
    with pytest.raises(TypeError):
        Event.create("x", 1, raw=b"1")
    with pytest.raises(TypeError):
        Event.create("x", raw=5)  # type: ignore[arg-type]


def test_depth_limit_is_exact() -> None:
    assert Event.create("x", deep(64)).payload == deep(64)
    assert Event.from_dict(Event.create("x", deep(64)).to_dict()).payload == deep(64)


def test_payload_is_decoded_once_and_raw_stays() -> None:
    event = Event.create("x", {"a": [1]})
    assert event.payload is event.payload
    event.payload["a"].append(2)
    assert event.raw == b'{"a":[1]}'
    assert copy.deepcopy(event).payload == {"a": [1]}
    assert copy.copy(event) is event


def test_meta() -> None:
    when = datetime.datetime(2026, 11, 21, 8, 0, 0, 123000, tzinfo=datetime.timezone.utc)
    event = Event.create(
        "order.created",
        {"orderId": "o-1"},
        timestamp=when,
        source="shop",
        schema_version=2,
        correlation_id="c",
        causation_id="p",
        partition_key="o-1",
        idempotency_key="k",
        resource="order",
        resource_id="o-1",
        user_id="u",
        organization_id="acme",
        session_id="s",
        instance_id="i",
        aggregate={"type": "order", "id": "o-1"},
        traceparent="00-x",
        tracestate="a=b",
        headers={"ü": "☃"},
    )
    meta = event.meta
    assert meta.timestamp == "2026-11-21T08:00:00.123Z"
    assert (meta.source, meta.schema_version, meta.correlation_id, meta.causation_id) == ("shop", 2, "c", "p")
    assert (meta.partition_key, meta.idempotency_key) == ("o-1", "k")
    assert (meta.resource, meta.resource_id, meta.user_id, meta.organization_id) == ("order", "o-1", "u", "acme")
    assert (meta.session_id, meta.instance_id, meta.traceparent, meta.tracestate) == ("s", "i", "00-x", "a=b")
    assert meta.aggregate == Aggregate("order", "o-1")
    assert meta.headers == {"ü": "☃"}
    assert uuid.UUID(meta.id).version == 7
    wire = event.to_dict()
    assert list(wire) == ["type", "payload", "meta"]
    assert wire["meta"]["aggregate"] == {"type": "order", "id": "o-1"}
    assert wire["meta"]["schemaVersion"] == 2
    assert Event.from_dict(wire).meta == meta
    assert Event.create("x", user_id=None).meta.user_id is None
    assert Event.create("x", aggregate=("a", "1")).meta.aggregate == Aggregate("a", "1")


def test_absent_meta_is_none() -> None:
    meta = Event.create("x").meta
    assert meta.correlation_id == meta.id
    assert meta.causation_id is meta.source is meta.aggregate is meta.schema_version is None
    assert meta.headers == {}
    assert Event.create("x").delivery is None


def test_child_joins_the_chain() -> None:
    parent = Event.create(
        "a", user_id="u", organization_id="o", session_id="s", traceparent="t", tracestate="ts", partition_key="p",
        idempotency_key="k", resource="r", resource_id="1", aggregate=("a", "1"), headers={"h": "1"},
    )  # fmt: skip
    child = parent.child("b", {"n": 1}, partition_key="q")
    meta = child.meta
    assert meta.id != parent.meta.id
    assert meta.correlation_id == parent.meta.correlation_id
    assert meta.causation_id == parent.meta.id
    assert (meta.user_id, meta.organization_id, meta.session_id) == ("u", "o", "s")
    assert (meta.traceparent, meta.tracestate, meta.partition_key) == ("t", "ts", "q")
    assert meta.idempotency_key is meta.resource is meta.resource_id is meta.aggregate is None
    assert child.child("c").meta.correlation_id == parent.meta.id


@pytest.mark.parametrize(
    ("meta", "word"),
    [
        ({"partition_key": 5}, "partition_key"),
        ({"schema_version": "1"}, "schema_version"),
        ({"schema_version": -1}, "schema_version"),
        ({"headers": {"a": 1}}, "headers"),
        ({"headers": [("a", "b")]}, "headers"),
        ({"aggregate": "order"}, "aggregate"),
        ({"aggregate": {"type": "order"}}, "aggregate"),
        ({"id": ""}, "id"),
        ({"timestamp": 5}, "timestamp"),
        ({"user_id": "\ud800"}, "user_id"),
    ],
)
def test_wrong_meta_is_refused(meta: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidEvent, match=word):
        Event.create("x", **meta)


def test_unknown_meta_names_the_nearest_word() -> None:
    with pytest.raises(TypeError, match="did you mean partition_key"):
        Event.create("x", partitionKey="a")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="headers"):
        Event.create("x", colour="red")  # type: ignore[call-arg]


def test_from_dict_refuses_what_is_no_event() -> None:
    good = Event.create("x", 1).to_dict()
    for wrong in ({}, {**good, "type": "a b"}, {**good, "meta": {}}, {**good, "meta": 5}, {"type": "x"}, [], None):
        with pytest.raises(InvalidEvent):
            Event.from_dict(wrong)  # type: ignore[arg-type]
    unknown = {**good, "later": [1], "meta": {**good["meta"], "later": {"a": 1}}}
    assert Event.from_dict(unknown).to_dict() == unknown


def test_large_meta_is_refused() -> None:
    with pytest.raises(PayloadTooLarge):
        Event.create("x", headers={"a": "b" * 70_000}).to_dict()


def test_immutable_equal_and_quiet() -> None:
    event = Event.create("x", {"password": "secret"})
    with pytest.raises(AttributeError):
        event.type = "y"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Event()  # type: ignore[call-arg]
    assert "secret" not in repr(event)
    assert event.meta.id in repr(event)
    assert event == Event.from_dict(event.to_dict())
    assert event != Event.create("x", {"password": "secret"})
    assert event != "x"
    assert len({event, Event.from_dict(event.to_dict())}) == 1
    assert Event[dict].__origin__ is Event  # type: ignore[attr-defined,type-arg]
