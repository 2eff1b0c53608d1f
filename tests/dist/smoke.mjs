// A user's first program, against the installed tarball.
import assert from 'node:assert/strict'
import { EventEmitter, once } from 'node:events'
import { Bus } from 'polybus'

const arrived = new EventEmitter()
const bus = new Bus(process.argv[2], { service: 'smoke' })
await bus.start()
await bus.subscribe('order.*', (event) => void arrived.emit('event', event), { name: 'smoke' })
const first = once(arrived, 'event', { signal: AbortSignal.timeout(10_000) })
const receipt = await bus.publish('order.created', { orderId: 'o-1' })
const [event] = await first
assert.equal(event.meta.id, receipt.id)
assert.deepEqual(event.payload, { orderId: 'o-1' })
await bus.close()
console.log('tarball: ok')
