// Groups that keep the order of each partition key, as a TypeScript program sees them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { Bus, type Event, InvalidConfig } from 'polybus'
import { startRedis } from './support/redis.ts'

async function keepsOrder(url: string): Promise<void> {
  const options = { service: 'shop', bus: randomUUID(), retry: { initialDelayMs: 1 } }
  await using one = new Bus(url, options)
  await using two = new Bus(url, options)
  const seen = new Map<string, number[]>()
  const running = new Set<string>()
  const arrived = new EventEmitter()
  let count = 0
  async function handler(event: Event<number>): Promise<void> {
    const key = event.meta.partitionKey ?? ''
    assert.ok(!running.has(key))
    running.add(key)
    await new Promise(setImmediate)
    running.delete(key)
    if (event.payload % 3 === 0 && event.delivery?.attempt === 1) throw new Error('once')
    seen.set(key, [...(seen.get(key) ?? []), event.payload])
    count += 1
    arrived.emit('event')
  }
  for (const bus of [one, two]) await bus.subscribe('x', handler, { name: 's', ordered: true })
  assert.ok((await one.guarantees()).capabilities.ordered)
  for (let number = 0; number < 10; number += 1) {
    for (const key of ['a', 'b', 'c']) await one.publish('x', number, { partitionKey: key })
  }
  const deadline = { signal: AbortSignal.timeout(20_000) }
  while (count < 30) await once(arrived, 'event', deadline)
  const numbers = Array.from({ length: 10 }, (_, number) => number)
  assert.deepEqual(Object.fromEntries(seen), { a: numbers, b: numbers, c: numbers })
  await assert.rejects(two.subscribe('x', handler, { name: 't', group: 'shop/s' }), InvalidConfig)
  await assert.rejects(two.subscribe('x', handler, { name: 't', ordered: true, broadcast: true }), InvalidConfig)
}

test('an ordered group keeps the order of each key in a SQLite file', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'polybus-'))
  try {
    await keepsOrder(`sqlite:///${folder}/bus.db`)
  } finally {
    rmSync(folder, { recursive: true })
  }
})

test('an ordered group keeps the order of each key on Redis', async () => {
  await using server = await startRedis({ appendfsync: 'everysec' })
  await keepsOrder(server.url)
})
