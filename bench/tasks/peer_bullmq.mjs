// BullMQ: addBulk of 100 (`bulk`) or 100 adds at once, a worker with concurrency 50, finished jobs removed.
// The end is its last event.
import { Queue, Worker } from 'bullmq'
import { ask, BATCH, batches, now, payload, range, say, spread, TYPE, waitForGo } from './common.mjs'

const connection = { url: ask.url, maxRetriesPerRequest: null }
const opts = { removeOnComplete: true }

async function produce() {
  const queue = new Queue('events', { connection })
  await queue.waitUntilReady()
  waitForGo()
  const started = now()
  if (ask.how === 'bulk') {
    for (const [start, end] of batches(ask.events, BATCH)) {
      await queue.addBulk(range(start, end, (i) => ({ name: TYPE, data: payload(i), opts })))
    }
  } else {
    await spread(ask.events, 100, (i) => queue.add(TYPE, payload(i), opts))
  }
  say({ started, ended: now() })
  await queue.close()
}

async function consume() {
  let handled = 0
  let settled = 0
  const count = async () => {
    handled += 1
  }
  const worker = new Worker('events', count, { connection, concurrency: 50 })
  await worker.waitUntilReady()
  const done = new Promise((resolve) => {
    worker.on('completed', () => {
      settled += 1
      if (settled === ask.events) resolve()
    })
  })
  say({ ready: true })
  await done
  say({ ended: now(), handled })
  await worker.close(true)
}

await { produce, consume }[ask.part]()
