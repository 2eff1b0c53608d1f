// A hand-written loop on ioredis: a stream and a consumer group, batches of 100, each way one round trip per batch.
// No retries, no patterns, no dead letters, no trimming, no redelivery of what a dead consumer held.
import { randomUUID } from 'node:crypto'
import { Redis } from 'ioredis'
import {
  ask,
  BATCH,
  batches,
  now,
  pace,
  payload,
  percentiles,
  range,
  rate,
  say,
  spread,
  TYPE,
  waitForGo,
} from './common.mjs'

const STREAM = 'events'
const GROUP = 'bench'
const client = new Redis(ask.url, { enableAutoPipelining: ask.how === 'autopipelining' })

// An event as an application writes it by hand: what happened, an id and the time.
const event = (i, sent) => {
  const meta = { id: randomUUID(), timestamp: new Date().toISOString() }
  return JSON.stringify({ type: TYPE, payload: payload(i, sent), meta })
}
const add = (i, sent = 0) => client.xadd(STREAM, '*', 't', TYPE, 'e', event(i, sent))

async function sendBatches() {
  for (const [start, end] of batches(ask.events, BATCH)) {
    await client.pipeline(range(start, end, (i) => ['xadd', STREAM, '*', 't', TYPE, 'e', event(i)])).exec()
  }
}

const parts = {
  async produce() {
    await client.ping()
    waitForGo()
    const started = now()
    if (ask.per_second) {
      for await (const i of pace(ask.events, ask.per_second)) await add(i, now())
    } else {
      await sendBatches()
    }
    say({ started, ended: now() })
  },

  async consume() {
    let handled = 0
    const delays = []
    async function count() {
      handled += 1
    }
    async function clock(fields) {
      const entered = now()
      delays.push(entered - JSON.parse(fields[3]).payload.sent)
      await count()
    }
    const handler = ask.latency ? clock : count
    await client.xgroup('CREATE', STREAM, GROUP, '$', 'MKSTREAM')
    say({ ready: true })
    let done = []
    while (handled < ask.events) {
      // What was handled is acknowledged on the way to the next batch.
      const pipeline = client.pipeline()
      if (done.length) pipeline.xack(STREAM, GROUP, ...done)
      pipeline.xreadgroup('GROUP', GROUP, 'one', 'COUNT', BATCH, 'BLOCK', 1000, 'STREAMS', STREAM, '>')
      const [error, answer] = (await pipeline.exec()).at(-1)
      if (error) throw error
      const taken = answer?.[0][1] ?? []
      done = taken.map(([id]) => id)
      for (const [, fields] of taken) await handler(fields)
    }
    await client.xack(STREAM, GROUP, ...done)
    say({ ended: now(), handled, ...(delays.length ? percentiles(delays) : {}) })
  },

  async publish() {
    await add(0)
    const started = now()
    let count = ask.events
    if (ask.publishers) count = await spread(ask.events, ask.publishers, add)
    else await sendBatches()
    say({ rate: rate(count, started) })
  },
}

await parts[ask.part]()
client.disconnect()
