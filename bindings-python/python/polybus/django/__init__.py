"""Django: the tables of the outbox and the inbox as migrations, `store`, and `manage.py polybus_relay`.

Put `"polybus.django"` into `INSTALLED_APPS` and migrate. Then, inside `transaction.atomic()`, write
`store(Event.create(…))` beside `order.save()`: both commit, or neither does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, overload

from polybus.django import _poke
from polybus.outbox import Outbox

if TYPE_CHECKING:
    from polybus import Event

__all__ = ["outbox", "store"]

outbox = Outbox()
"""The outbox that the migrations make."""


@overload
def store(event: Event[Any], *, using: str | None = ..., dedupe_key: str | None = ...) -> bool: ...
@overload
def store(event: Iterable[Event[Any]], *, using: str | None = ...) -> list[bool]: ...
def store(
    event: Event[Any] | Iterable[Event[Any]], *, using: str | None = None, dedupe_key: str | None = None
) -> bool | list[bool]:
    """`Outbox.store` in the `atomic` block that is open on the database `using`, and a poke for the relay after it.

    Without `using` the database is the one that your `DATABASE_ROUTERS` name for writing the outbox, else `default`. In
    async code call it inside `sync_to_async`, together with the whole `atomic` block.
    """
    from django.db import router, transaction

    from polybus.django.models import OutboxRow

    using = using or router.db_for_write(OutboxRow)
    stored: bool | list[bool] = outbox.store(event, using, dedupe_key=dedupe_key)  # type: ignore[arg-type]
    # Django drops it when the block, or the savepoint around this call, is rolled back.
    transaction.on_commit(lambda: _poke.poke(using), using=using, robust=True)
    return stored
