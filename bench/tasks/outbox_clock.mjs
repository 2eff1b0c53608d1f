// The consumer: says when its handler was entered, for each event.
import { ask, now, polybus, say } from './common.mjs'

const { Bus } = await polybus()

const entered = new Array(ask.events).fill(0)
let left = ask.events
let finish
const done = new Promise((resolve) => {
  finish = resolve
})

const bus = new Bus(ask.url, { service: 'bench', durability: ask.durability })
await bus.start()
await bus.subscribe(
  'order.*',
  async (event) => {
    entered[Number(event.payload.orderId.split('-')[1])] = now()
    left -= 1
    if (left === 0) finish()
  },
  { name: 'bench' },
)
say({ ready: true })
await done
say({ entered })
await bus.close()
