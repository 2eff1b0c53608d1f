// What happens once although it comes twice, on each transport that processes share.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Bus, type BusOptions, Event, InvalidConfig, type Subscription } from 'polybus'
import { TestBus } from 'polybus/testing'
import { type RedisServer, startRedis } from './support/redis.ts'

const transports: string[] = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8'))

/** For states that no event announces. */
async function until(condition: () => Promise<boolean> | boolean): Promise<void> {
  const deadline = Date.now() + 20_000
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `never: ${condition}`)
    await sleep(5)
  }
}

const absorbed = (count: number, ...subscriptions: Subscription[]) =>
  until(async () => {
    const stats = await Promise.all(subscriptions.map((subscription) => subscription.stats()))
    const sum = stats.reduce((sum, { duplicates }) => sum + duplicates, 0)
    assert.ok(sum <= count, `${sum}`)
    return sum === count
  })

for (const transport of ['sqlite', 'redis'].filter((name) => transports.includes(name))) {
  describe(transport, () => {
    const folder = mkdtempSync(join(tmpdir(), 'polybus-once-'))
    const open: Bus[] = []
    let server: RedisServer | undefined
    before(async () => {
      if (transport === 'redis') server = await startRedis({ appendfsync: 'everysec' })
    })
    after(async () => {
      await Promise.all(open.map((bus) => bus.close({ timeoutMs: 0 })))
      await server?.[Symbol.asyncDispose]()
      rmSync(folder, { recursive: true })
    })
    /** Buses of one name that no other test has. */
    const place = () => {
      const bus = randomUUID()
      const url = server?.url ?? `sqlite:///${join(folder, `${bus}.db`)}`
      return (options: Partial<BusOptions> = {}) => {
        const retry = { maxRetries: 3, initialDelayMs: 5, jitter: 'none' } as const
        open.push(new Bus(url, { service: 'shop', bus, retry, ...options }))
        return open.at(-1) as Bus
      }
    }

    test('an event is handled once by its own key', async () => {
      const bus = place()({ idempotencyWindowMs: 0 })
      const seen: unknown[] = []
      const handler = (event: Event) => seen.push(event.payload)
      const options = { name: 'x', idempotent: true, idempotentRetentionMs: 3_600_000 }
      const subscription = await bus.subscribe('x', handler, options)
      const event = Event.create('x', 1)
      for (let n = 0; n < 3; n++) {
        await bus.publish(event)
        assert.equal((await bus.publish('x', 2, { idempotencyKey: 'k' })).duplicate, undefined)
      }
      await absorbed(4, subscription)
      assert.deepEqual(seen.sort(), [1, 2])
      assert.match(bus.metrics(), /polybus_events_processed_total\{.*status="duplicate"\} 4\n/)
    })

    test('a function tells the key, in all members of the group', async () => {
      const another = place()
      const [one, two] = [another(), another()]
      const seen: number[] = []
      const subscribe = (bus: Bus) =>
        bus.subscribe(
          'x',
          async (event) => {
            assert.equal(event.delivery.attempt, 1)
            seen.push(event.payload.order)
          },
          { name: 'x', idempotent: (event) => event.payload.order },
        )
      const subscriptions = [await subscribe(one), await subscribe(two)]
      await one.publishMany(Array.from({ length: 50 }, (_, n) => ({ type: 'x', payload: { order: n % 5, n } })))
      await absorbed(45, ...subscriptions)
      assert.deepEqual(seen.sort(), [0, 1, 2, 3, 4])
    })

    test('a failed attempt frees the key, and a function that fails is one', async () => {
      const bus = place()()
      const told = [new Error('no'), 1.5, 'key', 'key', 10n ** 20n]
      const attempts: number[] = []
      const subscription = await bus.subscribe(
        'x',
        (event) => {
          attempts.push(event.delivery.attempt)
          if (event.delivery.attempt === 3) throw new Error('as the test wants')
        },
        {
          name: 'x',
          idempotent: () => {
            const key = told.shift()
            if (key instanceof Error) throw key
            return key
          },
        },
      )
      await bus.publish('x', null)
      await until(() => attempts.length === 2)
      assert.deepEqual(attempts, [3, 4])
      await bus.publish('x', null) // under another key
      await until(() => attempts.length === 3)
      assert.equal((await subscription.stats()).failed, 3)
    })

    test('a key is published once', async () => {
      const another = place()
      const [one, two] = [another(), another()]
      const seen: unknown[] = []
      await one.subscribe('x', (event) => void seen.push(event.payload), { name: 'x' })
      const first = await one.publish('x', 1, { idempotencyKey: 'k' })
      assert.deepEqual(await two.publish('x', 2, { idempotencyKey: 'k' }), { ...first, duplicate: true })
      const many = await two.publishMany([
        { type: 'x', payload: 3, meta: { idempotencyKey: 'k' } },
        { type: 'x', payload: 4 },
      ])
      assert.deepEqual(
        many.map(({ duplicate }) => duplicate),
        [true, undefined],
      )
      await until(() => seen.length === 2)
      assert.deepEqual(seen.sort(), [1, 4])
      const { capabilities } = await one.guarantees()
      assert.ok(capabilities.idempotent && capabilities.publishDedupe)
    })

    test('one of eight publishers wins', async () => {
      const another = place()
      const published = Array.from({ length: 8 }, (_, n) => another().publish('x', n, { idempotencyKey: 'k' }))
      const receipts = await Promise.all(published)
      assert.equal(receipts.filter(({ duplicate }) => !duplicate).length, 1)
      assert.equal(new Set(receipts.map(({ id }) => id)).size, 1)
    })
  })
}

test('what cannot tell a key is refused', async () => {
  const bus = new Bus('memory://', { service: 'shop' })
  const handler = () => {}
  for (const options of [
    { idempotent: 'function' },
    { idempotent: 1 },
    { idempotent: true, broadcast: true },
    { idempotentRetentionMs: 5 },
  ]) {
    await assert.rejects(bus.subscribe('x', handler, options as object), InvalidConfig)
  }
  await bus.close()
})

test('an injected duplicate is handled once', async () => {
  const bus = new TestBus()
  const mock = bus.mockHandler('x', { idempotent: true })
  const careless = bus.mockHandler('x', { name: 'careless' })
  bus.duplicateNext('x', 2)
  await bus.publish('x', 1)
  await bus.publish('x', 2, { idempotencyKey: 'k' })
  await bus.idle()
  assert.equal(mock.callCount, 2)
  assert.equal(careless.callCount, 4)
  await bus.close()
})
