"""The floor of publishing: `sqlite3`, one INSERT and COMMIT after another, WAL, synchronous=FULL, a 200-byte row."""

import json
import sqlite3

from common import ask, now, payload, rate, say

connection = sqlite3.connect(ask.path, isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA synchronous = FULL")
connection.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, payload TEXT NOT NULL)")

started = now()
for i in range(ask.events):
    connection.execute("BEGIN")
    connection.execute("INSERT INTO events (payload) VALUES (?)", (json.dumps(payload(i), separators=(",", ":")),))
    connection.execute("COMMIT")
say(rate=rate(ask.events, started))
connection.close()
