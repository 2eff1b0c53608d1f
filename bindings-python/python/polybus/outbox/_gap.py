"""How often relays are woken."""

from __future__ import annotations

import time

SECONDS = 0.01
"""A relay that was woken reads the table until it is empty: more than this is work for nothing."""


class Gap:
    """Lets one pass, and then none for `SECONDS`."""

    def __init__(self) -> None:
        self._last = -SECONDS

    def over(self) -> bool:
        """Whether this one passes."""
        now = time.monotonic()
        if now - self._last < SECONDS:
            return False
        self._last = now
        return True
