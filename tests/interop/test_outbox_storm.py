"""Eight writers of two languages, two and eight relays, and everything that can go away does.

Here is what the tests of the core (`tests/rust/tests/outbox`) have one by one, or without writers through the adapters:
the writers lose their sessions, too, and both servers are away at the same time.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

from outbox_ground import Arrivals, Ground, until

HERE = Path(__file__).parent / "outbox"
TABLE = "CREATE TABLE facts (event_id TEXT PRIMARY KEY, of TEXT NOT NULL)"


def terminate(ground: Ground) -> None:
    """End every session but the one that does it: those of writers and of relays."""
    ground.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )


def grow(ground: Ground, count: int, of: str = "facts") -> None:
    """Wait until so many more rows of it are committed."""
    begin = ground.number(f"SELECT count(*) FROM {of}")
    until(lambda: ground.number(f"SELECT count(*) FROM {of}") >= begin + count, f"{count} more of {of}")


DELIVERED = "polybus_outbox WHERE status = 'delivered'"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [2, 8])
def test_a_row_if_and_only_if_its_event_arrives(count: int) -> None:
    with Ground(TABLE) as ground, Arrivals(ground.bus) as arrivals:
        languages = ["python", "node"] * (count // 2)
        # A claim that nobody marks is over soon: relays are killed, and so is what they say to the database.
        relays = [ground.relay(language, "--lease", "2", "--batch", "20") for language in languages]
        writers = [
            ground.run(sys.executable, str(HERE / "writers.py"), ground.database),
            ground.run("node", "--import", "tsx", str(HERE / "writers.ts"), ground.database),
        ]
        for language in ("python", "node"):
            grow(ground, 40, f"facts WHERE of LIKE '{language}-%'")
        grow(ground, 40, DELIVERED)

        ground.redis.kill()
        grow(ground, 50)
        terminate(ground)
        grow(ground, 50)
        ground.postgres.stop()
        ground.postgres.restart()
        grow(ground, 50)
        ground.redis.restart()
        grow(ground, 50, DELIVERED)

        for _ in range(4):
            terminate(ground)
            grow(ground, 20)
        relays[0].process.kill()
        ground.postgres.kill()
        ground.postgres.restart()
        grow(ground, 50)
        grow(ground, 50, DELIVERED)

        for writer in writers:
            writer.end()
        until(lambda: ground.unfinished() == 0, "everything is relayed")
        committed = dict(ground.sql("SELECT event_id, of FROM facts"))
        until(lambda: committed.keys() <= arrivals.ids("fact.placed"), "everything arrives")
        arrivals.close()
        assert arrivals.ids("fact.placed") == committed.keys()
        assert ground.number("SELECT max(attempts) FROM polybus_outbox") == 0, "that the bus was away is no attempt"
        keys: defaultdict[str, list[int]] = defaultdict(list)
        for event in arrivals.first("fact.placed"):
            assert event.meta.partition_key == committed[event.meta.id]
            keys[event.meta.partition_key].append(event.payload["number"])
        assert len(keys) == 8
        for key, numbers in keys.items():
            assert numbers == sorted(numbers), key
