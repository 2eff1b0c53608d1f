// What a handler may say and do, with time under the test's control.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { test } from 'node:test'
import { BusClosed, HandlerError, HandlerTimeout, LeaseLost, Reject, Retry, Unsupported } from 'polybus'
import { TestBus } from 'polybus/testing'

const quiet = { debug() {}, warn() {}, error() {} }
const testBus = (options = {}) => new TestBus({ logger: quiet, ...options })

test('a failing handler is retried, then buried with its error, then replayed', async () => {
  const bus = testBus()
  let runs = 0
  bus.on('order.*', { retry: { maxRetries: 2, initialDelayMs: 1000, jitter: 'none' } }, function mail(event) {
    runs++
    assert.equal(event.delivery.attempt, runs > 3 ? runs - 3 : runs)
    if (runs <= 3) throw new TypeError('no such address')
  })
  const { id } = await bus.publish('order.placed', { n: 1 })
  await bus.idle()
  assert.equal(runs, 1)
  await bus.advance(999)
  assert.equal(runs, 1)
  await bus.advance(1)
  assert.equal(runs, 2)
  await bus.advance(2000)
  assert.equal(runs, 3)
  const [letter] = await bus.deadLetters.list()
  assert.ok(letter?.event)
  assert.deepEqual(
    [letter.reason, letter.attempts, letter.error.type, letter.error.message, letter.subscription, letter.group],
    ['exhausted', 3, 'TypeError', 'no such address', 'mail', 'test/mail'],
  )
  assert.match(letter.error.stack, /mail/)
  assert.equal(letter.event.meta.id, id)
  assert.equal(letter.raw.toString(), letter.event.encode().toString())
  assert.ok(letter.firstFailedAt <= letter.lastFailedAt)
  assert.equal((await bus.deadLetters.get(letter.id)).id, letter.id)
  assert.equal(await bus.deadLetters.count({ group: 'test/mail', pattern: 'order.*' }), 1)
  assert.equal(await bus.deadLetters.count({ pattern: 'x.*' }), 0)
  assert.equal(await bus.deadLetters.replay(letter.id), 1)
  await bus.idle()
  assert.equal(runs, 4)
  assert.equal(await bus.deadLetters.count(), 0)
  await assert.rejects(bus.deadLetters.get(letter.id), { code: 'not_found' })
  await assert.rejects(bus.deadLetters.replay(letter.id), { code: 'not_found' })
  await assert.rejects(bus.deadLetters.purge(undefined as never), { code: 'invalid_config' })
})

test('time goes from one due time to the next', async () => {
  const bus = testBus()
  const attempts: number[] = []
  bus.on('a', { retry: { maxRetries: 3, initialDelayMs: 1000, factor: 1, jitter: 'none' } }, function fails(event) {
    attempts.push(event.delivery.attempt)
    if (event.delivery.attempt < 3) throw new Error('not yet')
  })
  await bus.publish('a', 1)
  await bus.idle()
  await bus.advance(10_000)
  assert.deepEqual(attempts, [1, 2, 3])
  await bus.close()
})

test('idle does not wait for what is paused', async () => {
  const bus = testBus()
  const seen: unknown[] = []
  const subscription = await bus.subscribe('a', (event) => void seen.push(event.payload), { name: 'a' })
  subscription.pause()
  await bus.publish('a', 1)
  await bus.idle()
  assert.deepEqual(seen, [])
  subscription.resume()
  await bus.idle()
  assert.deepEqual(seen, [1])
  await bus.close()
})

test('Retry decides when, Reject decides never', async () => {
  const bus = testBus()
  const seen: number[] = []
  bus.on('a', { retry: { maxRetries: 1 } }, async function later(event) {
    seen.push(event.delivery.attempt)
    if (event.delivery.attempt === 1) throw new Retry({ afterMs: 5000 })
  })
  bus.on('a', function never() {
    throw new Reject('not mine', { cause: new Error('why') })
  })
  await bus.publish('a', 1)
  await bus.advance(4999)
  assert.deepEqual(seen, [1])
  await bus.advance(1)
  assert.deepEqual(seen, [1, 2])
  const [letter, ...rest] = await bus.deadLetters.list()
  assert.equal(rest.length, 0)
  assert.deepEqual([letter?.reason, letter?.error.message, letter?.attempts], ['rejected', 'not mine', 1])
  assert.equal(await bus.deadLetters.purge({}), 1)
  assert.throws(() => new Retry({ afterMs: Number.NaN }), { code: 'invalid_config' })
})

// biome-ignore-start lint/suspicious/noThenProperty: bad input on purpose
test('whatever is thrown is a failure, and nothing else happens', async () => {
  const bus = testBus({ retry: { maxRetries: 0 } })
  class Evil extends Error {
    override get message(): string {
      throw new Error('no message for you')
    }
  }
  const thrown: [string, () => unknown][] = [
    [
      'sync',
      () => {
        throw new Error('sync')
      },
    ],
    [
      'text',
      () => {
        throw 'a text'
      },
    ],
    ['nothing', () => Promise.reject(undefined)],
    [
      'null',
      () => {
        throw null
      },
    ],
    [
      'object',
      () => {
        throw { status: 500 }
      },
    ],
    [
      'evil',
      () => {
        throw new Evil()
      },
    ],
    [
      'symbol',
      () => {
        throw Symbol('s')
      },
    ],
    [
      'proxy',
      () => {
        throw new Proxy(
          {},
          {
            get() {
              throw new Error('trap')
            },
            has() {
              throw new Error('trap')
            },
          },
        )
      },
    ],
    [
      'thenable',
      () => ({
        get then() {
          throw new Error('then')
        },
      }),
    ],
    [
      'rejecting thenable',
      () => ({ then: (_: unknown, reject: (error: unknown) => void) => reject(new Error('later')) }),
    ],
  ]
  for (const [name, handler] of thrown) await bus.subscribe('a', handler, { name })
  for (const [name, value] of [
    ['number', 7],
    ['thenable value', { then: (done: (value: number) => void) => done(1) }],
  ] as const) {
    await bus.subscribe('b', () => value, { name })
  }
  await bus.publish('a', 1)
  await bus.publish('b', 1)
  await bus.idle()
  const letters = await bus.deadLetters.list()
  assert.deepEqual(new Set(letters.map((letter) => letter.subscription)), new Set(thrown.map(([name]) => name)))
  const { subscriptions } = await bus.stats()
  assert.ok(subscriptions.every(({ running, pending }) => running === 0 && pending === 0))
  assert.match(bus.metrics(), /polybus_dead_letters_total\{.*subscription="sync".*\} 1/)
})

// biome-ignore-end lint/suspicious/noThenProperty: as above

test('a timeout aborts the signal with the reason, and the delivery is tried again', async () => {
  const bus = testBus()
  const reasons: unknown[] = []
  bus.on('a', { timeoutMs: 5000, retry: { initialDelayMs: 0 } }, async function slow(event, { signal }) {
    if (event.delivery.attempt > 1) return
    await new Promise((_, reject) => signal.addEventListener('abort', () => reject(signal.reason)))
    throw new Error('not reached')
  })
  bus.on('a', { timeoutMs: 5000, retry: { maxRetries: 0 } }, async function deaf(_, context) {
    await new Promise((resolve) => setImmediate(resolve))
    void bus.advance(5000).then(() => reasons.push(context.signal.aborted, context.signal.reason))
    await new Promise(() => {})
  })
  await bus.publish('a', 1)
  const mock = bus.mockHandler('done')
  await bus.publish('done', 1)
  while ((await bus.deadLetters.count()) === 0 || reasons.length === 0) await new Promise(setImmediate)
  assert.equal(reasons[0], true)
  assert.ok(reasons[1] instanceof HandlerTimeout)
  const [letter] = await bus.deadLetters.list()
  assert.deepEqual([letter?.subscription, letter?.error.type], ['deaf', 'HandlerTimeout'])
  assert.equal(mock.called, true)
  void LeaseLost
})

test('closing from inside a handler does not wait for that handler', { timeout: 5000 }, async () => {
  const bus = testBus()
  const closed = new Promise<void>((resolve, reject) => {
    bus.on('a', async function closer() {
      await new Promise(setImmediate)
      await bus.close().then(resolve, reject)
    })
  })
  await bus.publish('a', 1)
  await closed
  await bus.close()
  await assert.rejects(bus.publish('a', 1), BusClosed)
})

test('close waits for handlers, then aborts them and hands their events back', async () => {
  const bus = testBus()
  let signal: AbortSignal | undefined
  const started = new Promise<void>((resolve) => {
    bus.on('a', async function stuck(_, context) {
      signal = context.signal
      resolve()
      await new Promise(() => {})
    })
  })
  await bus.publish('a', 1)
  await started
  await bus.close({ timeoutMs: 1 })
  assert.ok(signal?.reason instanceof BusClosed)
})

test('a handler may publish', async () => {
  const bus = testBus()
  bus.on('order.placed', async function ship(event) {
    await bus.publish(event.child('shipment.sent', { of: event.payload.n }))
  })
  const mock = bus.mockHandler('shipment.*')
  const { id } = await bus.publish('order.placed', { n: 7 }, { userId: 'u', partitionKey: 'k' })
  await bus.idle()
  const [sent] = mock.events
  assert.deepEqual(sent?.payload, { of: 7 })
  assert.deepEqual(
    [sent?.meta.causationId, sent?.meta.correlationId, sent?.meta.userId, sent?.meta.partitionKey],
    [id, id, 'u', undefined],
  )
})

test('handlers do not see the context of others, nor of whoever published', async () => {
  const bus = testBus()
  const storage = new AsyncLocalStorage<string>()
  const seen: unknown[] = []
  bus.on('a', async function leaky(event) {
    seen.push(storage.getStore())
    storage.enterWith(event.meta.id)
  })
  await storage.run('publisher', async () => {
    await bus.publishMany([1, 2, 3].map((payload) => ({ type: 'a', payload })))
    await bus.idle()
  })
  assert.deepEqual(seen, [undefined, undefined, undefined])
})

test('sync mode runs the handlers of this process in order and throws the first failure', async () => {
  const bus = testBus({ mode: 'sync' })
  const order: string[] = []
  const cause = new Error('third')
  bus.on('a.*', async function first(event) {
    await new Promise(setImmediate)
    order.push(`first ${event.delivery.attempt} ${event.delivery.group}`)
  })
  bus.on('b', function other() {
    order.push('other')
  })
  bus.on('a.b', function third() {
    order.push('third')
    throw cause
  })
  bus.on('**', function last() {
    order.push('last')
  })
  await assert.rejects(bus.publish('a.b', 1), (error: HandlerError) => {
    assert.ok(error instanceof HandlerError)
    assert.equal(error.cause, cause)
    return true
  })
  assert.deepEqual(order, ['first 1 test/first', 'third'])
  const receipt = await bus.publish('b', 1)
  assert.match(receipt.id, /^[0-9a-f-]{36}$/)
  assert.deepEqual(order.slice(2), ['other', 'last'])
  await assert.rejects(bus.publish('b', 1, {}, { delayMs: 5 }), Unsupported)
  await bus.publish('b', 1, {}, { mode: 'async' })
  await bus.idle()
  assert.deepEqual(order.slice(4).sort(), ['last', 'other'])
})

test('pause, resume, unsubscribe', async () => {
  const bus = testBus()
  let runs = 0
  const count = () => void runs++
  const subscription = await bus.subscribe('a', count)
  assert.deepEqual([subscription.name, subscription.group, subscription.pattern], ['count', 'test/count', 'a'])
  subscription.pause()
  await bus.publish('a', 1)
  // A take that was under way may bring it; it is handed back.
  while ((await subscription.stats()).lag === 0) await new Promise(setImmediate)
  assert.equal(runs, 0)
  subscription.resume()
  await bus.idle()
  assert.equal(runs, 1)
  await subscription.unsubscribe()
  await bus.publish('a', 1)
  await bus.subscribe('a', count)
  await bus.idle()
  assert.equal(runs, 2, 'the durable group went on collecting')
  assert.equal(await bus.deleteGroup('test/count'), true)
})

test('iterating acknowledges when the next event is asked for, and break hands back', async () => {
  const bus = testBus()
  const seen: number[] = []
  const reader = (async () => {
    for await (const event of bus.events<number>('a')) {
      seen.push(event.payload)
      if (event.payload === 3) break
    }
  })()
  while ((await bus.stats()).subscriptions.length === 0) await new Promise(setImmediate)
  await bus.publishMany([1, 2, 3, 4].map((payload) => ({ type: 'a', payload })))
  await reader
  const again = bus.events<number>('a')
  const attempts: unknown[] = []
  for (const _ of [3, 4]) {
    const { value } = await again.next()
    attempts.push([value?.payload, value?.delivery.attempt])
  }
  assert.deepEqual(seen, [1, 2, 3])
  assert.deepEqual(attempts, [
    [3, 1],
    [4, 1],
  ])
  const waiting = again.next()
  await bus.close({ timeoutMs: 1 })
  assert.deepEqual(await waiting, { done: true, value: undefined })
})

test('records go to the logger, without payloads', async () => {
  const records: string[] = []
  const logger = { warn: (text: string) => void records.push(text), error() {} }
  const bus = new TestBus({ logger, retry: { maxRetries: 0 } })
  bus.on('a', function fails() {
    throw new Error('as the test wants')
  })
  await bus.publish('a', { secret: 'hunter2' })
  await bus.idle()
  while (!records.some((text) => text.includes('dead letter'))) await new Promise(setImmediate)
  assert.ok(!records.join().includes('hunter2'))
})
