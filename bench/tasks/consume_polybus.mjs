// The consumer: one subscription; ends when its group has nothing unfinished. Says the delays, if asked.
import { ask, IN_FLIGHT, now, percentiles, polybus, say, sleep } from './common.mjs'

const { Bus } = await polybus()

let handled = 0
let finish
const done = new Promise((resolve) => {
  finish = resolve
})
const delays = []

async function count() {
  handled += 1
  if (handled === ask.events) finish()
}

async function clock(event) {
  const entered = now()
  delays.push(entered - event.payload.sent)
  await count()
}

const options = { service: 'bench', durability: ask.durability, bufferSize: 2 * IN_FLIGHT }
const bus = new Bus(ask.url, options)
await bus.start()
const handler = ask.latency ? clock : count
const subscription = await bus.subscribe('order.*', handler, { name: 'bench', concurrency: IN_FLIGHT })
say({ ready: true })
await done
while ((await subscription.stats()).pending) await sleep(1)
say({ ended: now(), handled, ...(delays.length ? percentiles(delays) : {}) })
await bus.close()
