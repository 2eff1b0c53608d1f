"""What no handler could finish: `bus.dead_letters` and `bus.blocking.dead_letters`."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from polybus import _native, _runtime
from polybus._native import DeadLetter

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from polybus._options import DeadLetterFilter

__all__ = ["DeadLetter", "DeadLetters"]


def _which(
    call: str, which: str | DeadLetter | DeadLetterFilter | float | timedelta | None, given: dict[str, Any]
) -> dict[str, Any]:
    """The filter that a call is about: an id, a record, a filter, or keywords."""
    if isinstance(which, str):
        return {"id": which, **given}
    if isinstance(which, DeadLetter):
        return {"id": which.id, **given}
    if isinstance(which, dict):
        return {**which, **given}
    if isinstance(which, (int, float, timedelta)) and call == "purge":
        return {"older_than": which, **given}
    if which is not None:
        raise TypeError(f"{call} takes an id, a DeadLetter or a filter, not {type(which).__qualname__}")
    if not given:
        raise TypeError(f"{call}() needs to know which: an id, a filter such as group=…, or {{}} for all of them")
    return given


class DeadLetters:
    """The dead letters of one bus."""

    def __init__(self, native: _native.NativeBus) -> None:
        self._native = native

    async def list(
        self,
        group: str | None = None,
        pattern: str | None = None,
        since: datetime | float | None = None,
        limit: int = 100,
        after: str | None = None,
    ) -> list[DeadLetter]:
        """Oldest first, at most `limit`, those after the record `after`."""
        given = {"group": group, "pattern": pattern, "since": since, "limit": limit, "after": after}
        letters: list[DeadLetter] = await _runtime.run(self._native.dead_list(given))
        return letters

    async def get(self, id: str) -> DeadLetter:
        """One record. `NotFound` if it was replayed or purged."""
        letter: DeadLetter = await _runtime.run(self._native.dead_get(id))
        return letter

    async def replay(
        self, which: str | DeadLetter | DeadLetterFilter | None = None, /, **filter: Unpack[DeadLetterFilter]
    ) -> int:
        """Hand them to their groups again, the same event, attempts from 1, once. Returns how many.

        `NotFound` for an id that is not there.
        """
        count: int = await _runtime.run(self._native.dead_replay(_which("replay", which, dict(filter))))
        return count

    async def purge(
        self,
        which: str | DeadLetter | DeadLetterFilter | float | timedelta | None = None,
        /,
        **filter: Unpack[DeadLetterFilter],
    ) -> int:
        """Remove them: by id, by filter, or all that are older than so many seconds. Returns how many."""
        count: int = await _runtime.run(self._native.dead_purge(_which("purge", which, dict(filter))))
        return count

    async def count(self, **filter: Unpack[DeadLetterFilter]) -> int:
        """How many there are."""
        count: int = await _runtime.run(self._native.dead_count(dict(filter)))
        return count
