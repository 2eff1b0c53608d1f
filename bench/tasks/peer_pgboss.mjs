// pg-boss: jobs are inserted by 100, in a transaction with a row of the application; the consumer fetches and completes
// batches of 1,000 without a pause, which is faster than work().
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import { ask, BATCH, batches, now, payload, range, say, waitForGo } from './common.mjs'

const QUEUE = 'orders'
const boss = new PgBoss({ connectionString: ask.db, supervise: false, schedule: false })
boss.on('error', (error) => console.error(error))
await boss.start()

const parts = {
  async produce() {
    await boss.createQueue(QUEUE)
    const client = new pg.Client({ connectionString: ask.db })
    await client.connect()
    const db = { executeSql: (text, values) => client.query(text, values) }
    waitForGo()
    say({ started: now() })
    for (const [start, end] of batches(ask.events, BATCH)) {
      await client.query('BEGIN')
      await client.query('INSERT INTO orders (what) VALUES ($1)', ['order'])
      await boss.insert(
        QUEUE,
        range(start, end, (i) => ({ data: payload(i) })),
        { db },
      )
      await client.query('COMMIT')
    }
    say({ ended: now() })
    await client.end()
  },

  async consume() {
    waitForGo()
    let handled = 0
    async function handler() {
      handled += 1
    }
    say({ started: now() })
    while (handled < ask.events) {
      const jobs = await boss.fetch(QUEUE, { batchSize: ask.batch })
      for (const job of jobs) await handler(job.data)
      if (jobs.length)
        await boss.complete(
          QUEUE,
          jobs.map((job) => job.id),
        )
    }
    say({ ended: now() })
  },
}

await parts[ask.part]()
await boss.stop({ graceful: false })
process.exit(0)
