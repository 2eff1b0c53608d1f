"""The Python actor: obeys one JSON command a line, tells what happens. See README.md."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from polybus import Bus, Event, HandlerError, PolybusError, RetryPolicy


def tell(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


async def main(url: str, bus_name: str) -> None:
    bus = Bus(url, service="python", bus=bus_name, lease=1.0)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with bus:
        tell({"ready": True})
        subscriptions = []
        spans: Any = None
        while line := await reader.readline():
            command = json.loads(line)
            match command["do"]:
                case "publish":
                    meta = {snake(name): value for name, value in command["meta"].items()}
                    event = Event.create(command["type"], raw=command["payload"].encode(), **meta)
                    tell({"published": (await bus.publish(event)).id})
                case "subscribe":
                    handler = batch_handler_for(command) if "batch" in command else handler_for(command)
                    subscriptions.append(
                        await bus.subscribe(
                            command["pattern"],
                            handler,
                            name=command["name"],
                            group=command["group"],
                            ordered=command.get("ordered", False),
                            idempotent=key_of if command.get("once") else False,
                            batch={"size": command["batch"], "wait": 10} if "batch" in command else False,
                            retry=RetryPolicy(max_retries=1, initial_delay=0.005, jitter="none"),
                        )
                    )
                    tell({"subscribed": command["name"]})
                case "trace":
                    spans = traced(bus)
                    tell({"tracing": True})
                case "spans":
                    tell({"spans": [json.loads(span.to_json()) for span in spans.get_finished_spans()]})
                case "respond":
                    await bus.respond(command["pattern"], responder_for(command), name=command["name"])
                    tell({"responding": command["name"]})
                case "request":
                    tell(await asked(bus, command))
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


def record(path: str, line: str) -> None:
    with Path(path).open("a") as file:
        file.write(line + "\n")


def traced(bus: Bus) -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from polybus.opentelemetry import instrument

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrument(bus, provider)
    return exporter


def key_of(event: Event[Any]) -> str:
    return event.raw.decode()


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


def responder_for(command: dict[str, Any]) -> Any:
    async def respond(event: Event[Any]) -> dict[str, Any]:
        tell({"saw": event.to_dict()})
        if command.get("hang"):
            await asyncio.Event().wait()
        if command.get("fail"):
            raise ValueError("as the test wants ☃")
        return {"by": "python", "got": event.payload}

    return respond


async def asked(bus: Bus, command: dict[str, Any]) -> dict[str, Any]:
    request = Event.create(command["type"], raw=command["payload"].encode())
    try:
        reply = await bus.request(request, timeout=command["timeoutMs"] / 1000)
    except PolybusError as error:
        remote = error.remote.message if isinstance(error, HandlerError) and error.remote else None
        return {"refused": {"code": error.code, "remote": remote}}
    return {"replied": {"event": reply.to_dict(), "request": request.meta.id}}


def handler_for(command: dict[str, Any]) -> Any:
    async def handler(event: Event[Any]) -> None:
        assert event.delivery is not None
        if command.get("record"):
            record(command["record"], f"begin {event.meta.partition_key} {event.payload}")
            await asyncio.sleep(0.01)  # work
            record(command["record"], f"end {event.meta.partition_key} {event.payload}")
            return
        tell({"saw": event.to_dict(), "payload": event.raw.decode(), "attempt": event.delivery.attempt})
        if command.get("hang"):
            await asyncio.Event().wait()
        if command.get("fail"):
            raise ValueError("as the test wants ☃")

    return handler


def batch_handler_for(command: dict[str, Any]) -> Any:
    async def handler(events: list[Event[Any]]) -> None:
        tell({"batch": [[event.raw.decode(), event.delivery.attempt] for event in events if event.delivery]})
        if any(event.payload == command.get("hang") for event in events):
            await asyncio.Event().wait()

    return handler


asyncio.run(main(*sys.argv[1:]))
