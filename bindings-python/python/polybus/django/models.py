"""The tables, to be looked at, as in the admin. Rows are written by `polybus.django.store` and by the relay."""

from __future__ import annotations

from django.db import models

from polybus.django.fields import DatabaseTime


class OutboxRow(models.Model):
    """An event on its way to the bus, or one that was delivered and not purged yet."""

    seq = models.BigAutoField(primary_key=True)
    event_id = models.CharField(max_length=255, unique=True)
    type = models.CharField(max_length=255)
    event = models.TextField()
    partition_key = models.CharField(max_length=512, null=True)
    dedupe_key = models.CharField(max_length=512, null=True)
    status = models.CharField(max_length=16, default="pending")
    attempts = models.IntegerField(default=0)
    visible_at = DatabaseTime()
    lease_token = models.CharField(max_length=255, null=True)
    lease_until = DatabaseTime(null=True)
    last_error = models.TextField(null=True)
    created_at = DatabaseTime()
    delivered_at = DatabaseTime(null=True)

    class Meta:
        """Its table."""

        db_table = "polybus_outbox"
        verbose_name = "outbox row"

    def __str__(self) -> str:
        return f"{self.type} {self.event_id} ({self.status})"


class InboxMark(models.Model):
    """An event that a consumer has handled."""

    pk = models.CompositePrimaryKey("consumer", "event_id")
    consumer = models.CharField(max_length=255)
    event_id = models.CharField(max_length=255)
    processed_at = DatabaseTime()

    class Meta:
        """Its table."""

        db_table = "polybus_inbox"
        verbose_name = "inbox mark"

    def __str__(self) -> str:
        return f"{self.event_id} by {self.consumer}"
