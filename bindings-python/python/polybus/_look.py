"""The part of a bus that tells what is, what was, and does it again."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from polybus import _native, _runtime, history
from polybus._views import Guarantees, HistoryEntry, ReplayResult, SubscriptionStats

if TYPE_CHECKING:
    from polybus.history import Progress
    from polybus.subscription import Subscription


class Looks:
    """Reads what the store and this process know of a bus."""

    _native: _native.NativeBus
    _subscriptions: dict[str, Subscription]

    async def guarantees(self) -> Guarantees:
        """What holds on the live store: durability as measured, ordering, what the transport can do."""
        guarantees: Guarantees = await _runtime.run(self._native.guarantees())
        return guarantees

    async def stats(self) -> dict[str, SubscriptionStats]:
        """The numbers of each subscription of this process, by name."""
        stats: dict[str, SubscriptionStats] = await _runtime.run(self._native.stats())
        return stats

    def metrics(self) -> str:
        """What this process did and what its groups have to do, as Prometheus text (`text/plain; version=0.0.4`).

        Waits for nothing. What only the store knows (`polybus_group_…`) is counted in the background when somebody
        asks, and shown the next time. `polybus.prometheus.register` hands all of it to `prometheus_client`.
        """
        return self._native.metrics()

    @property
    def subscriptions(self) -> list[Subscription]:
        """Those that run in this process."""
        return [subscription for subscription in self._subscriptions.values() if subscription.active]

    async def history(
        self,
        pattern: str = "*",
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        limit: int = 100,
        after: str | None = None,
        records: bool = False,
    ) -> list[HistoryEntry]:
        """A page of the log in publish order: at most `limit` matching events, those after the position `after`.

        `since` (inclusive) and `until` (exclusive) are when an event entered the log: a datetime, or seconds since
        1970. With `records`, each entry tells what every group did with the event. The log goes back as far as the
        retention. Errors: `InvalidPattern`; `InvalidConfig` for a text that is no position, a limit of 0, or since
        after until; `BusClosed`, `ConnectionFailed`, and `Unsupported` where nothing is kept.
        """
        given = {"pattern": pattern, "since": since, "until": until, "limit": limit, "after": after, "records": records}
        entries: list[HistoryEntry] = await _runtime.run(self._native.history(given))
        return entries

    async def replay(
        self,
        pattern: str = "*",
        *,
        group: str,
        since: datetime | float | None = None,
        until: datetime | float | None = None,
        after: str | None = None,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> ReplayResult:
        """Hand matching events of the log to one group again: the same events, attempts from 1.

        No other group sees them. It goes over what the group had been given when the call began, and leaves alone what
        the group still has to do and what its own pattern does not match. In batches, each atomic; `progress` (a
        function, also async) is told after each, and what it raises ends the replay there. To go on after an
        interruption or a `limit`, give the last result's position as `after`. Errors: `NotFound` for an unknown group,
        and those of `history`.
        """
        given = {"pattern": pattern, "since": since, "until": until, "group": group, "after": after, "limit": limit}
        return await history.run(self, given, progress)

    async def delete_group(self, group: str) -> bool:
        """Forget a durable group, what it had not finished and its dead letters. Returns whether it existed."""
        existed: bool = await _runtime.run(self._native.delete_group(group))
        return existed
