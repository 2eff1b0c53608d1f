"""The Python actor: obeys one JSON command a line, tells what happens. See README.md."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from polybus import Bus, Event, RetryPolicy


def tell(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


async def main(url: str, bus_name: str) -> None:
    bus = Bus(url, service="python", bus=bus_name, lease=1.0)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with bus:
        tell({"ready": True})
        subscriptions = []
        while line := await reader.readline():
            command = json.loads(line)
            match command["do"]:
                case "publish":
                    meta = {snake(name): value for name, value in command["meta"].items()}
                    event = Event.create(command["type"], raw=command["payload"].encode(), **meta)
                    tell({"published": (await bus.publish(event)).id})
                case "subscribe":
                    handler = handler_for(command)
                    subscriptions.append(
                        await bus.subscribe(
                            command["pattern"],
                            handler,
                            name=command["name"],
                            group=command["group"],
                            retry=RetryPolicy(max_retries=1, initial_delay=0.005, jitter="none"),
                        )
                    )
                    tell({"subscribed": command["name"]})
                case "unsubscribe":
                    for subscription in subscriptions:
                        await subscription.unsubscribe()
                    tell({"unsubscribed": True})
                case "dead":
                    tell({"dead": [described(letter) for letter in await bus.dead_letters.list(limit=100)]})
                case "replay":
                    tell({"replayed": await bus.dead_letters.replay({})})
                case "again":
                    wanted = {name: command[name] for name in ("group", "limit", "after") if name in command}
                    result = await bus.replay(command["pattern"], **wanted)
                    tell({"again": {"count": result.count, "position": result.position}})


def snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name)


def described(letter: Any) -> dict[str, Any]:
    return {
        "event": letter.event.to_dict(),
        "payload": letter.event.raw.decode(),
        "reason": letter.reason,
        "attempts": letter.attempts,
        "group": letter.group,
        "error": letter.error.message,
    }


def handler_for(command: dict[str, Any]) -> Any:
    async def handler(event: Event[Any]) -> None:
        assert event.delivery is not None
        tell({"saw": event.to_dict(), "payload": event.raw.decode(), "attempt": event.delivery.attempt})
        if command.get("hang"):
            await asyncio.Event().wait()
        if command.get("fail"):
            raise ValueError("as the test wants ☃")

    return handler


asyncio.run(main(*sys.argv[1:]))
