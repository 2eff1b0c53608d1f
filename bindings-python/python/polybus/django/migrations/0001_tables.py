"""Both tables, by the statements that every language and tool uses."""

from __future__ import annotations

from typing import Any

from django.db import migrations, models

import polybus.django.fields
from polybus.outbox import Inbox, Outbox
from polybus.outbox._django import DIALECTS

TABLES = ("polybus_inbox", "polybus_outbox")


def make(_apps: Any, editor: Any) -> None:
    """Run the statements of `Outbox.ddl` and `Inbox.ddl`."""
    dialect: Any = DIALECTS.get(editor.connection.vendor)
    if dialect is None:
        raise NotImplementedError(
            f"polybus has no outbox for {editor.connection.vendor}: keep these tables away from this database with "
            "DATABASE_ROUTERS (allow_migrate for app_label 'polybus')"
        )
    for statement in [*Outbox().ddl(dialect), *Inbox().ddl(dialect)]:
        editor.execute(statement, params=None)


def drop(_apps: Any, editor: Any) -> None:
    """Undo it."""
    for table in TABLES:
        editor.execute(f"DROP TABLE IF EXISTS {editor.quote_name(table)}", params=None)


class Migration(migrations.Migration):
    """Django's state has the columns; what it has no words for stands in the statements."""

    initial = True
    dependencies: list[tuple[str, str]] = []  # noqa: RUF012

    operations = [  # noqa: RUF012
        migrations.SeparateDatabaseAndState(
            database_operations=[migrations.RunPython(make, drop)],
            state_operations=[
                migrations.CreateModel(
                    name="OutboxRow",
                    fields=[
                        ("seq", models.BigAutoField(primary_key=True, serialize=False)),
                        ("event_id", models.CharField(max_length=255, unique=True)),
                        ("type", models.CharField(max_length=255)),
                        ("event", models.TextField()),
                        ("partition_key", models.CharField(max_length=512, null=True)),
                        ("dedupe_key", models.CharField(max_length=512, null=True)),
                        ("status", models.CharField(default="pending", max_length=16)),
                        ("attempts", models.IntegerField(default=0)),
                        ("visible_at", polybus.django.fields.DatabaseTime()),
                        ("lease_token", models.CharField(max_length=255, null=True)),
                        ("lease_until", polybus.django.fields.DatabaseTime(null=True)),
                        ("last_error", models.TextField(null=True)),
                        ("created_at", polybus.django.fields.DatabaseTime()),
                        ("delivered_at", polybus.django.fields.DatabaseTime(null=True)),
                    ],
                    options={"verbose_name": "outbox row", "db_table": "polybus_outbox"},
                ),
                migrations.CreateModel(
                    name="InboxMark",
                    fields=[
                        (
                            "pk",
                            models.CompositePrimaryKey(
                                "consumer", "event_id", blank=True, editable=False, primary_key=True, serialize=False
                            ),
                        ),
                        ("consumer", models.CharField(max_length=255)),
                        ("event_id", models.CharField(max_length=255)),
                        ("processed_at", polybus.django.fields.DatabaseTime()),
                    ],
                    options={"verbose_name": "inbox mark", "db_table": "polybus_inbox"},
                ),
            ],
        )
    ]
