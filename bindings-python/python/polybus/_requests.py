"""Requests and replies: a part of `Bus`."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, overload

from polybus import _runtime
from polybus._native import Event

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from polybus import _native
    from polybus._options import MetaOptions, Seconds, SubscribeOptions
    from polybus.subscription import Subscription

H = TypeVar("H", bound=Callable[..., object])


class Requests:
    """`request` and `respond`."""

    _native: _native.NativeBus

    if TYPE_CHECKING:

        async def _ready(self) -> None: ...

    @overload
    async def request(self, event: Event[Any], /, *, timeout: Seconds = ...) -> Event[Any]: ...
    @overload
    async def request(
        self,
        type: str,
        payload: object = ...,
        *,
        timeout: Seconds = ...,
        raw: bytes | str | None = ...,
        **meta: Unpack[MetaOptions],
    ) -> Event[Any]: ...
    async def request(
        self,
        type: Any,
        payload: object = None,
        *,
        timeout: Seconds = 5.0,
        raw: bytes | str | None = None,
        **meta: Any,
    ) -> Event[Any]:
        """Publish an event, and return the reply of a responder: an event with its payload, in the same chain.

        `timeout` is in seconds. The request expires with it, so that no responder begins with it afterwards. Inside a
        handler, `bus.request(event.child(type, payload))` stays in the chain. Cancelling the call ends the wait.

        Errors: `NoResponder` at once, when nobody is there who answers; `RequestTimeout`; `HandlerError` when the
        responder failed, with its class, message and code in `.remote`; `BusClosed`, also when the bus is closed
        meanwhile; those of `publish`; `Unsupported` on Pub/Sub.
        """
        await self._ready()
        request = self._native.request(type, payload, raw, meta, {"timeout": timeout})
        reply: Event[Any] = await _runtime.run_or_forget(request)
        return reply

    @overload
    def respond(self, pattern: str, /, **options: Unpack[SubscribeOptions]) -> Callable[[H], H]: ...
    @overload
    def respond(
        self, pattern: str, handler: Callable[[Event[Any]], object], /, **options: Unpack[SubscribeOptions]
    ) -> Coroutine[Any, Any, Subscription]: ...
    def respond(
        self, pattern: str, handler: Callable[[Event[Any]], object] | None = None, /, **options: Any
    ) -> Callable[[H], H] | Coroutine[Any, Any, Subscription]:
        """Answer requests: what `handler` returns is the payload of the reply, what it raises ends the request.

        `@bus.respond("quote.get")` registers a handler as `on` does; `await bus.respond("quote.get", handler)`
        subscribes it as `subscribe` does, with the same options. Two defaults differ: no retries, because somebody
        waits (`retry=` allows them, and the requester hears of the last failure only), and `dead_letter=False`.

        One member of a group answers a request; of several groups the first reply counts. Errors: those of `subscribe`;
        `InvalidConfig` for `broadcast=True`; `Unsupported` on Pub/Sub.
        """
        bus: Any = self
        given = {**options, "respond": True}
        if handler is None:
            register: Callable[[H], H] = bus.on(pattern, **given)
            return register
        subscribing: Coroutine[Any, Any, Subscription] = bus.subscribe(pattern, handler, **given)
        return subscribing
