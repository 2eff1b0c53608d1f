"""The outbox and the inbox, inside the application's own transaction.

    outbox = Outbox()
    with transaction.atomic():
        order.save()
        outbox.store(Event.create("order.placed", {...}), session=connection)

The row of the order and the row of the event commit together, or neither does. A relay publishes what was committed.
No driver is imported here: whoever hands in a connection has imported its driver.
"""

from polybus.outbox._inbox import Inbox
from polybus.outbox._store import Outbox, Statement
from polybus.outbox.relay import DeadRow, Relay, RelayBatch, RelayHealth, RelayStats

__all__ = [
    "DeadRow",
    "Inbox",
    "Outbox",
    "Relay",
    "RelayBatch",
    "RelayHealth",
    "RelayStats",
    "Statement",
    "inbox",
]

inbox = Inbox()
"""The inbox in the table `polybus_inbox`."""
