// The log as a TypeScript program reads it, and replays of it into one group.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  Bus,
  BusClosed,
  type BusOptions,
  type Event,
  type HistoryEntry,
  InvalidConfig,
  InvalidPattern,
  NotFound,
  Reject,
  type ReplayResult,
} from 'polybus'
import { type RedisServer, startRedis } from './support/redis.ts'

let server: RedisServer
const folder = mkdtempSync(join(tmpdir(), 'polybus-'))
before(async () => {
  server = await startRedis({ appendfsync: 'everysec' })
})
after(async () => {
  await server?.[Symbol.asyncDispose]()
  rmSync(folder, { recursive: true, force: true })
})

/** Runs the test on each transport, with a bus that no other has. */
function everywhere(name: string, run: (bus: Bus) => Promise<void>): void {
  for (const transport of ['sqlite', 'redis']) {
    test(`${transport}: ${name}`, async () => {
      const bus = randomUUID()
      const url = transport === 'sqlite' ? `sqlite:///${folder}/${bus}.db` : server.url
      await using running = await new Bus(url, { service: 'shop', bus, retry: { maxRetries: 0 } } as BusOptions).start()
      await run(running)
    })
  }
}

/** Events that a handler was given. */
class Inbox {
  readonly events: Event[] = []
  #arrived = new EventEmitter()

  readonly handle = (event: Event): void => {
    this.events.push(event)
    this.#arrived.emit('event')
  }

  async take(count: number): Promise<Event[]> {
    const signal = AbortSignal.timeout(20_000)
    while (this.events.length < count) await once(this.#arrived, 'event', { signal })
    return this.events.splice(0, count)
  }
}

async function finished(bus: Bus, name: string): Promise<void> {
  const signal = AbortSignal.timeout(20_000)
  for (;;) {
    const found = (await bus.stats()).subscriptions.find((stats) => stats.name === name)
    if (found?.pending === 0) return
    signal.throwIfAborted()
    await sleep(5) // a store tells only when asked
  }
}

const numbers = (count: number) => Array.from({ length: count }, (_, number) => ({ type: 'x', payload: number }))

everywhere('pages in publish order', async (bus) => {
  const receipts = []
  for (let number = 0; number < 7; number++) receipts.push(await bus.publish('order.placed', number))
  await bus.publish('user.created', 7)
  const entries: HistoryEntry[] = []
  const sizes = []
  for (;;) {
    const page = await bus.history('order.*', { limit: 3, after: entries.at(-1)?.position })
    if (page.length === 0) break
    sizes.push(page.length)
    entries.push(...page)
  }
  assert.deepEqual(sizes, [3, 3, 1])
  assert.deepEqual(
    entries.map((entry) => entry.event?.payload),
    [0, 1, 2, 3, 4, 5, 6],
  )
  assert.deepEqual(
    entries.map((entry) => entry.position),
    receipts.map((receipt) => receipt.position),
  )
  assert.ok(entries[0]?.publishedAt instanceof Date && entries[0].records === undefined)
  assert.equal((await bus.history()).length, 8)
  const past = new Date(Date.now() - 3_600_000)
  assert.equal((await bus.history('*', { since: past })).length, 8)
  assert.deepEqual(await bus.history('*', { until: past }), [])
})

everywhere('records of each group', async (bus) => {
  const done = new Inbox()
  await bus.subscribe('x', done.handle, { name: 'done' })
  await bus.subscribe(
    'x',
    () => {
      throw new Reject('never')
    },
    { name: 'refuse' },
  )
  await (await bus.subscribe('x', () => {}, { name: 'away' })).unsubscribe()
  await bus.publish('x', 1)
  await done.take(1)
  await finished(bus, 'done')
  await finished(bus, 'refuse')
  const [entry] = await bus.history('x', { records: true })
  const found = new Map(entry?.records?.map((record) => [record.group, record]))
  assert.deepEqual(
    [...found].map(([group, record]) => [group, record.status]),
    [
      ['shop/away', 'pending'],
      ['shop/done', 'completed'],
      ['shop/refuse', 'failed'],
    ],
  )
  const failed = found.get('shop/refuse')
  assert.deepEqual([failed?.attempts, failed?.reason, failed?.error?.message], [1, 'rejected', 'never'])
  assert.ok(failed?.lastFailedAt instanceof Date)
  assert.equal((await bus.deadLetters.get(failed?.deadLetter ?? '')).attempts, 1)
})

everywhere('replay into one group, in batches, and on after a position', async (bus) => {
  const [one, two] = [new Inbox(), new Inbox()]
  await bus.subscribe('x', one.handle, { name: 'one' })
  await bus.subscribe('x', two.handle, { name: 'two' })
  await bus.publishMany(numbers(600))
  const ids = new Set((await one.take(600)).map((event) => event.meta.id))
  await two.take(600)
  await finished(bus, 'one')
  await finished(bus, 'two')
  const told: ReplayResult[] = []
  const progress = async (result: ReplayResult) => {
    await sleep(0)
    told.push(result)
  }
  const first = await bus.replay('x', { group: 'shop/one', limit: 10, progress })
  assert.deepEqual([first.count, first.done, told], [10, false, [first]])
  const rest = await bus.replay('x', { group: 'shop/one', after: first.position, progress })
  assert.deepEqual([rest.count, rest.done, told.at(-1)], [590, true, rest])
  assert.ok(told.length > 2)
  const again = await one.take(600)
  assert.deepEqual(new Set(again.map((event) => event.meta.id)), ids)
  assert.ok(again.every((event) => event.delivery?.attempt === 1))
  await finished(bus, 'one')
  assert.equal((await bus.replay('nothing', { group: 'shop/one' })).count, 0)
  assert.deepEqual([one.events.length, two.events.length], [0, 0])
  const enough = new Error('enough')
  const stop = () => {
    throw enough
  }
  await assert.rejects(bus.replay('x', { group: 'shop/one', progress: stop }), enough)
})

everywhere('bad questions', async (bus) => {
  await bus.subscribe('x', () => {}, { name: 'mail' })
  const group = 'shop/mail'
  for (const wrong of [
    { since: 2000, until: 1000 },
    { limit: 0 },
    { limit: 'ten' },
    { after: 'yesterday' },
    { since: 'yesterday' },
    { afetr: '1' },
  ]) {
    await assert.rejects(bus.history('*', wrong as object), InvalidConfig, JSON.stringify(wrong))
    await assert.rejects(
      bus.replay('*', { group, ...wrong } as { group: string }),
      InvalidConfig,
      JSON.stringify(wrong),
    )
  }
  await assert.rejects(bus.history('['), InvalidPattern)
  await assert.rejects(bus.history(7 as unknown as string), InvalidConfig)
  await assert.rejects(bus.replay('*', { group: 'shop/mial' }), (error) => {
    return error instanceof NotFound && error.message.includes('did you mean')
  })
  await assert.rejects(bus.replay('*', {} as { group: string }), InvalidConfig)
  await assert.rejects(bus.replay('*', { group, progress: 7 as never }), InvalidConfig)
  await assert.rejects(
    bus.subscribe('x', () => {}, { name: 'y', deadLetter: false, deadLetterExpired: true }),
    InvalidConfig,
  )
  assert.throws(() => new Bus('memory://', { service: 'shop', maxBytes: 0 }), InvalidConfig)
  await bus.close()
  await assert.rejects(bus.history(), BusClosed)
  await assert.rejects(bus.replay('*', { group }), BusClosed)
})

everywhere('what expires can become a dead letter', async (bus) => {
  const inbox = new Inbox()
  await (await bus.subscribe('x', inbox.handle, { name: 's' })).unsubscribe()
  await bus.publish('x', 1, {}, { expiresInMs: 1 })
  await sleep(50) // time itself is what is waited for
  await bus.publish('x', 2)
  await bus.subscribe('x', inbox.handle, { name: 's', deadLetterExpired: true })
  assert.deepEqual(
    (await inbox.take(1)).map((event) => event.payload),
    [2],
  )
  await finished(bus, 's')
  const [letter] = await bus.deadLetters.list()
  assert.deepEqual([letter?.reason, letter?.attempts, letter?.event?.payload], ['expired', 0, 1])
})
