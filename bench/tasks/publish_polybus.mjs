// Publish only: so many `publishers` await one publish at a time; 0 are `publishMany` of 100. A group waits for it.
import { ask, BATCH, batches, now, payload, polybus, range, rate, say, spread, TYPE } from './common.mjs'

const { Bus, Event } = await polybus()

const open = async () => {
  const bus = new Bus(ask.url, { service: 'bench', durability: ask.durability })
  await bus.start()
  return bus
}

const consumer = await open()
await consumer.subscribe('order.*', async function later() {}, { name: 'bench' })
await consumer.close() // its group stays

const bus = await open()
await bus.publish(TYPE, payload(0))
const started = now()
let count = ask.events
if (ask.publishers) {
  count = await spread(ask.events, ask.publishers, (i) => bus.publish(TYPE, payload(i)))
} else {
  for (const [start, end] of batches(ask.events, BATCH)) {
    await bus.publishMany(range(start, end, (i) => Event.create(TYPE, payload(i))))
  }
}
say({ rate: rate(count, started) })
await bus.close()
