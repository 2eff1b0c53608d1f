"""`polybus relay`, the command: its arguments, its pages, its end; and that it keeps secrets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

from database_server import PostgresServer
from outbox_drivers import Postgres, database
from polybus import Event
from polybus.outbox import Outbox
from redis_server import RedisServer
from relay_command import DEADLINE, Relay, relay

SECRET = "s3cr3t-p4ss"
NOWHERE = f"postgres://shop:{SECRET}@127.0.0.1:1/shop"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with PostgresServer() as running:
        yield running


@pytest.fixture
def db(server: PostgresServer, tmp_path: Path) -> Iterator[Postgres]:
    with database("postgres", server, tmp_path) as made:
        assert isinstance(made, Postgres)
        yield made


@pytest.fixture
def bus(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'bus.db'}"


def store(db: Postgres, *payloads: Any) -> None:
    with psycopg.connect(db.dsn("postgres")) as connection:
        Outbox().store([Event.create("order.placed", payload) for payload in payloads], connection)


def status(db: Postgres) -> list[str]:
    return [row[0] for row in db.query("SELECT status FROM polybus_outbox ORDER BY seq")]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ask(running: Relay, path: str, method: str = "GET") -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=DEADLINE)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


def health(running: Relay) -> tuple[int, dict[str, Any]]:
    code, headers, text = ask(running, "/health")
    assert headers["content-type"] == "application/json"
    return code, json.loads(text)


# ---- once ----------------------------------------------------------------------------------------------------------


def test_once_relays_what_is_there(db: Postgres, bus: str) -> None:
    store(db, *range(30))
    url = db.dsn("postgresql+psycopg")
    assert relay("--db", url, "--bus", bus, "--once", "--batch", "7", "--workers", "3") == (
        0,
        "30 events relayed, 0 dead letters\n",
        "",
    )
    assert set(status(db)) == {"delivered"}
    store(db, 1)
    variables = {"POLYBUS_RELAY_DB": url, "POLYBUS_URL": bus}
    assert relay("--once", env=variables) == (0, "1 events relayed, 0 dead letters\n", "")
    assert relay("--once", env=variables) == (0, "0 events relayed, 0 dead letters\n", "")


def test_once_says_what_stopped_it(db: Postgres, bus: str) -> None:
    for url, words in [
        (NOWHERE, "cannot be reached"),
        (db.dsn("postgres").replace(db.name, "nobody_here"), "check the last part of the URL"),
    ]:
        code, out, err = relay("--db", url, "--bus", bus, "--once")
        assert (code, out) == (1, "")
        assert words in err
        assert SECRET not in err
    code, _, err = relay("--db", db.dsn("postgres"), "--bus", bus, "--once", "--table", "app.other")
    assert (code, "polybus outbox ddl --dialect postgres" in err) == (1, True)
    store(db, 1)
    code, out, err = relay("--db", db.dsn("postgres"), "--bus", f"redis://:{SECRET}@127.0.0.1:1", "--once")
    assert (code, out) == (1, "")
    assert "0 events were relayed, then" in err
    assert SECRET not in err
    assert status(db) == ["pending"]


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--workers", "0"], 2, "1..=64"),
        (["--workers", "many"], 2, "--workers"),
        (["--batch", "0"], 2, "1..=10000"),
        (["--lease", "0"], 2, "seconds from 0.1 to 86400"),
        (["--http", "localhost:9187"], 2, "such as 127.0.0.1:9187"),
        (["--http", "127.0.0.1:0", "--once"], 2, "cannot be used with"),
        (["--worker", "2"], 2, "--workers"),
        (["--table", "a;b"], 1, "letters, digits"),
        (["--db", ""], 1, "POLYBUS_RELAY_DB"),
        (["--bus", ""], 1, "POLYBUS_URL"),
        (["--db", f"ftp://shop:{SECRET}@h/d"], 1, "postgres://user:password@host/database"),
        (["--db", f"shop:{SECRET}@h/d"], 1, "postgres://user:password@host/database"),
        (["--db", f"postgres://shop:{SECRET}@h:x/d"], 1, "not valid"),
        (["--db", f"postgres://shop:{SECRET}@h/d?sslmod=require"], 1, "did you mean sslmode"),
        (["--db", f"postgres://shop:{SECRET}@h/d?sslmode=verify"], 1, "verify-full"),
        (["--listen-url", f"ftp://shop:{SECRET}@h/d"], 1, "postgres://user:password@host/database"),
        (["--bus", f"rediss//:{SECRET}@h"], 1, "URL"),
        (["--bus", f"kafka://shop:{SECRET}@h"], 1, "kafka"),
        (["--bus", f"redis://shop:{SECRET}@h:port"], 1, "redis"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments(arguments: list[str], code: int, words: str) -> None:
    given = ["--db", NOWHERE, "--bus", "memory://"]
    for flag in ("--db", "--bus"):
        if flag in arguments:
            at = given.index(flag)
            del given[at : at + 2]
    said = relay(*given, *arguments, env={"POLYBUS_RELAY_DB": "", "POLYBUS_URL": ""})
    assert said[:2] == (code, "")
    assert words in said[2]
    assert SECRET not in said[2]


# ---- the pages -----------------------------------------------------------------------------------------------------


def test_the_pages_say_how_it_is(db: Postgres, bus: str) -> None:
    store(db, 1, 2)
    with Relay("--db", db.dsn("postgres"), "--bus", bus, "--workers", "3") as running:
        until(lambda: status(db) == ["delivered"] * 2 and health(running)[0] == 200)
        told = health(running)[1]
        assert (told["healthy"], told["why"], told["workers"], told["database"], told["bus"]) == (
            True,
            [],
            3,
            None,
            None,
        )
        assert told["lastLookSeconds"] >= 0
        # A batch is counted a moment after its rows are marked.
        until(lambda: 'polybus_relay_relayed_total{table="polybus_outbox"} 2\n' in ask(running, "/metrics")[2])
        code, headers, text = ask(running, "/metrics")
        assert (code, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert families["polybus_relay_relayed"].samples[0].value == 2
        assert families["polybus_relay_pending"].samples[0].labels == {"table": "polybus_outbox"}
        assert ask(running, "/healthz?verbose")[0] == 200
        code, headers, text = ask(running, "/health", "HEAD")
        assert (code, text, int(headers["content-length"]) > 0) == (200, "", True)
        for path in ("/", "/metrics/", "/healt", "//health"):
            code, _, text = ask(running, path)
            assert (code, text) == (404, "there are /health and /metrics\n")
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            code, headers, _ = ask(running, "/metrics", method)
            assert (code, headers["allow"]) == (405, "GET, HEAD")
        assert running.end(signal.SIGTERM)[0] == 0


def test_a_relay_that_cannot_work_says_why_on_its_page(db: Postgres, bus: str) -> None:
    with Relay("--db", NOWHERE, "--bus", bus) as running:
        until(lambda: health(running)[1]["database"] is not None)
        code, told = health(running)
        assert (code, told["healthy"], told["workers"]) == (503, False, 0)
        assert any(why.startswith("database: ") and "cannot be reached" in why for why in told["why"])
        assert ask(running, "/metrics")[0] == 200
        code, said = running.end(signal.SIGINT)
        assert (code, SECRET in said + str(told)) == (0, False)
        assert "WARN the relay waits for its database" in said
    store(db, 1)
    with Relay("--db", db.dsn("postgres"), "--bus", f"redis://:{SECRET}@127.0.0.1:1") as running:
        until(lambda: health(running)[1]["bus"] is not None)
        code, told = health(running)
        assert (code, told["workers"], told["database"]) == (503, 1, None)
        assert [why.partition(": ")[0] for why in told["why"]] == ["bus"]
        code, said = running.end(signal.SIGTERM)
        assert (code, SECRET in said + str(told)) == (0, False)
    assert status(db) == ["pending"]


def test_slow_and_strange_clients_hold_nobody_up(db: Postgres, bus: str) -> None:
    with Relay("--db", db.dsn("postgres"), "--bus", bus) as running:
        # More than are let in at a time, each with half a request: a real one is answered when their time is over.
        slow = [socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) for _ in range(70)]
        for each in slow:
            each.sendall(b"GET /health HTTP/1.1\r\nhos")
        assert ask(running, "/health")[0] in (200, 503)
        for each in slow[:10]:
            assert b" 200 " not in each.recv(1000)  # closed, or told that it was too late
        for each in slow:
            each.close()

        def send(request: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", running.port), timeout=DEADLINE) as client:
                client.sendall(request)
                return client.recv(1000)

        assert send(b"GET /health HTTP/1.1\r\nx: " + b"y" * 20_000 + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
        assert send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        # Who goes away in the middle of it harms nobody.
        socket.create_connection(("127.0.0.1", running.port)).close()
        assert ask(running, "/metrics")[0] == 200
        assert running.end(signal.SIGTERM)[0] == 0


def test_a_port_that_is_taken_is_told(db: Postgres, bus: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        code, out, err = relay("--db", db.dsn("postgres"), "--bus", bus, "--http", address)
        assert (code, out) == (1, "")
        assert f"--http {address} cannot be used" in err
        assert "another process has this port" in err
    code, _, err = relay("--db", db.dsn("postgres"), "--bus", bus, "--http", "192.0.2.1:9187")
    assert (code, "give an address of this machine" in err) == (1, True)


# ---- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_finish_what_is_under_way(db: Postgres, by: int) -> None:
    with RedisServer() as redis, Relay("--db", db.dsn("postgres"), "--bus", redis.url) as running:
        store(db, 0)
        until(lambda: status(db) == ["delivered"])
        redis.cli("CLIENT", "PAUSE", "60000", "WRITE")
        store(db, 1)
        until(lambda: status(db) == ["delivered", "pending", "claimed"])
        running.process.send_signal(by)
        redis.cli("CLIENT", "UNPAUSE")
        code, said = running.ended()
        assert code == 0, said
        assert status(db) == ["delivered"] * 2
        [log] = [key for key in redis.cli("KEYS", "*").split() if redis.cli("TYPE", key) == "stream"]
        assert redis.cli("XLEN", log) == "2"
