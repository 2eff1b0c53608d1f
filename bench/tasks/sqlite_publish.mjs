// SQLite, publish only: each of `publishers` loops awaits one publish at a time. A group waits for the events.
import { ask, now, payload, polybus, range, rate, say, TYPE } from './common.mjs'

const { Bus } = await polybus()

const open = async () => {
  const bus = new Bus(`sqlite:///${ask.path}`, { service: 'bench', durability: ask.durability })
  await bus.start()
  return bus
}

const consumer = await open()
await consumer.subscribe('order.*', async function later() {}, { name: 'bench' })
await consumer.close() // its group stays

const bus = await open()
const each = Math.floor(ask.events / ask.publishers)

async function publisher(first) {
  for (let i = first; i < first + each; i++) await bus.publish(TYPE, payload(i))
}

await bus.publish(TYPE, payload(0))
const started = now()
await Promise.all(range(0, ask.publishers, (n) => publisher(n * each)))
say({ rate: rate(each * ask.publishers, started) })
await bus.close()
