// The warehouse: packs and sends every order. Each step is a child event, so the chain leads back to the order.
// It is killed in the middle of its work and started again: what it held comes back to the next process.
import { openSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Bus, type Event } from 'polybus'

interface Order {
  orderId: string
  number: number
}

const [url, busName, folder] = process.argv.slice(2) as [string, string, string]
const file = openSync(join(folder, `warehouse-${process.pid}.jsonl`), 'a', 0o600)

function write(what: string, facts: Record<string, unknown> = {}): void {
  writeSync(file, `${JSON.stringify({ what, at: Date.now() / 1000, ...facts })}\n`)
}

const bus = new Bus(url, { service: 'warehouse', bus: busName, leaseMs: 2000 })

bus.on<Order>('order.*', { concurrency: 20 }, async function ship(event: Event<Order>) {
  const { orderId } = event.payload
  const { attempt, redelivered } = event.delivery ?? { attempt: 0, redelivered: false }
  write('packing', { id: event.meta.id, order: orderId, attempt, redelivered })
  await sleep(15) // people at work: a kill finds orders half done
  const packed = event.child('shipment.packed', { orderId, parcels: 1 }, { partitionKey: orderId })
  await bus.publish(packed)
  await sleep(5)
  await bus.publish(packed.child('shipment.sent', { orderId, carrier: 'post' }, { partitionKey: orderId }))
  write('shipped', { id: event.meta.id, order: orderId })
})

process.once('SIGTERM', () => void bus.close({ timeoutMs: 5000 }))
await bus.start()
write('ready')
