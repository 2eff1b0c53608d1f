"""Options, from keyword arguments, files and the environment."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from datetime import timedelta
from pathlib import Path

import pytest

from polybus import Bus, ConnectionFailed, InvalidConfig, PolybusError, RetryPolicy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lease": 0.5}, ["lease=0.5", "seconds"]),
        ({"lease": "long"}, ["lease", "seconds"]),
        ({"lease": float("nan")}, ["lease", "seconds"]),
        ({"lease": timedelta(milliseconds=10)}, ["lease=0.01"]),
        ({"lease": True}, ["lease", "seconds"]),
        ({"mode": "snyc"}, ["mode", "sync"]),
        ({"durability": "ful"}, ["durability", "full"]),
        ({"worker_count": 0}, ["worker_count=0"]),
        ({"worker_count": 1.5}, ["worker_count"]),
        ({"fail_open": "yes"}, ["fail_open", "true or false"]),
        ({"retry": 3}, ["retry", "RetryPolicy"]),
        ({"bus": "a b"}, ["bus"]),
        ({"service": ""}, ["service"]),
        ({"service": 5}, ["service"]),
        ({"service": object()}, ["service", "object"]),
        ({"logger": "polybus"}, ["logger"]),
        ({"max_age": -1}, ["max_age"]),
    ],
)
def test_bad_values(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as refused:
        Bus(**{"service": "shop", **options})  # type: ignore[arg-type]
    for word in words:
        assert word in str(refused.value)


def test_unknown_words() -> None:
    with pytest.raises(TypeError, match="did you mean worker_count"):
        Bus(service="shop", workerCount=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="it knows service"):
        Bus(service="shop", xyzzy=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean max_retries"):
        RetryPolicy(max_retrys=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidConfig, match="service"):
        Bus()  # type: ignore[call-arg]


@pytest.mark.parametrize("url", ["sqllite:///x.db", "redis", "", "sqlite://", "memory://a b", 5, None.__class__])
def test_bad_urls(url: str) -> None:
    with pytest.raises(InvalidConfig):
        Bus(url, service="shop")


def test_passwords_are_hidden() -> None:
    with pytest.raises(InvalidConfig) as refused:
        Bus("rabbits://user:secret@host/0", service="shop")
    assert "secret" not in str(refused.value)
    assert "***" in str(refused.value)


@pytest.mark.parametrize("path", ["no/such/folder/bus.db", "/proc/bus.db"])
async def test_nothing_is_opened_before_use(tmp_path: Path, path: str) -> None:
    bus = Bus(f"sqlite:///{tmp_path / path}", service="shop")
    with pytest.raises(PolybusError) as failed:
        await bus.publish("x")
    assert isinstance(failed.value, (ConnectionFailed, InvalidConfig))
    with pytest.raises(PolybusError):
        await bus.start()


async def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to look at" * 100)
    with pytest.raises(PolybusError):
        await Bus(f"sqlite:///{tmp_path}/text.db", service="shop").start()


async def turns_of_the_loop() -> None:
    """The core's records come with the next event that the loop looks at."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_fail_open_logs_and_returns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bus = Bus(f"sqlite:///{tmp_path}/no/bus.db", service="shop", fail_open=True)
    with caplog.at_level(logging.ERROR, "polybus"):
        receipt = await bus.publish("x", {"secret": "secret"})
        await turns_of_the_loop()
    assert receipt.position is None
    assert "fail_open" in caplog.text
    assert "secret" not in caplog.text


async def test_an_injected_logger_gets_the_cores_records(tmp_path: Path) -> None:
    records: list[logging.LogRecord] = []
    logger = logging.Logger("mine")
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    bus = Bus(f"sqlite:///{tmp_path}/no/bus.db", service="shop", fail_open=True, logger=logger)
    await bus.publish("x")
    await turns_of_the_loop()
    assert records
    assert records[0].levelno == logging.ERROR


CONFIG = """
url: memory://${NAME:-default}
service: ${SERVICE}
lease: 5s
fail_open: true
retry:
  max_retries: 7
"""


def test_from_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "polybus.yaml"
    file.write_text(CONFIG)
    with pytest.raises(InvalidConfig, match="SERVICE"):
        Bus.from_config(file)
    monkeypatch.setenv("SERVICE", "shop")
    bus = Bus.from_config(str(file))
    assert (bus.url, bus.service) == ("memory://default", "shop")
    assert Bus.from_config({"service": "a", "url": "memory://b", "retry": {"maxRetries": 3}}).url == "memory://b"
    for wrong in ({"service": "a", "leese": 3}, {"service": "a", "lease": "x"}, {}, {"service": {1, 2}}):
        with pytest.raises(InvalidConfig):
            Bus.from_config(wrong)
    with pytest.raises(InvalidConfig, match="did you mean lease"):
        Bus.from_config({"service": "a", "leese": 3})
    with pytest.raises(InvalidConfig, match="did you mean service"):
        Bus.from_config({"servce": "a"})
    file.write_text("service: [")
    for path in (file, tmp_path / "none.json"):
        with pytest.raises(InvalidConfig):
            Bus.from_config(path)


def test_from_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYBUS_URL", "memory://env")
    monkeypatch.setenv("POLYBUS_SERVICE", "shop")
    monkeypatch.setenv("POLYBUS_LEASE", "2.5")
    monkeypatch.setenv("POLYBUS_FAIL_OPEN", "true")
    bus = Bus.from_env()
    assert (bus.url, bus.service) == ("memory://env", "shop")
    monkeypatch.setenv("POLYBUS_LEASE", "0")
    with pytest.raises(InvalidConfig, match="lease"):
        Bus.from_env()
    monkeypatch.delenv("POLYBUS_LEASE")
    monkeypatch.setenv("POLYBUS_WORKER_COUNTS", "3")
    with pytest.raises(InvalidConfig, match="POLYBUS_WORKER_COUNT"):
        Bus.from_env()


def test_retry_policy() -> None:
    policy = RetryPolicy(max_retries=5, initial_delay=timedelta(seconds=2), max_delay=60, factor=3, jitter="none")
    assert (policy.max_retries, policy.initial_delay, policy.max_delay) == (5, 2.0, 60.0)
    assert (policy.factor, policy.jitter) == (3.0, "none")
    assert [policy.delay(attempt) for attempt in (1, 2, 3, 4, 5, 6)] == [2, 6, 18, 54, 60, None]
    assert 0 <= (RetryPolicy().delay(1) or 0) <= 1
    assert RetryPolicy() == RetryPolicy(3, 1.0, 30.0, 2.0, "full") != RetryPolicy(4)
    assert hash(RetryPolicy()) == hash(RetryPolicy())
    assert eval(repr(policy), {"RetryPolicy": RetryPolicy}) == policy
    assert pickle.loads(pickle.dumps(policy)) == copy.deepcopy(policy) == policy
    for wrong in ({"max_retries": -1}, {"factor": 0.5}, {"jitter": "some"}, {"initial_delay": -1}, {"factor": "x"}):
        with pytest.raises(InvalidConfig):
            RetryPolicy(**wrong)  # type: ignore[arg-type]
