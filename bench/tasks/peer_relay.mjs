// A relay as one writes it in an afternoon, on node-postgres and ioredis: no order of keys, no retries, no dead letters.
// `transaction` keeps its rows locked while it publishes, and writes each of them once. `lease` marks them as claimed and
// commits first, so that no transaction is open while it publishes; this one works on the same table as polybus.
import { Redis } from 'ioredis'
import pg from 'pg'
import { ask, now, say, waitForGo } from './common.mjs'

const CLAIM = {
  name: 'claim',
  text: 'SELECT id, type, event FROM by_hand WHERE sent_at IS NULL ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED',
}
const MARK = { name: 'mark', text: 'UPDATE by_hand SET sent_at = now() WHERE id = ANY($1::bigint[])' }
const LEASE = {
  name: 'claim',
  text: `WITH c AS (SELECT seq FROM polybus_outbox WHERE status = 'pending' ORDER BY seq LIMIT $1
    FOR UPDATE SKIP LOCKED) UPDATE polybus_outbox o SET status = 'claimed', lease_until = now() + interval '30 s'
    FROM c WHERE o.seq = c.seq RETURNING o.seq AS id, o.type, o.event`,
}
const END = {
  name: 'mark',
  text: "UPDATE polybus_outbox SET status = 'delivered', delivered_at = now() WHERE seq = ANY($1::bigint[])",
}

// Like ours, it does not wait for the disk: what a crash forgets is published again.
const db = new pg.Client({ connectionString: ask.db, options: '-c synchronous_commit=off' })
await db.connect()
const store = new Redis(ask.url)
await store.ping()
const leased = ask.how === 'lease'
const [claim, mark] = leased ? [LEASE, END] : [CLAIM, MARK]
waitForGo()
const started = now()
say({ started })
for (let done = 0; done < ask.rows; ) {
  // node-postgres queues statements: these two go without waiting for each other.
  const begun = leased ? undefined : db.query('BEGIN')
  const [{ rows }] = await Promise.all([db.query({ ...claim, values: [ask.batch] }), begun])
  if (leased) rows.sort((a, b) => a.id - b.id)
  await store.pipeline(rows.map((row) => ['xadd', 'events', '*', 't', row.type, 'e', row.event])).exec()
  const marked = db.query({ ...mark, values: [rows.map((row) => row.id)] })
  await Promise.all([marked, leased ? undefined : db.query('COMMIT')])
  done += rows.length
}
say({ ended: now() })
await db.end()
store.disconnect()
