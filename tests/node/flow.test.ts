// Breakers, batches and full queues, as TypeScript sees them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import {
  BatchFailed,
  BufferFull,
  Bus,
  type BusOptions,
  Event,
  HandlerError,
  HandlerTimeout,
  InvalidConfig,
  type Received,
  Reject,
  Retry,
  type SubscribeOptions,
  type Subscription,
  type SubscriptionStats,
} from 'polybus'
import { TestBus } from 'polybus/testing'
import { type RedisServer, startRedis } from './support/redis.ts'

const NEVER = 3_600_000
const quiet = { debug() {}, warn() {}, error() {} }
const transports: string[] = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8'))
const folder = mkdtempSync(join(tmpdir(), 'polybus-flow-'))
let server: RedisServer | undefined
before(async () => {
  if (transports.includes('redis')) server = await startRedis({})
})
after(async () => {
  await server?.[Symbol.asyncDispose]()
  rmSync(folder, { recursive: true })
})

/** Runs a test on the transports that processes share. */
function everywhere(name: string, run: (make: (options?: Partial<BusOptions>) => Bus) => Promise<void>): void {
  for (const transport of ['sqlite', 'redis'].filter((transport) => transports.includes(transport))) {
    test(`${name} (${transport})`, async () => {
      const url =
        transport === 'sqlite' ? `sqlite:///${join(folder, `${randomUUID()}.db`)}` : (server as RedisServer).url
      const retry = { maxRetries: 3, initialDelayMs: 1, jitter: 'none' } as const
      const shared = { service: 'test', bus: randomUUID(), logger: quiet, retry }
      const buses: Bus[] = []
      try {
        await run((options = {}) => {
          buses.push(new Bus(url, { ...shared, ...options }))
          return buses.at(-1) as Bus
        })
      } finally {
        for (const bus of buses) await bus.close({ timeoutMs: 0 })
      }
    })
  }
}

const publish = (bus: Bus, numbers: number[]) => bus.publishMany(numbers.map((number) => Event.create('n', number)))

async function when(subscription: Subscription, ok: (stats: SubscriptionStats) => boolean): Promise<SubscriptionStats> {
  for (const end = Date.now() + 20_000; Date.now() < end; await sleep(2)) {
    const stats = await subscription.stats()
    if (ok(stats)) return stats
  }
  throw new Error(`never: ${ok}; ${JSON.stringify(await subscription.stats())}`)
}

everywhere('a breaker opens, burns nothing while it is open, and recovers', async (make) => {
  const bus = make()
  const attempts: number[] = []
  const breaker = { threshold: 2, windowMs: 60_000, recoveryMs: 500, probes: 1 }
  const subscription = await bus.subscribe(
    'n',
    async function s(event) {
      attempts.push(event.delivery.attempt)
      if (attempts.length <= 2) throw new Error('the database is away')
    },
    { concurrency: 1, breaker },
  )
  assert.equal((await subscription.stats()).breaker, 'closed')
  await publish(bus, [0, 1, 2, 3, 4, 5])
  const open = await when(subscription, ({ breaker, running }) => breaker === 'open' && running === 0)
  assert.deepEqual([open.running, open.completed, open.dead, attempts.length], [0, 0, 0, 2])
  assert.match(bus.metrics(), /polybus_breaker_state\{/)
  const end = await when(subscription, ({ breaker, pending }) => breaker === 'closed' && pending === 0)
  assert.deepEqual([end.completed, end.failed, end.dead], [6, 2, 0])
  assert.deepEqual([attempts.length, attempts.filter((attempt) => attempt === 1).length], [8, 6])
})

test('a breaker follows the virtual clock', async () => {
  const bus = new TestBus({ logger: quiet })
  let runs = 0
  const options = { name: 's', breaker: true, concurrency: 1, retry: { maxRetries: 9, initialDelayMs: 0 } }
  const subscription = await bus.subscribe('n', () => runs++ < 5 && Promise.reject(new Error('away')), options)
  await publish(bus, [0, 1, 2, 3, 4, 5, 6])
  await bus.idle()
  assert.equal((await subscription.stats()).breaker, 'open')
  await bus.advance(29_999)
  assert.equal(runs, 5)
  await bus.advance(1)
  assert.equal((await subscription.stats()).breaker, 'closed')
  assert.equal(runs, 12)
  await bus.close()
})

everywhere('a batch fails in part', async (make) => {
  const bus = make()
  const seen: string[] = []
  const subscription = await bus.subscribe(
    'n',
    async (events: Received<number>[]) => {
      const errors = new Map<string, unknown>()
      for (const { payload, delivery, meta } of events) {
        seen.push(`${payload}:${delivery.attempt}`)
        if (payload === 1) errors.set(meta.id, new Reject('never'))
        else if (payload === 2 && delivery.attempt === 1) errors.set(meta.id, new Retry({ afterMs: 10 }))
        else if (payload === 3 && delivery.attempt === 1) errors.set(meta.id, 'no luck')
      }
      events.length = 0 // the array is ours
      throw new BatchFailed(errors)
    },
    { name: 's', batch: { size: 5, waitMs: 50 } },
  )
  await publish(bus, [0, 1, 2, 3, 4])
  const stats = await when(subscription, ({ pending, dead }) => pending === 0 && dead === 1)
  assert.deepEqual([stats.completed, stats.retried, stats.deadLettered], [4, 2, 1])
  assert.deepEqual(seen.sort(), ['0:1', '1:1', '2:1', '2:2', '3:1', '3:2', '4:1'])
  const [letter] = await bus.deadLetters.list()
  assert.deepEqual([letter?.event?.payload, letter?.reason, letter?.error.message], [1, 'rejected', 'never'])
})

everywhere('a batch that throws fails as a whole, and the last attempt is made alone', async (make) => {
  const bus = make()
  const subscription = await bus.subscribe(
    'n',
    (events: Received<number>[]) => {
      if (events.some((event) => event.payload === 1)) throw new Error('one of them is bad')
    },
    { name: 's', batch: { size: 3, waitMs: 20 } },
  )
  await publish(bus, [0, 1, 2])
  const stats = await when(subscription, ({ dead, pending }) => dead === 1 && pending === 0)
  assert.equal(stats.completed, 2)
  const [letter] = await bus.deadLetters.list()
  assert.deepEqual([letter?.event?.payload, letter?.attempts], [1, 4])
})

everywhere('a batch larger than one take is one call', async (make) => {
  const bus = make()
  const sizes: number[] = []
  const options = { name: 's', batch: { size: 600, waitMs: NEVER } }
  const subscription = await bus.subscribe('n', (events: Received[]) => sizes.push(events.length), options)
  await publish(bus, [...Array(600).keys()])
  await when(subscription, ({ completed }) => completed === 600)
  assert.deepEqual(sizes, [600])
})

test('an unknown id fails whatever is not named', async () => {
  const bus = new TestBus({ logger: quiet, retry: { initialDelayMs: 0 } })
  const attempts: (number | undefined)[] = []
  bus.on('n', { name: 's', batch: { size: 2 } }, (events: Received[]) => {
    attempts.push(...events.map((event) => event.delivery.attempt))
    if (events[0]?.delivery.attempt === 1) throw new BatchFailed({ 'order-7': new Error('not an id of an event') })
  })
  await publish(bus, [0, 1])
  await bus.idle()
  await bus.advance(50)
  assert.deepEqual(attempts.sort(), [1, 1, 2, 2])
  await bus.close()
})

test('a batch has one signal and one timeout', async () => {
  const bus = new TestBus({ logger: quiet, retry: { initialDelayMs: 0 } })
  const reasons: unknown[] = []
  const options = { name: 's', timeoutMs: 1000, batch: { size: 3 } } satisfies SubscribeOptions
  const subscription = await bus.subscribe(
    'n',
    (events: Received[], { signal }) =>
      events[0]?.delivery.attempt === 1 &&
      new Promise((_, reject) => {
        signal.addEventListener('abort', () => {
          reasons.push(signal.reason)
          reject(signal.reason)
        })
      }),
    options,
  )
  await publish(bus, [0, 1, 2])
  await when(subscription, ({ running }) => running === 3)
  await bus.advance(1000)
  await bus.advance(50)
  const stats = await subscription.stats()
  assert.deepEqual([stats.timedOut, stats.completed, reasons.length], [3, 3, 1])
  assert.ok(reasons[0] instanceof HandlerTimeout)
  await bus.close()
})

everywhere('a batch that is not full goes back at close', async (make) => {
  const bus = make()
  const attempts: number[] = []
  const handler = (events: Received[]) => void attempts.push(...events.map((event) => event.delivery.attempt))
  const first = await bus.subscribe('n', handler, { name: 's', batch: { size: 100, waitMs: NEVER } })
  await publish(bus, [0, 1])
  await when(first, ({ inFlight }) => inFlight === 2)
  await first.unsubscribe()
  assert.deepEqual(attempts, [])
  const second = await bus.subscribe('n', handler, { name: 's', batch: { size: 2, waitMs: NEVER } })
  await when(second, ({ pending }) => pending === 0)
  assert.deepEqual(attempts, [1, 1])
})

test('middleware added later leaves batches alone', async () => {
  const bus = new TestBus({ logger: quiet })
  const given: unknown[][] = []
  const passed: string[] = []
  const store = (events: Received[]) => {
    given.push(events.map((event) => event.payload))
  }
  await bus.subscribe('n', store, { name: 'batches', batch: { size: 2, waitMs: NEVER } })
  await bus.subscribe('other', () => {}, { name: 'single' })
  bus.use(async (event, next) => {
    passed.push(event.type)
    return await next(event)
  })
  await bus.publishMany([Event.create('n', 1), Event.create('n', 2)])
  await bus.publish('other', 3)
  await bus.idle()
  await bus.publish('n', 4, {}, { mode: 'sync' })
  assert.deepEqual(given, [[1, 2], [4]])
  assert.deepEqual(passed, ['other'])
  await bus.close()
})

test('a synchronous publish makes a batch of one', async () => {
  const bus = new Bus('memory://', { service: 'shop', mode: 'sync', logger: quiet })
  const sizes: number[] = []
  await bus.subscribe(
    'n',
    (events: Received[]) => {
      sizes.push(events.length)
      const [event] = events
      if (event?.payload === 'bad') throw new BatchFailed({ [event.meta.id]: new Error('bad') })
    },
    { name: 's', batch: true },
  )
  await bus.publish('n', 1)
  assert.deepEqual(sizes, [1])
  await assert.rejects(bus.publish('n', 'bad'), HandlerError)
  await bus.close()
})

everywhere('a full queue refuses or waits', async (make) => {
  const event = Event.create('n', 'x'.repeat(100_000))
  for (const whenFull of ['error', 'wait'] as const) {
    const bus = await make({ whenFull, publishBufferBytes: 65_536 }).start()
    const results = await Promise.allSettled(Array.from({ length: 20 }, () => bus.publish(event)))
    const refused = results.filter((result) => result.status === 'rejected')
    assert.ok(refused.every(({ reason }) => reason instanceof BufferFull && reason.retryable))
    assert.equal(refused.length > 0, whenFull === 'error')
  }
})

test('wrong options are named', async () => {
  const bus = new Bus('memory://', { service: 'shop', logger: quiet })
  const wrong: [object, RegExp][] = [
    [{ breaker: { threshold: 0 } }, /breaker\.threshold=0 .* from 1/],
    [{ breaker: { windowMs: 0 } }, /breaker\.windowMs=0/],
    [{ breaker: { recoveryMs: -1 } }, /breaker\.recoveryMs=-1/],
    [{ breaker: { probes: 1.5 } }, /breaker\.probes=1\.5/],
    [{ breaker: { treshold: 3 } }, /breaker option treshold; did you mean threshold/],
    [{ breaker: { recovery: 3 } }, /did you mean recoveryMs/],
    [{ breaker: 'yes' }, /breaker="yes"/],
    [{ breaker: true, broadcast: true }, /broadcast/],
    [{ batch: { size: 0 } }, /batch\.size=0/],
    [{ batch: { waitMs: -1 } }, /batch\.waitMs=-1/],
    [{ batch: { sise: 2 } }, /did you mean size/],
    [{ batch: 7 }, /batch=7/],
    [{ batch: { size: 2000 } }, /does not fit into the buffer of 1000/],
    [{ batch: true, ordered: true }, /ordered/],
  ]
  for (const [options, message] of wrong) {
    const subscribe = () => bus.subscribe('n', () => {}, { name: 's', ...options } as SubscribeOptions)
    await assert.rejects(subscribe, (error) => error instanceof InvalidConfig && message.test(error.message))
  }
  assert.throws(() => bus.events('n', { batch: true } as object), InvalidConfig)
  for (const errors of [undefined, ['id'], 'id']) assert.throws(() => new BatchFailed(errors as never), InvalidConfig)
  await bus.close()
})
