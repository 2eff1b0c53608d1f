"""Times as the outbox keeps them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from django.db import models


class DatabaseTime(models.DateTimeField):
    """A `DateTimeField` that is a number of milliseconds since 1970 in SQLite, and UTC in MySQL."""

    def from_db_value(self, value: Any, _expression: Any, connection: Any) -> datetime | None:
        """An aware datetime, also where `USE_TZ` is off."""
        if isinstance(value, int):
            return datetime.fromtimestamp(value / 1000, timezone.utc)
        if value is not None and connection.vendor == "mysql" and value.tzinfo is None:
            return datetime.combine(value.date(), value.time(), timezone.utc)
        return value  # type: ignore[no-any-return]

    def get_internal_type(self) -> str:
        """A name that backends do not know: for `DateTimeField` SQLite's would read text."""
        return type(self).__name__

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """What the column holds."""
        if isinstance(value, datetime) and connection.vendor == "sqlite":
            return round(value.timestamp() * 1000)
        return super().get_db_prep_value(value, connection, prepared)

    def db_type(self, connection: Any) -> str:
        """The type of the column."""
        return "integer" if connection.vendor == "sqlite" else str(connection.data_types["DateTimeField"])
