// The application: transactions with a row of its own and events; 100 events each, or one each and so many a second.
import pg from 'pg'
import {
  ask,
  BATCH,
  batches,
  now,
  pace,
  payload,
  polybus,
  polybusOutbox,
  range,
  say,
  TYPE,
  waitForGo,
} from './common.mjs'

const { Event } = await polybus()
const { Outbox } = await polybusOutbox()

const ORDER = 'INSERT INTO orders (what) VALUES ($1)'
const outbox = new Outbox({ service: 'bench' })
const db = new pg.Client({ connectionString: ask.db })
await db.connect()

async function transaction(events) {
  await db.query('BEGIN')
  await db.query(ORDER, ['order'])
  await outbox.store(events, db)
  await db.query('COMMIT')
}

waitForGo()
if (ask.per_second) {
  const committed = []
  for await (const i of pace(ask.events, ask.per_second)) {
    await transaction(Event.create(TYPE, payload(i)))
    committed.push(now())
  }
  say({ committed })
} else {
  say({ started: now() })
  for (const [start, end] of batches(ask.events, BATCH)) {
    await transaction(range(start, end, (i) => Event.create(TYPE, payload(i))))
  }
  say({ ended: now() })
}
await db.end()
