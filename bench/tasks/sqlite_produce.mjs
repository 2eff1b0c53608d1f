// SQLite, the producer: `publishMany` of 100 as fast as it goes.
import { ask, BATCH, batches, now, payload, polybus, range, say, TYPE, waitForGo } from './common.mjs'

const { Bus, Event } = await polybus()

const bus = new Bus(`sqlite:///${ask.path}`, { service: 'bench', durability: ask.durability })
await bus.start()
waitForGo()
const started = now()
for (const [start, end] of batches(ask.events, BATCH)) {
  await bus.publishMany(range(start, end, (i) => Event.create(TYPE, payload(i))))
}
say({ started, ended: now() })
await bus.close()
