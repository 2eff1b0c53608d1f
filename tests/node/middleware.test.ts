// Middleware around handlers and around publish: order, and what it may do.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { test } from 'node:test'
import {
  Bus,
  Event,
  type HandleMiddleware,
  type HandlerError,
  PayloadTooLarge,
  type Receipt,
  Reject,
  Retry,
} from 'polybus'
import { TestBus } from 'polybus/testing'

const quiet = { warn() {}, error() {} }
const tracing =
  (log: string[], name: string): HandleMiddleware =>
  async (_, next) => {
    log.push(`${name} in`)
    try {
      return await next()
    } finally {
      log.push(`${name} out`)
    }
  }

test('the first is the outermost, and a handler sees what they stored', async () => {
  const who = new AsyncLocalStorage<string>()
  let log: string[] = []
  for (const handler of [
    () => void log.push(who.getStore() ?? 'nobody'),
    async () => void log.push(who.getStore() ?? 'nobody'),
  ]) {
    log = []
    const bus = new TestBus()
    assert.equal(
      bus.use((event, next) => who.run(event.delivery.group, next)),
      bus,
    )
    bus.use(tracing(log, 'one')).use(tracing(log, 'two'))
    bus.on('a', { name: 'h' }, handler)
    await bus.publish('a', 1)
    await bus.idle()
    assert.deepEqual(log, ['one in', 'two in', 'test/h', 'two out', 'one out'])
    assert.equal(who.getStore(), undefined)
    await bus.close()
  }
})

test('what it throws, the handler threw; without next the event is done', async () => {
  const bus = new TestBus({ logger: quiet, retry: { maxRetries: 1, initialDelayMs: 1000, jitter: 'none' } })
  const ran: unknown[] = []
  bus.use(async ({ payload, delivery }, next) => {
    if (payload === 'reject') throw new Reject('not this one')
    if (payload === 'retry' && delivery.attempt === 1) throw new Retry({ afterMs: 5000 })
    if (payload === 'fail') throw new Error('no')
    if (payload !== 'skip') await next()
  })
  bus.on('a', function h(event) {
    ran.push(event.payload)
  })
  for (const payload of ['reject', 'retry', 'fail', 'skip', 'fine']) await bus.publish('a', payload)
  await bus.advance(4999)
  assert.deepEqual(ran, ['fine'])
  await bus.advance(1)
  assert.deepEqual(ran, ['fine', 'retry'])
  const letters = await bus.deadLetters.list()
  assert.deepEqual(
    new Map(letters.map(({ event, reason, attempts }) => [event?.payload, [reason, attempts]])),
    new Map([
      ['reject', ['rejected', 1]],
      ['fail', ['exhausted', 2]],
    ]),
  )
  assert.equal((await bus.stats()).subscriptions[0]?.completed, 3)
  await bus.close()
})

test("a handler's error passes through and may be caught", async () => {
  const bus = new TestBus({ logger: quiet, retry: { maxRetries: 0 } })
  const caught: unknown[] = []
  bus.use(async ({ payload }, next) => {
    try {
      await next()
    } catch (error) {
      caught.push((error as Error).message)
      if (payload === 'let go') throw error
    }
  })
  bus.on('a', function h({ payload }) {
    throw new RangeError(payload)
  })
  for (const payload of ['keep', 'let go']) await bus.publish('a', payload)
  await bus.idle()
  assert.deepEqual(caught, ['keep', 'let go'])
  const letters = await bus.deadLetters.list()
  assert.deepEqual(
    letters.map(({ event }) => event?.payload),
    ['let go'],
  )
  await bus.close()
})

test('added on a running bus it concerns later events, and may give the handler another event', async () => {
  const bus = new TestBus()
  const seen: unknown[] = []
  bus.on('a', function h(event, { signal }) {
    seen.push([event.meta.userId, event.delivery.attempt, signal.aborted])
  })
  await bus.publish('a', 1)
  await bus.idle()
  bus.use((event, next, { signal }) => next(event.withMeta({ userId: `u-${signal.aborted}` })))
  await bus.publish('a', 2)
  await bus.idle()
  assert.deepEqual(seen, [
    [undefined, 1, false],
    ['u-false', 1, false],
  ])
  await bus.close()
})

test('around publish it may change the event, sees the receipt, and may keep the event back', async () => {
  for (const mode of ['async', 'sync'] as const) {
    const bus = new TestBus({ mode })
    const receipts: Receipt[] = []
    const mock = bus.mockHandler('**')
    bus.use(
      async (event, next) => {
        if (event.payload === 'keep back') return
        if (event.payload === 'refuse') throw new TypeError('you may not')
        receipts.push(await next(event.withMeta({ userId: 'u-1', headers: { seen: 'yes' } })))
      },
      { on: 'publish' },
    )
    const receipt = await bus.publish('a', 'go', { sessionId: 's-1' })
    assert.equal(receipt, receipts[0])
    const event = Event.create('a', 'go too')
    assert.equal((await bus.publish(event)).id, event.meta.id)
    const [first, second] = await bus.publishMany([{ type: 'a', payload: 'many' }, Event.create('a', 'keep back')])
    assert.equal(first, receipts[2])
    assert.equal(second?.position, undefined)
    await assert.rejects(bus.publish('a', 'refuse'), TypeError)
    await assert.rejects(bus.publish(undefined as never), { code: 'invalid_event' })
    assert.equal((await bus.publish('a', 'keep back')).position, undefined)
    await bus.idle()
    assert.deepEqual(
      mock.events.map(({ payload, meta }) => [payload, meta.userId, meta.headers]),
      ['go', 'go too', 'many'].map((payload) => [payload, 'u-1', { seen: 'yes' }]),
    )
    assert.equal(mock.events[0]?.meta.sessionId, 's-1')
    await bus.close()
  }
})

test('publishMany is still all or none', async () => {
  const bus = new TestBus({ maxPayloadBytes: 100 })
  let errors = 0
  bus.use(
    async (event, next) => {
      if (event.payload === 'skip') return
      await null
      try {
        return await next()
      } catch (error) {
        errors++
        throw error
      }
    },
    { on: 'publish' },
  )
  const events = ['skip', 'fine', 'x'.repeat(200)].map((payload) => ({ type: 'a', payload }))
  await assert.rejects(bus.publishMany(events), (error: PayloadTooLarge) => {
    assert.ok(error instanceof PayloadTooLarge)
    assert.deepEqual(
      error.failures?.map(({ index }) => index),
      [2],
    )
    return true
  })
  assert.equal(errors, 2, 'each of those that were to be sent')
  assert.deepEqual(bus.published(), [])
  assert.deepEqual(await bus.publishMany([]), [])
  bus.use(
    (event, next) => {
      if (event.payload === 'refuse') throw new TypeError('you may not')
      return next()
    },
    { on: 'publish' },
  )
  const refused = ['fine', 'refuse'].map((payload) => ({ type: 'a', payload }))
  await assert.rejects(bus.publishMany(refused), TypeError)
  assert.deepEqual(bus.published(), [])
  const [receipt] = await bus.publishMany([{ type: 'a', payload: 'later', delayMs: 1000 }])
  assert.equal(receipt?.position, undefined, 'it is delayed')
  await bus.close()
})

test('a synchronous publish runs the handlers inside it', async () => {
  const bus = new Bus('memory://', { service: 'shop', mode: 'sync' })
  const log: string[] = []
  bus.use(tracing(log, 'handle'))
  bus.use((_, next) => next().finally(() => log.push('published')), { on: 'publish' })
  bus.on('a', function h() {
    log.push('handler')
  })
  await bus.publish('a', 1)
  assert.deepEqual(log, ['handle in', 'handler', 'handle out', 'published'])
  bus.use(() => {
    throw new Reject('no')
  })
  await assert.rejects(bus.publish('a', 1), (error: HandlerError) => error.cause instanceof Reject)
  await bus.close()
})

test('around an iterator', async () => {
  await using bus = await new Bus('memory://', { service: 'shop', logger: quiet }).start()
  bus.use((event, next) => {
    if (event.payload === 1) throw new Reject('not this one')
    return next()
  })
  const events = bus.events('a', { start: 'beginning' })
  await bus.publishMany([1, 2].map((payload) => ({ type: 'a', payload })))
  assert.equal((await events.next()).value.payload, 2)
  await events.return()
})

test('bad middleware is refused', () => {
  const bus = new Bus('memory://', { service: 'shop' })
  assert.throws(() => bus.use(5 as never), { code: 'invalid_config' })
  assert.throws(() => bus.use(async () => {}, { on: 'publsh' as never }), { code: 'invalid_config' })
})

test('meta of a copy', () => {
  const event = Event.create('a', Buffer.from('{"n": 1.10}'), { userId: 'ü' })
  const other = event.withMeta({ traceparent: '00-1-2-01' })
  assert.deepEqual(
    [other.meta.id, other.raw.toString(), other.meta.userId, other.meta.traceparent],
    [event.meta.id, '{"n": 1.10}', 'ü', '00-1-2-01'],
  )
  assert.equal(event.meta.traceparent, undefined)
  assert.equal(event.withMeta({}).meta.id, event.meta.id)
  assert.throws(() => event.withMeta({ nonsense: 1 } as never), { code: 'invalid_event' })
})
