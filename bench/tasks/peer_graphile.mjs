// graphile-worker as its documentation makes it fast: a local queue, jobs fetched and completed in batches. Jobs are
// added with its SQL function, 100 in a transaction with a row of the application.
import { Logger, makeWorkerUtils, run } from 'graphile-worker'
import pg from 'pg'
import { ask, BATCH, batches, now, payload, range, say, sleep, waitForGo } from './common.mjs'

const ADD = `SELECT graphile_worker.add_jobs(
  ARRAY(SELECT json_populate_recordset(NULL::graphile_worker.job_spec, $1::json)))`
const db = new pg.Client({ connectionString: ask.db })

const parts = {
  async produce() {
    const utils = await makeWorkerUtils({ connectionString: ask.db })
    await utils.migrate()
    await utils.release()
    await db.connect()
    waitForGo()
    say({ started: now() })
    for (const [start, end] of batches(ask.events, BATCH)) {
      const jobs = range(start, end, (i) => ({ identifier: 'order', payload: payload(i) }))
      await db.query('BEGIN')
      await db.query('INSERT INTO orders (what) VALUES ($1)', ['order'])
      await db.query(ADD, [JSON.stringify(jobs)])
      await db.query('COMMIT')
    }
    say({ ended: now() })
    await db.end()
  },

  async consume() {
    await db.connect()
    waitForGo()
    let handled = 0
    let finish
    const done = new Promise((resolve) => {
      finish = resolve
    })
    say({ started: now() })
    const runner = await run({
      connectionString: ask.db,
      taskList: {
        async order() {
          handled += 1
          if (handled === ask.events) finish()
        },
      },
      logger: new Logger(() => () => {}),
      noHandleSignals: true,
      preset: {
        worker: {
          concurrentJobs: 10,
          localQueue: { size: 500 },
          completeJobBatchDelay: 0,
          failJobBatchDelay: 0,
          pollInterval: 50,
        },
      },
    })
    await done
    // Completed jobs are removed.
    const left = 'SELECT 1 FROM graphile_worker._private_jobs LIMIT 1'
    while ((await db.query(left)).rowCount) await sleep(1)
    say({ ended: now() })
    await runner.stop()
    await db.end()
  },
}

await parts[ask.part]()
process.exit(0)
