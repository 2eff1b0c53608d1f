"""What Python and interop tests share: the transports, and a place in a store for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from redis_server import RedisServer
from store import TRANSPORTS, Store

collect_ignore = [] if "redis" in TRANSPORTS else ["python/test_redis.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that is marked `every_transport` once for each, and any other that asks for a store on SQLite."""
    if "store" in metafunc.fixturenames:
        everywhere = metafunc.definition.get_closest_marker("every_transport")
        metafunc.parametrize("store", TRANSPORTS if everywhere else ["sqlite"], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "sqlite":
        return Store("sqlite", f"sqlite:///{tmp_path}/bus.db")
    return Store("redis", request.getfixturevalue("redis_server").url)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server that tests share, each under a bus name of its own. Who stops or kills one starts its own."""
    with RedisServer(appendfsync="everysec") as server:
        yield server
