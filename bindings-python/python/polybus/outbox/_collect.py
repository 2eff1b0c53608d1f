"""Events that a SQLAlchemy session takes along: stored by its commit, forgotten by its rollback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from polybus._native import Event
from polybus.errors import InvalidConfig
from polybus.outbox._driver import describe

if TYPE_CHECKING:
    from polybus.outbox._store import Outbox

KEY = "polybus.outbox"
"""Where a session's events wait, in its `info`."""


class Pending:
    """The events of one session, each with the transaction or savepoint in which it was added."""

    def __init__(self, session: Any) -> None:
        from sqlalchemy import event

        self._waiting: list[tuple[Any, Outbox, Event[Any]]] = []
        # Both are also told of savepoints: an event goes into the table when the innermost one that it belongs to is
        # released, so the database knows what else takes it back.
        event.listen(session, "before_commit", self._store)
        event.listen(session, "after_transaction_end", self._forget)

    def add(self, transaction: Any, outbox: Outbox, events: Iterable[Event[Any]]) -> None:
        self._waiting += [(transaction, outbox, one) for one in events]

    def _store(self, session: Any) -> None:
        transaction = _innermost(session)
        batches: dict[int, tuple[Outbox, list[Event[Any]]]] = {}
        for owner, outbox, one in self._waiting:
            if owner is transaction:
                batches.setdefault(id(outbox), (outbox, []))[1].append(one)
        self._waiting = [entry for entry in self._waiting if entry[0] is not transaction]
        for outbox, events in batches.values():
            outbox.store(events, session)

    def _forget(self, _session: Any, transaction: Any) -> None:
        self._waiting = [entry for entry in self._waiting if entry[0] is not transaction]


def _innermost(session: Any) -> Any:
    return session.get_nested_transaction() or session.get_transaction()


def add(outbox: Outbox, events: list[Event[Any]], session: Any) -> None:
    """Let `session` store `events` when it commits."""
    if hasattr(session, "session_factory") and hasattr(session, "registry"):
        session = session.registry()  # of a scoped session: the one of this thread or task
    session = getattr(session, "sync_session", session)
    try:
        from sqlalchemy.orm import Session
    except ImportError:
        Session = ()  # type: ignore[assignment, misc]  # noqa: N806
    if not isinstance(session, Session):
        raise InvalidConfig(
            f"add() got {describe(session)}; give a SQLAlchemy Session or AsyncSession; store() takes more"
        )
    if not session.in_transaction():
        session.begin()
    pending = session.info.get(KEY)
    if pending is None:
        pending = session.info[KEY] = Pending(session)
    pending.add(_innermost(session), outbox, events)
