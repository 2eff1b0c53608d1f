"""Where a test's events are."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polybus import Bus

LIST = Path(__file__).resolve().parents[1] / "transports.json"
# Those that survive a process; the list is shared with Rust and TypeScript.
TRANSPORTS = [name for name in json.loads(LIST.read_text()) if name in ("sqlite", "redis")]


@dataclass(frozen=True)
class Store:
    """A URL, and the name of a bus there. No other test uses both."""

    transport: str
    url: str
    name: str = field(default_factory=lambda: f"test-{uuid.uuid4().hex}")

    def bus(self, **options: Any) -> Bus:
        return Bus(self.url, **{"service": "shop", "bus": self.name, **options})
