// Memory, the others: the same handler, called 1,024 at a time; each batch is awaited before the next one.
import assert from 'node:assert'
import { ask, batches, IN_FLIGHT, now, payload, range, rate, say, TYPE } from './common.mjs'

let handled = 0
async function count() {
  handled += 1
}

const peers = {
  async eventemitter3() {
    const { EventEmitter } = await import('eventemitter3')
    const emitter = new EventEmitter()
    emitter.on(TYPE, count)
    // It drops the handlers' promises; a turn of the loop lets them all end.
    return async (events) => {
      for (const event of events) emitter.emit(TYPE, event)
      await new Promise(setImmediate)
    }
  },
  async emittery() {
    const { default: Emittery } = await import('emittery')
    const emitter = new Emittery()
    emitter.on(TYPE, count)
    return (events) => Promise.all(events.map((event) => emitter.emit(TYPE, event)))
  },
}

const run = await peers[ask.peer]()
const work = [...batches(ask.events, IN_FLIGHT)]
const make = ([start, end]) => range(start, end, (i) => payload(i))
const built = ask.prebuilt ? work.map(make) : undefined
const started = now()
for (const [i, batch] of work.entries()) await run(built ? built[i] : make(batch))
const result = rate(ask.events, started)
assert.equal(handled, ask.events)
say({ rate: result })
