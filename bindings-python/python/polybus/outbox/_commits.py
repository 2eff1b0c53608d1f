"""Wakes relays after the commit of a SQLAlchemy session that stored events."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import event, text
from sqlalchemy.orm import Session

from polybus.outbox._gap import Gap

KEY = "polybus.outbox.wake"
"""Where a session keeps what to do after its commit, in its `info`."""


class Wake(NamedTuple):
    """What to run on which connection."""

    connection: Any
    gap: Gap
    statement: tuple[str, Any]


@cache
def _listen() -> None:
    # For all sessions, once: a listener of its own for each of them would cost more than to store the event.
    event.listen(Session, "after_commit", _committed)


def wake_after(session: Session, gap: Gap, statement: tuple[str, Any]) -> None:
    """Let the session run `statement` in a transaction of its own after its commit."""
    _listen()
    session.info[KEY] = Wake(session.connection(), gap, statement)


def _committed(session: Session) -> None:
    wake: Wake | None = session.info.get(KEY)
    if wake is None:
        return
    connection, gap, (sql, params) = wake
    if not connection.closed and connection.in_transaction():
        return  # a savepoint was released, or the connection and its transaction are somebody else's
    del session.info[KEY]
    if not connection.closed and gap.over():
        # On the connection that has just committed, before it goes back: a pool may have no other one. What was
        # committed is committed, whatever becomes of this.
        with suppress(Exception):
            connection.execute(text(sql), params)
            connection.commit()
