"""Publish in each language, consume in each: identical bytes, ids, headers, dead letters and replay (X43)."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from store import Store

pytestmark = pytest.mark.every_transport
ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ["rust", "python", "node"]
PAIRS = [(publisher, consumer) for publisher in LANGUAGES for consumer in LANGUAGES]
DEADLINE = 60

# Text that a parser and a serializer between the ends would change.
PAYLOAD = '{ "n":123456789012345678901234567890, "p":1.10, "e":1E400, "z":"\\u0000", "t":"é☃\\u00e9", "__proto__":{} }'
META = {
    "partitionKey": "o-1",
    "idempotencyKey": "order:o-1:placed",
    "userId": "ü-1",
    "schemaVersion": 3,
    "aggregate": {"type": "order", "id": "o-1"},
    "headers": {"k": "v ☃", "empty": ""},
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}


class Actor:
    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.wait("ready")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))

    def wait(self, key: str) -> dict[str, Any]:
        """The next line; it must be of that kind."""
        line = self._lines.get(timeout=DEADLINE)
        assert key in line, line
        return line

    def ask(self, key: str, do: str, **facts: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **facts}) + "\n")
        self._process.stdin.flush()
        return self.wait(key)[key]

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        code = self._process.wait(DEADLINE)
        self.kill()
        return code

    def kill(self) -> None:
        self._process.kill()  # nothing happens if it has ended
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="session")
def commands() -> dict[str, list[str]]:
    # Just as `make test-python` has built it, outside the deadline of a test: nothing is left to compile.
    build = ["cargo", "test", "--quiet", "--workspace", "--no-run", "--message-format=json"]
    messages = subprocess.run(build, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    built = [made for made in map(json.loads, messages) if made.get("executable") and not made["profile"]["test"]]
    return {
        "rust": [next(made["executable"] for made in built if made["target"]["name"] == "actor")],
        "python": [sys.executable, "tests/interop/actor.py"],
        "node": ["node", "--import", "tsx", "tests/interop/actor.ts"],
    }


class Stage:
    def __init__(self, commands: dict[str, list[str]], url: str, bus: str) -> None:
        self._commands, self._where = commands, [url, bus]
        self._actors: list[Actor] = []

    def actor(self, language: str) -> Actor:
        self._actors.append(Actor([*self._commands[language], *self._where]))
        return self._actors[-1]

    def end(self) -> None:
        for actor in self._actors:
            actor.kill()


@pytest.fixture
def stage(commands: dict[str, list[str]], store: Store) -> Iterator[Stage]:
    stage = Stage(commands, store.url, store.name)
    yield stage
    stage.end()


@pytest.mark.parametrize(("publisher", "consumer"), PAIRS)
def test_bytes_and_facts_are_the_same(stage: Stage, publisher: str, consumer: str) -> None:
    giver, taker = stage.actor(publisher), stage.actor(consumer)
    taker.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    event_id = giver.ask("published", "publish", type="order.placed", payload=PAYLOAD, meta=META)
    line = taker.wait("saw")
    assert line["payload"] == PAYLOAD
    assert line["attempt"] == 1
    meta = line["saw"]["meta"]
    assert line["saw"]["type"] == "order.placed"
    assert (meta["id"], meta["correlationId"], meta["source"]) == (event_id, event_id, publisher)
    assert {name: meta[name] for name in META} == META
    assert taker.end() == 0
    assert giver.end() == 0


@pytest.mark.parametrize(("publisher", "consumer"), PAIRS)
def test_dead_letters_and_replay(stage: Stage, publisher: str, consumer: str) -> None:
    """A letter that one language buried is listed and replayed by another, to a handler in either."""
    giver, taker = stage.actor(publisher), stage.actor(consumer)
    taker.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g", fail=True)
    event_id = giver.ask("published", "publish", type="order.placed", payload=PAYLOAD, meta=META)
    assert [taker.wait("saw")["attempt"] for _ in range(2)] == [1, 2]
    taker.ask("unsubscribed", "unsubscribe")  # also waits until the verdict is stored
    (letter,) = giver.ask("dead", "dead")
    assert (letter["event"]["meta"]["id"], letter["payload"]) == (event_id, PAYLOAD)
    assert (letter["reason"], letter["attempts"], letter["group"]) == ("exhausted", 2, "g")
    assert letter["error"] == "as the test wants ☃"
    giver.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    assert taker.ask("replayed", "replay") == 1
    line = giver.wait("saw")
    assert (line["saw"]["meta"]["id"], line["payload"], line["attempt"]) == (event_id, PAYLOAD, 1)
    assert taker.ask("replayed", "replay") == 0


@pytest.mark.parametrize(("replayer", "consumer"), [("python", "node"), ("node", "python")])
def test_a_replay_of_the_log_reaches_a_group_of_the_other_language(stage: Stage, replayer: str, consumer: str) -> None:
    """And only that group; what one language left off, the other takes up by its position."""
    operator, taker = stage.actor(replayer), stage.actor(consumer)
    taker.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    for number in range(3):
        operator.ask("published", "publish", type="order.placed", payload=str(number), meta={})
        assert taker.wait("saw")["payload"] == str(number)
    taker.ask("unsubscribed", "unsubscribe")  # also waits until the verdicts are stored
    operator.ask("subscribed", "subscribe", pattern="order.*", name="other", group="other")
    first = operator.ask("again", "again", pattern="order.*", group="g", limit=1)
    assert first["count"] == 1
    rest = taker.ask("again", "again", pattern="order.*", group="g", after=first["position"])
    assert rest["count"] == 2
    heir = stage.actor(consumer)
    heir.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    again = [heir.wait("saw") for _ in range(3)]
    assert sorted(line["payload"] for line in again) == ["0", "1", "2"]
    assert {line["attempt"] for line in again} == {1}
    # The other group's next event is a new one: it saw nothing of the replay.
    taker.ask("published", "publish", type="order.placed", payload="3", meta={})
    assert operator.wait("saw")["payload"] == "3"


@pytest.mark.parametrize("killed", LANGUAGES)
def test_what_a_killed_process_held_goes_to_another_language(stage: Stage, killed: str) -> None:
    """X1: killed in mid-handler; the next language has it within two leases, as the second attempt."""
    victim, giver = stage.actor(killed), stage.actor("rust")
    victim.ask("subscribed", "subscribe", pattern="n", name="s", group="g", hang=True)
    giver.ask("published", "publish", type="n", payload="1", meta={})
    assert victim.wait("saw")["attempt"] == 1
    victim.kill()
    heir = stage.actor(LANGUAGES[(LANGUAGES.index(killed) + 1) % 3])
    heir.ask("subscribed", "subscribe", pattern="n", name="s", group="g")
    assert heir.wait("saw")["attempt"] == 2


@pytest.mark.parametrize("stopped", LANGUAGES)
def test_a_stopped_process_cannot_settle_what_it_lost(stage: Stage, stopped: str) -> None:
    """X3: stopped for longer than its lease; another language finishes the event; the first may not touch it again."""
    victim, giver = stage.actor(stopped), stage.actor("rust")
    victim.ask("subscribed", "subscribe", pattern="n", name="s", group="g", hang=True)
    giver.ask("published", "publish", type="n", payload="1", meta={})
    victim.wait("saw")
    victim.signal(signal.SIGSTOP)
    heir = stage.actor(LANGUAGES[(LANGUAGES.index(stopped) + 1) % 3])
    heir.ask("subscribed", "subscribe", pattern="n", name="s", group="g")
    assert heir.wait("saw")["attempt"] == 2
    heir.ask("unsubscribed", "unsubscribe")  # its verdict is stored
    victim.signal(signal.SIGCONT)
    victim.ask("unsubscribed", "unsubscribe")  # hands back nothing: it holds nothing any more
    giver.ask("subscribed", "subscribe", pattern="n", name="s", group="g")
    assert victim.ask("published", "publish", type="n", payload="2", meta={})
    assert giver.wait("saw")["payload"] == "2"
    assert victim.ask("dead", "dead") == []


def test_an_event_that_kills_its_process_ends_as_poison(stage: Stage) -> None:
    """X7: nobody ever reports a failure, yet it does not go round for ever."""
    giver = stage.actor("rust")
    for attempt, language in enumerate(["python", "node", "rust"], start=1):
        victim = stage.actor(language)
        victim.ask("subscribed", "subscribe", pattern="n", name="s", group="g", hang=True)
        if attempt == 1:
            giver.ask("published", "publish", type="n", payload="1", meta={})
        assert victim.wait("saw")["attempt"] == attempt
        victim.kill()
    heir = stage.actor("python")
    heir.ask("subscribed", "subscribe", pattern="n", name="s", group="g")
    deadline = time.monotonic() + DEADLINE
    while not (letters := giver.ask("dead", "dead")):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a store tells only when asked
    assert [letter["reason"] for letter in letters] == ["poison"]


@pytest.mark.parametrize("languages", [["python", "node"], ["node", "python"]])
def test_an_event_that_kills_the_process_of_its_batch_ends_alone(stage: Stage, languages: list[str]) -> None:
    """X7 for batches: the first of five ends every process that gets it, the others are handled."""
    giver, handled = stage.actor("rust"), []
    for number in range(4):
        actor = stage.actor(languages[number % 2])
        actor.ask("subscribed", "subscribe", pattern="n", name="s", group="g", batch=5, hang=0)
        if number == 0:
            for payload in range(5):
                giver.ask("published", "publish", type="n", payload=str(payload), meta={})
            assert actor.wait("batch")["batch"] == [[str(payload), 1] for payload in range(5)]
        while 0 < number < 3 or (number == 3 and len(handled) < 4):
            batch = actor.wait("batch")["batch"]
            assert len(batch) == 1, batch
            assert batch[0][1] > 1
            if batch[0][0] == "0":
                assert batch[0][1] == number + 1
                break
            handled.append(batch[0][0])
        if number < 3:
            actor.kill()
    deadline = time.monotonic() + DEADLINE
    while not (letters := giver.ask("dead", "dead")):
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a store tells only when asked
    assert [(letter["reason"], letter["payload"]) for letter in letters] == [("poison", "0")]
    assert sorted(handled) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("killed", ["python", "node"])
def test_two_languages_keep_the_order_of_each_key(stage: Stage, tmp_path: Path, killed: str) -> None:
    """W9 across processes: one of the two is killed in the middle, and nothing overtakes what it held."""
    keys, numbers, record = [f"k{key}" for key in range(6)], range(20), tmp_path / "record"
    record.touch()
    giver, actors = stage.actor("rust"), {language: stage.actor(language) for language in ("python", "node")}
    for actor in actors.values():
        actor.ask("subscribed", "subscribe", pattern="n", name="s", group="g", ordered=True, record=str(record))
    for number in numbers:
        for key in keys:
            giver.ask("published", "publish", type="n", payload=str(number), meta={"partitionKey": key})
        if number == 10:
            actors[killed].kill()
    deadline = time.monotonic() + DEADLINE
    while record.read_text().count("\n") < 2 * len(keys) * len(numbers) or not all(
        f"end {key} {numbers[-1]}\n" in record.read_text() for key in keys
    ):
        assert time.monotonic() < deadline, record.read_text()
        time.sleep(0.05)  # a file tells only when read
    for key in keys:
        lines = [line.split() for line in record.read_text().splitlines()]
        steps = [(step, int(number)) for step, found, number in lines if found == key]
        ended = -1
        for (step, number), before in zip(steps, [("end", -1), *steps], strict=False):
            if step == "begin":  # the next one, or the same once more after the kill
                assert number == ended + 1 or before == ("end", number), (key, steps)
                assert before[0] == "end" or before == ("begin", number), (key, steps)
            else:
                assert before == ("begin", number), (key, steps)
                ended = number
        assert ended == numbers[-1]


@pytest.mark.parametrize(("requester", "responder"), PAIRS)
def test_one_language_asks_and_another_answers(stage: Stage, requester: str, responder: str) -> None:
    asks, answers = stage.actor(requester), stage.actor(responder)
    facts: dict[str, Any] = {"type": "quote.get", "payload": '{"q":"é☃","n":7}', "timeoutMs": DEADLINE * 1000}
    assert asks.ask("refused", "request", **facts) == {"code": "no_responder", "remote": None}
    answers.ask("responding", "respond", pattern="quote.*", name="quote")
    told = asks.ask("replied", "request", **facts)
    seen = answers.wait("saw")["saw"]
    assert seen["meta"]["id"] == told["request"]
    reply = told["event"]
    assert (reply["type"], reply["payload"]) == ("quote.get", {"by": responder, "got": {"q": "é☃", "n": 7}})
    meta = reply["meta"]
    assert (meta["causationId"], meta["correlationId"], meta["source"]) == (told["request"], told["request"], responder)
    answers.ask("responding", "respond", pattern="fail", name="fail", fail=True)
    told = asks.ask("refused", "request", **{**facts, "type": "fail"})
    assert told == {"code": "handler_error", "remote": "as the test wants ☃"}
    assert answers.end() == 0
    assert asks.end() == 0


@pytest.mark.parametrize("responder", LANGUAGES)
def test_a_killed_responder_is_missed_after_its_lease(stage: Stage, responder: str) -> None:
    asks, answers = stage.actor("python"), stage.actor(responder)
    answers.ask("responding", "respond", pattern="quote.*", name="quote", hang=True)
    facts: dict[str, Any] = {"type": "quote.get", "payload": "1", "timeoutMs": 200}
    assert asks.ask("refused", "request", **facts)["code"] == "request_timeout"
    answers.kill()
    deadline = time.monotonic() + DEADLINE
    while asks.ask("refused", "request", **facts)["code"] != "no_responder":
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_a_key_is_published_once(stage: Stage, first: str, second: str) -> None:
    """The receipt of the second publish names the event of the first."""
    one, two, listener = stage.actor(first), stage.actor(second), stage.actor("rust")
    listener.ask("subscribed", "subscribe", pattern="order.*", name="s", group="g")
    meta = {"idempotencyKey": "order:ü ☃:placed"}
    event_id = one.ask("published", "publish", type="order.placed", payload="1", meta=meta)
    assert two.ask("published", "publish", type="order.placed", payload="2", meta=meta) == event_id
    assert listener.wait("saw")["payload"] == "1"
    listener.ask("unsubscribed", "unsubscribe")  # no line about a second event comes before this one


@pytest.mark.parametrize(("first", "second"), [("python", "node"), ("node", "python")])
def test_what_one_language_handled_is_absorbed_in_the_other(stage: Stage, first: str, second: str) -> None:
    one, two = stage.actor(first), stage.actor(second)
    one.ask("subscribed", "subscribe", pattern="n", name="s", group="g", once=True)
    two.ask("published", "publish", type="n", payload='"é☃"', meta={})
    one.wait("saw")
    one.ask("unsubscribed", "unsubscribe")  # also waits until the verdict is stored
    two.ask("subscribed", "subscribe", pattern="n", name="s", group="g", once=True)
    one.ask("published", "publish", type="n", payload='"é☃"', meta={})
    one.ask("published", "publish", type="n", payload="2", meta={})
    assert two.wait("saw")["payload"] == "2"
    two.ask("unsubscribed", "unsubscribe")
