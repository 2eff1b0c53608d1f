"""Wakes relays after the commit of a SQLAlchemy session that stored events."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import event, text
from sqlalchemy.orm import Session

from polybus._native import NativeOutbox
from polybus.outbox._wake import wake

KEY = "polybus.outbox.wake"
"""Where a session keeps what to do after its commit, in its `info`."""


class Wake(NamedTuple):
    """What to wake, over which connection."""

    connection: Any
    outbox: NativeOutbox
    style: str


@cache
def _listen() -> None:
    # For all sessions, once: a listener of its own for each of them would cost more than to store the event.
    event.listen(Session, "after_commit", _committed)


def wake_after(session: Session, outbox: NativeOutbox, style: str) -> None:
    """Let the session wake relays of `outbox` after its commit, in a transaction of its own."""
    _listen()
    session.info[KEY] = Wake(session.connection(), outbox, style)


def _committed(session: Session) -> None:
    wanted: Wake | None = session.info.get(KEY)
    if wanted is None:
        return
    connection, outbox, style = wanted
    if not connection.closed and connection.in_transaction():
        return  # a savepoint was released, or the connection and its transaction are somebody else's
    del session.info[KEY]
    if not connection.closed and (statement := wake(outbox, style)):
        sql, params = statement
        # On the connection that has just committed, before it goes back: a pool may have no other one. What was
        # committed is committed, whatever becomes of this.
        with suppress(Exception):
            connection.execute(text(sql), params)
            connection.commit()
