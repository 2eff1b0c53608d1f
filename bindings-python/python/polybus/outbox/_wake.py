"""What wakes relays after a commit, and not too often."""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polybus._native import NativeOutbox


def wake(outbox: NativeOutbox, style: str) -> tuple[str, Any] | None:
    """The statement, or `None` if relays of this outbox were woken a moment ago."""
    return outbox.wake(style, monotonic_ns() // 1_000_000)
