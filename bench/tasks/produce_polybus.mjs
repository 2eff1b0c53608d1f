// The producer: `publishMany` of 100, or so many `publishers` at once, or one event at a time at a given rate.
import { ask, BATCH, batches, now, pace, payload, polybus, range, say, spread, TYPE, waitForGo } from './common.mjs'

const { Bus, Event } = await polybus()

const bus = new Bus(ask.url, { service: 'bench', durability: ask.durability })
await bus.start()
waitForGo()
const started = now()
if (ask.per_second) {
  for await (const i of pace(ask.events, ask.per_second)) await bus.publish(TYPE, payload(i, now()))
} else if (ask.publishers) {
  await spread(ask.events, ask.publishers, (i) => bus.publish(TYPE, payload(i)))
} else {
  for (const [start, end] of batches(ask.events, BATCH)) {
    await bus.publishMany(range(start, end, (i) => Event.create(TYPE, payload(i))))
  }
}
say({ started, ended: now() })
await bus.close()
