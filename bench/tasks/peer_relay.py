"""A relay as one writes it in an afternoon, on psycopg and redis-py: no order of keys, no retries, no dead letters.

`transaction` keeps its rows locked while it publishes, and writes each of them once. `lease` marks them as claimed and
commits first, so that no transaction is open while it publishes; this one works on the same table as polybus.
"""

import psycopg
import redis
from common import ask, now, say, wait_for_go

CLAIM = """SELECT id, type, event FROM by_hand WHERE sent_at IS NULL ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED"""
MARK = "UPDATE by_hand SET sent_at = now() WHERE id = ANY(%s)"
LEASE = """WITH c AS (SELECT seq FROM polybus_outbox WHERE status = 'pending' ORDER BY seq LIMIT %s
    FOR UPDATE SKIP LOCKED) UPDATE polybus_outbox o SET status = 'claimed', lease_until = now() + interval '30 s'
    FROM c WHERE o.seq = c.seq RETURNING o.seq, o.type, o.event"""
END = "UPDATE polybus_outbox SET status = 'delivered', delivered_at = now() WHERE seq = ANY(%s)"


def main() -> None:
    leased = ask.how == "lease"
    # Like ours, it does not wait for the disk: what a crash forgets is published again.
    db = psycopg.connect(ask.db, autocommit=True, options="-c synchronous_commit=off")
    store = redis.Redis.from_url(ask.url)
    store.ping()
    claim, mark = (LEASE, END) if leased else (CLAIM, MARK)
    wait_for_go()
    started, done = now(), 0
    say(started=started)
    while done < ask.rows:
        if not leased:
            db.execute("BEGIN")
        found = db.execute(claim, [ask.batch]).fetchall()
        if leased:
            found.sort()
        pipe = store.pipeline(transaction=False)
        for _, kind, event in found:
            pipe.xadd("events", {"t": kind, "e": event})
        pipe.execute()
        with db.pipeline():
            db.execute(mark, [[row[0] for row in found]])
            if not leased:
                db.execute("COMMIT")
        done += len(found)
    say(ended=now())


main()
