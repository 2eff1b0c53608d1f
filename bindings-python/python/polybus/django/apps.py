"""The app."""

from __future__ import annotations

from django.apps import AppConfig


class PolybusConfig(AppConfig):
    """Nothing is opened or started here: it is made for every `manage.py` command, and before gunicorn forks."""

    name = "polybus.django"
    label = "polybus"
    verbose_name = "polybus"
    default_auto_field = "django.db.models.BigAutoField"
