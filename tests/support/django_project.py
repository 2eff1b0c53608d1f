"""A Django project of one file, configured from the environment: `python django_project.py <manage.py arguments>`.

It has two databases, and a router that keeps the outbox in one of them.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import django
import pymysql
from django.conf import settings


class OutboxInShop:
    """All of the app's own tables and polybus's go to `shop`."""

    def db_for_write(self, model: Any, **_: Any) -> str | None:
        return "shop" if model._meta.app_label == "polybus" else None

    db_for_read = db_for_write

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool | None:
        return (db == "shop") if app_label == "polybus" else None


def configure() -> None:
    pymysql.version_info = (2, 2, 1, "final", 0)  # what Django asks of mysqlclient
    pymysql.install_as_MySQLdb()
    settings.configure(
        DATABASES=json.loads(os.environ["DATABASES"]),
        DATABASE_ROUTERS=["django_project.OutboxInShop"],
        INSTALLED_APPS=["django.contrib.contenttypes", "polybus.django"],
        USE_TZ=True,
        SECRET_KEY="for tests",
    )
    django.setup()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    configure()
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
