// Memory: `publishMany` of 1,000, an async handler that counts, 1,024 in flight; the end is the last one handled.
import { ask, batches, IN_FLIGHT, now, payload, polybus, range, rate, say, TYPE } from './common.mjs'

const { Bus, Event } = await polybus()

let handled = 0
let finish
const done = new Promise((resolve) => {
  finish = resolve
})
const make = ([start, end]) => range(start, end, (i) => Event.create(TYPE, payload(i)))

const bus = new Bus('memory://', { service: 'bench', bufferSize: 2 * IN_FLIGHT })
await bus.start()
await bus.subscribe(
  'order.*',
  async function count() {
    handled += 1
    if (handled === ask.events) finish()
  },
  { concurrency: IN_FLIGHT },
)

const work = [...batches(ask.events, 1000)]
const built = ask.prebuilt ? work.map(make) : undefined
const started = now()
for (const [i, batch] of work.entries()) await bus.publishMany(built ? built[i] : make(batch))
await done
say({ rate: rate(ask.events, started) })
await bus.close()
