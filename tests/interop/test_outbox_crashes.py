"""A service is killed at every statement boundary, as `kill -9` does: a row if and only if its event, effects once.

The services, `outbox/service.py` and `.mjs`, pass named points. Each test lets one run through, and so learns which
there are; then the service is started once for each of them, dies there, and the next start goes on where it was.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from outbox_ground import Arrivals, Ground, Program, until
from polybus import Event
from polybus.outbox import Outbox, inbox

pytestmark = pytest.mark.timeout(300)  # many processes, one after the other
HERE = Path(__file__).parent / "outbox"
LANGUAGES = {"python": [sys.executable, str(HERE / "service.py")], "node": ["node", str(HERE / "service.mjs")]}
TABLES = [
    "CREATE TABLE facts (event_id TEXT PRIMARY KEY, of TEXT NOT NULL)",
    # No keys, on purpose: what took effect twice would show.
    "CREATE TABLE effects (by TEXT, event_id TEXT)",
    "CREATE TABLE suppressed (by TEXT, event_id TEXT)",
]


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(*TABLES) as ground:
        yield ground


@pytest.fixture
def arrivals(ground: Ground) -> Iterator[Arrivals]:
    with Arrivals(ground.bus) as arrivals:
        yield arrivals


class Service:
    """Starts the service in one role, and knows which points it passed."""

    def __init__(self, ground: Ground, language: str, role: str, folder: Path) -> None:
        self._command = [*LANGUAGES[language], role, ground.database, ground.bus]
        self._ground, self._folder, self._starts = ground, folder, 0
        self._passed = folder

    def start(self, *what: str, die_at: str = "", stop: bool = False) -> Program:
        self._starts += 1
        self._passed = self._folder / f"passed-{self._starts}"
        env = {"PASSED": str(self._passed), "DIE_AT": die_at, **({"STOP": "1"} if stop else {})}
        return self._ground.run(*self._command, *what, **env)

    def passed(self) -> list[str]:
        """The points that the last one passed so far."""
        return self._passed.read_text().splitlines()

    def died(self, program: Program, point: str) -> None:
        """Waits until it is dead, and fails unless it was at that point."""
        assert program.ended() == -signal.SIGKILL
        assert self.passed()[-1] == point


def place(ground: Ground, number: int, count: int = 1) -> list[str]:
    """Facts of that number, as a service writes them."""
    events = [
        Event.create("fact.placed", {"order": f"o-{number}", "number": number}, partition_key=f"o-{number}")
        for _ in range(count)
    ]
    with psycopg.connect(ground.database) as connection:
        assert all(Outbox(service="test").store(events, connection))
    return [event.meta.id for event in events]


@pytest.mark.parametrize("language", LANGUAGES)
def test_killed_while_it_writes(ground: Ground, arrivals: Arrivals, tmp_path: Path, language: str) -> None:
    """What was begun is not there, what was committed is, and comes once: nobody that died had published anything."""
    ground.relay(language)
    service = Service(ground, language, "write", tmp_path)
    assert service.start("whole").ended() == 0
    points = service.passed()
    committed = next(number for number, point in enumerate(points) if "after COMMIT" in point)
    assert len(points) > 25
    assert committed < len(points) - 1, "there is a point after the commit"
    before = "whole"
    for number, point in enumerate(points):
        # As a client does that got no answer, it asks for the last order again.
        service.died(service.start(before, point, die_at=point), point)
        rows = ground.number(f"SELECT count(*) FROM facts WHERE of = '{point}'")
        stored = ground.number(f"SELECT count(*) FROM polybus_outbox WHERE partition_key = '{point}'")
        assert (rows, stored) == ((3, 3) if number >= committed else (0, 0)), point
        before = point
    assert service.start(before).ended() == 0
    until(lambda: ground.unfinished() == 0, "everything is relayed")
    facts = ground.sql("SELECT of, event_id FROM facts")
    assert Counter(of for of, _ in facts) == dict.fromkeys(["whole", *points], 3)
    until(lambda: len(arrivals.ids("fact.placed")) >= len(facts), "everything arrives")
    assert sorted(event.meta.id for event in arrivals.events) == sorted(event_id for _, event_id in facts)
    for point in ["whole", *points]:
        assert [event.payload["number"] for event in arrivals.events if event.payload["order"] == point] == [0, 1, 2]


@pytest.mark.parametrize("language", LANGUAGES)
def test_killed_while_it_handles(ground: Ground, arrivals: Arrivals, tmp_path: Path, language: str) -> None:
    """Effect, mark and the next event commit together, so each is there once, however often an event is delivered."""
    ground.relay(language)
    service = Service(ground, language, "handle", tmp_path)
    whole = service.start("0")
    assert whole.line() == "ready"
    ids = place(ground, 0)
    assert whole.ended() == 0
    points = service.passed()
    assert len(points) > 10
    for number, point in enumerate(points, start=1):
        ids += place(ground, number)
        # It has what its predecessor died with, as soon as the lease of that is over.
        service.died(service.start(f"{number}", die_at=point), point)
    last = service.start("-1")

    # Those that were committed, and whose deliverer died before it could say so.
    again = [number for number, point in enumerate(points, 1) if "after COMMIT" in point or "not acknowledged" in point]
    done = "SELECT (SELECT count(*) FROM effects) >= {} AND (SELECT count(*) FROM suppressed) >= {}"
    until(lambda: ground.column(done.format(len(ids), len(again)))[0], "every effect is there")
    last.end()
    assert Counter(ground.column("SELECT event_id FROM effects")) == dict.fromkeys(ids, 1)
    suppressed = Counter(ground.column("SELECT event_id FROM suppressed"))
    assert suppressed == dict.fromkeys((ids[number] for number in again), 1)
    until(lambda: ground.unfinished() == 0, "everything is relayed")
    until(lambda: len(arrivals.ids("fact.booked")) >= len(ids), "the events of the handlers arrive")
    assert Counter(event.payload["of"] for event in arrivals.of("fact.booked")) == dict.fromkeys(ids, 1)


def expire(ground: Ground) -> None:
    """As when time passed: the leases of all relays are over."""
    ground.sql("UPDATE polybus_outbox SET lease_until = now() - interval '1 s' WHERE status <> 'delivered'")


def steps(points: list[str]) -> tuple[int, int, int]:
    """Where a relay has read what it claimed, and where it is about to mark and has marked, among its points."""
    _, _, mark = (number for number, point in enumerate(points) if "before WITH" in point)
    _, claimed, marked = (number for number, point in enumerate(points) if "after WITH" in point)
    assert claimed < mark < marked, points
    return claimed, mark, marked


@pytest.mark.parametrize("language", LANGUAGES)
def test_killed_while_it_relays(ground: Ground, arrivals: Arrivals, tmp_path: Path, language: str) -> None:
    """Whatever of claim, publish and mark it got done: nothing is lost, and only what was published comes twice."""
    service = Service(ground, language, "relay", tmp_path)
    ids = place(ground, 0, 3)
    whole = service.start()
    assert whole.line() == "ready"
    whole.tell("go")
    assert whole.line() == "3 3 0"
    points = service.passed()
    _, mark, _ = steps(points)
    whole.end()
    for number, point in enumerate(points, start=1):
        ids += place(ground, number, 3)
        relay = service.start(die_at=point)
        assert relay.line() == "ready"
        relay.tell("go")
        service.died(relay, point)
        expire(ground)
    last = service.start()
    assert last.line() == "ready"
    last.tell("go")
    last.line()
    last.end()
    assert ground.unfinished() == 0
    # What the one had published that died before its mark, its successor published again; nobody before it had.
    again = ids[3 : 3 * (mark + 2)]
    arrive(arrivals, ids, again)


@pytest.mark.parametrize("language", LANGUAGES)
def test_stopped_while_it_relays(ground: Ground, arrivals: Arrivals, tmp_path: Path, language: str) -> None:
    """It stands still for longer than its lease, another relay takes over, and it goes on where it was.

    What it then marks is fenced, the order of the key is kept, and the inbox suppresses what comes twice.
    """
    service = Service(ground, language, "relay", tmp_path)
    ids, again = place(ground, 0, 3), []
    whole = service.start()
    assert whole.line() == "ready"
    whole.tell("go")
    assert whole.line() == "3 3 0"
    points = service.passed()
    claimed, _, marked = steps(points)
    whole.end()
    rows = "SELECT seq, status, lease_token, delivered_at FROM polybus_outbox ORDER BY seq"
    for number, point in enumerate(points):
        new = place(ground, number + 1, 3)
        ids += new
        relay = service.start(die_at=point, stop=True)
        assert relay.line() == "ready"
        relay.tell("go")
        assert os.WIFSTOPPED(os.waitpid(relay.process.pid, os.WUNTRACED)[1])
        assert service.passed()[-1] == point
        expire(ground)
        other = ground.relay("node" if language == "python" else "python", "--once")
        assert other.line().startswith("0 events" if number >= marked else "3 events")
        before = ground.sql(rows)
        assert {row[1] for row in before} == {"delivered"}
        relay.process.send_signal(signal.SIGCONT)
        if number < claimed:
            assert relay.line() == "0 0 0"
        elif number < marked:
            assert relay.line() == "3 0 3", f"{point}: its mark was fenced"
            again += new
        else:
            assert relay.line() == "3 3 0"
        relay.end()
        assert ground.sql(rows) == before, point
    assert again, "there was a point between claim and mark"
    arrive(arrivals, ids, again)
    effects = []
    with psycopg.connect(ground.database) as connection:
        for event in arrivals.events:
            with connection.transaction(), inbox.once(connection, event, consumer="books") as first:
                if first:
                    effects.append(event.meta.id)
    assert Counter(effects) == dict.fromkeys(ids, 1)


def arrive(arrivals: Arrivals, ids: list[str], again: list[str]) -> None:
    """Waits until all arrived, those of `again` twice, and each key in its order; fails if anything else did."""
    until(lambda: len(arrivals.events) >= len(ids) + len(again), "everything arrives")
    assert Counter(event.meta.id for event in arrivals.events) == Counter(ids) + Counter(again)
    first = [event.meta.id for event in arrivals.first("fact.placed")]
    for number in range(0, len(ids), 3):
        key = ids[number : number + 3]
        assert [event_id for event_id in first if event_id in key] == key
