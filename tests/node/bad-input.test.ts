// Bad input: a clear, typed error that says what to do, and nothing lost.
import assert from 'node:assert/strict'
import { mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import {
  Bus,
  BusClosed,
  type BusOptions,
  ConnectionFailed,
  DuplicateSubscription,
  Event,
  InvalidConfig,
  InvalidEvent,
  InvalidPattern,
  PayloadTooLarge,
  type PolybusError,
} from 'polybus'
import { TestBus } from 'polybus/testing'

const folder = mkdtempSync(join(tmpdir(), 'polybus-'))
const says =
  (kind: new (...args: never[]) => PolybusError, ...parts: string[]) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof kind, `${String(error)} is no ${kind.name}`)
    for (const part of parts) assert.ok(error.message.includes(part), `${error.message} does not say ${part}`)
    return true
  }
const make = (url: unknown, options: object) => () => new Bus(url as string, options as BusOptions)

test('URLs and options that can never work are refused at construction', () => {
  assert.throws(make('sqlit://x', { service: 'a' }), says(InvalidConfig, 'did you mean sqlite://'))
  assert.throws(make('events.db', { service: 'a' }), says(InvalidConfig, 'sqlite:///events.db'))
  assert.throws(make(7, { service: 'a' }), says(InvalidConfig, 'string'))
  assert.throws(make('memory://', {}), says(InvalidConfig, 'service'))
  assert.throws(make('memory://', { service: 'a b' }), says(InvalidConfig, 'a b'))
  assert.throws(make('memory://', { service: 'a', leaseMS: 1000 }), says(InvalidConfig, 'leaseMs'))
  assert.throws(make('memory://', { service: 'a', worker_count: 1 }), says(InvalidConfig, 'workerCount'))
  assert.throws(make('memory://', { service: 'a', leaseMs: 10 }), says(InvalidConfig, 'leaseMs', '1000'))
  assert.throws(make('memory://', { service: 'a', leaseMs: Number.NaN }), says(InvalidConfig, 'leaseMs'))
  assert.throws(make('memory://', { service: 'a', workerCount: '3' }), says(InvalidConfig, 'workerCount'))
  assert.throws(make('memory://', { service: 'a', mode: 'snyc' }), says(InvalidConfig, 'sync'))
  assert.throws(make('memory://', { service: 'a', retry: { maxRetry: 1 } }), says(InvalidConfig, 'maxRetries'))
  assert.throws(make('memory://', { service: 'a', logger: {} }), says(InvalidConfig, 'logger'))
})

test('a store that cannot be opened is an error of the first use, without the password', async () => {
  const missing = new Bus(`sqlite:///${folder}/no/such/folder/e.db`, { service: 'a' })
  await assert.rejects(missing.start(), (error: PolybusError) =>
    ['invalid_config', 'connection_failed'].includes(error.code),
  )
  const foreign = join(folder, 'foreign.db')
  writeFileSync(foreign, 'this is not a database, and it must not be touched')
  await assert.rejects(new Bus(`sqlite:///${foreign}`, { service: 'a' }).publish('a', 1), (error: PolybusError) =>
    ['invalid_config', 'connection_failed'].includes(error.code),
  )
  assert.throws(
    make('rabbits://user:secret@host/1', { service: 'a' }),
    (error: Error) => !error.message.includes('secret'),
  )
  void ConnectionFailed
})

test('event types are checked at publish', async () => {
  const bus = new TestBus()
  for (const type of ['', 'a\0b', 'a b', 'a'.repeat(201), '.a', 'a.', 'a..b', 'ä', '*', '\ud800']) {
    await assert.rejects(bus.publish(type, 1), says(InvalidEvent), JSON.stringify(type))
    assert.throws(() => Event.create(type, 1), says(InvalidEvent))
  }
  await assert.rejects(bus.publish(7 as never, 1), says(InvalidEvent))
  await assert.rejects(bus.publish(null as never, 1), says(InvalidEvent))
  assert.equal(bus.published().length, 0)
})

test('payloads that JSON would change are refused, by path', async () => {
  const bus = new TestBus()
  const cyclic: Record<string, unknown> = { a: [] }
  ;(cyclic.a as unknown[]).push(cyclic)
  class Money {
    constructor(readonly cents: number) {}
  }
  let deep: unknown = 1
  for (let level = 0; level < 1000; level++) deep = [deep]
  const bad: [unknown, string][] = [
    [undefined, 'payload is undefined'],
    [Number.NaN, 'payload is NaN'],
    [{ items: [0, { at: Number.POSITIVE_INFINITY }] }, 'payload.items[1].at is Infinity'],
    [{ n: 10n }, 'payload.n is a bigint'],
    [{ f: () => 1 }, 'payload.f is a function'],
    [[Symbol('s')], 'payload[0] is a symbol'],
    [cyclic, 'payload.a[0] refers back'],
    [{ m: new Map() }, 'payload.m is a Map'],
    [new Set(), 'payload is a Set'],
    [{ 'odd name': new Money(3) }, 'payload["odd name"] is a Money'],
    [deep, 'nested deeper than 64'],
    [{ toJSON: () => ({ x: Number.NaN }) }, 'payload.x is NaN'],
    [
      {
        get x() {
          throw new TypeError('no')
        },
      },
      'TypeError: no',
    ],
  ]
  for (const [payload, part] of bad) await assert.rejects(bus.publish('a', payload), says(InvalidEvent, part))
  for (const raw of ['{', '', 'NaN', '[1,]', '{"a":1}x']) {
    await assert.rejects(bus.publish('a', Buffer.from(raw)), says(InvalidEvent), raw)
  }
  await assert.rejects(bus.publish('a', Buffer.from([0x22, 0xff, 0x22])), says(InvalidEvent, 'UTF-8'))
  assert.equal(bus.published().length, 0)
})

test('what JSON can say is taken as it is', async () => {
  const bus = new TestBus()
  let deep: unknown = 1
  for (let level = 0; level < 64; level++) deep = [deep]
  const good: [unknown, unknown][] = [
    [null, null],
    [deep, deep],
    [{ at: new Date(0), gone: undefined }, { at: '1970-01-01T00:00:00.000Z' }],
    [Object.assign(Object.create(null), { a: 1 }), { a: 1 }],
    ['\ud800 \u2028 😀', '\ud800 \u2028 😀'],
    [-0, 0],
  ]
  for (const [payload, expected] of good) {
    await bus.publish('a', payload)
    assert.deepEqual(bus.published().at(-1)?.payload, expected)
  }
  const polluting = JSON.parse('{"__proto__":{"polluted":true},"constructor":1}')
  await bus.publish('a.__proto__', polluting)
  const payload = bus.published().at(-1)?.payload
  assert.ok(Object.hasOwn(payload, '__proto__'))
  assert.equal(({} as { polluted?: boolean }).polluted, undefined)
})

test('numbers that JavaScript cannot hold survive being passed on', async () => {
  const bus = new TestBus()
  const text = '{"id":12345678901234567890123,"price":0.10000000000000000000001,"big":1E400}'
  await bus.publish('in', Buffer.from(text))
  const [received] = bus.published('in')
  assert.ok(received)
  void received.payload // parsed, and so rounded, for whoever looks
  await bus.publish('out.raw', received.raw)
  await bus.publish(Event.create('out.child', received.raw))
  await bus.publish(received)
  for (const event of bus.published()) assert.equal(event.raw.toString(), text, event.type)
})

test('a payload that is too large says how large', async () => {
  const bus = new TestBus({ maxPayloadBytes: 100 })
  await assert.rejects(bus.publish('a', 'x'.repeat(100)), says(PayloadTooLarge, '102', '100'))
  await bus.publish('a', 'x'.repeat(98))
})

test('meta is checked', async () => {
  const bus = new TestBus()
  const wrong = (meta: unknown) => bus.publish('a', 1, meta as never)
  await assert.rejects(wrong({ correlation_id: 'x' }), says(InvalidEvent, 'correlation_id'))
  await assert.rejects(wrong({ headers: { a: 1 } }), says(InvalidEvent))
  await assert.rejects(wrong('x'), says(InvalidEvent, 'object'))
  await assert.rejects(wrong({ headers: { a: 10n } }), says(InvalidEvent, 'meta.headers.a'))
})

test('many at once: all, or an error that lists which were not', async () => {
  const bus = new TestBus()
  const events = [
    { type: 'a', payload: 1 },
    { type: 'b b', payload: 1 },
    { type: 'c', payload: Number.NaN },
  ]
  await assert.rejects(bus.publishMany(events), (error: PolybusError) => {
    assert.ok(error instanceof InvalidEvent)
    assert.deepEqual(
      error.failures.map(({ index }) => index),
      [2],
    )
    return true
  })
  await assert.rejects(bus.publishMany(events.slice(0, 2)), (error: PolybusError) => {
    assert.deepEqual(
      error.failures.map(({ index, error }) => [index, error.code]),
      [[1, 'invalid_event']],
    )
    return true
  })
  assert.equal(bus.published().length, 0)
  assert.deepEqual(await bus.publishMany([]), [])
  await assert.rejects(bus.publishMany({} as never), says(InvalidEvent))
})

test('patterns, handlers and options of a subscription are checked at once', async () => {
  const bus = new TestBus()
  const noop = () => {}
  assert.throws(() => bus.on('[', noop), says(InvalidPattern))
  assert.throws(() => bus.on('', noop), says(InvalidPattern))
  assert.throws(() => bus.on(7 as never, noop), says(InvalidConfig, 'string'))
  assert.throws(() => bus.on('a', 'noop' as never), says(InvalidConfig, 'function'))
  assert.throws(() => bus.on('a', {}, undefined as never), says(InvalidConfig, 'function'))
  assert.throws(() => bus.on('a', () => {}), says(InvalidConfig, 'name'))
  assert.throws(() => bus.on('a', { concurency: 1 } as never, noop), says(InvalidConfig, 'concurrency'))
  assert.throws(() => bus.on('a', { timeoutMs: -1 }, noop), says(InvalidConfig, 'timeoutMs'))
  assert.throws(() => bus.on('a', { start: 'yesterday' as never }, noop), says(InvalidConfig, 'start'))
  await assert.rejects(bus.subscribe('a', noop, { retry: { jitter: 'half' as never } }), says(InvalidConfig, 'full'))
  await bus.subscribe('a', noop, { name: 'one' })
  await assert.rejects(bus.subscribe('b', noop, { name: 'one' }), says(DuplicateSubscription, 'one'))
  bus.on('a', noop)
  assert.throws(() => bus.on('b', noop), says(DuplicateSubscription, 'noop'))
})

test('options of a publish are checked', async () => {
  const bus = new TestBus()
  const wrong = (options: unknown) => bus.publish('a', 1, {}, options as never)
  await assert.rejects(wrong({ delayMS: 5 }), says(InvalidConfig, 'delayMs'))
  await assert.rejects(wrong({ delayMs: -5 }), says(InvalidConfig, 'delayMs'))
  await assert.rejects(wrong({ mode: 'x' }), says(InvalidConfig, 'mode'))
})

test('after close everything is BusClosed', async () => {
  const bus = new Bus('memory://', { service: 'a' })
  const noop = () => {}
  await bus.publish('a', 1)
  await bus.close()
  await bus.close()
  for (const use of [
    () => bus.publish('a', 1),
    () => bus.publishMany([{ type: 'a', payload: 1 }]),
    () => bus.subscribe('a', noop),
    () => bus.stats(),
    () => bus.guarantees(),
    () => bus.deadLetters.list(),
    () => bus.publish('a', 1, {}, { mode: 'sync' }),
  ]) {
    await assert.rejects(use(), says(BusClosed, 'start()'))
  }
  await assert.rejects(bus.close({ timeoutMs: -1 }), says(InvalidConfig, 'timeoutMs'))
})

test('configuration: file, object, environment', async () => {
  const file = join(folder, 'bus.yaml')
  // biome-ignore lint/suspicious/noTemplateCurlyInString: the file's own syntax
  writeFileSync(file, 'url: memory://x\nservice: ${POLYBUS_TEST_NAME:-shop}\nworkerCount: 3\nlease: 2s\n')
  assert.equal(Bus.fromConfig(file).service, 'shop')
  assert.equal(Bus.fromConfig({ service: 'a', leaseMs: 2000, url: 'memory://y' }).url, 'memory://y')
  assert.throws(() => Bus.fromConfig({ service: 'a', leese: 2 }), says(InvalidConfig, 'lease'))
  assert.throws(() => Bus.fromConfig(join(folder, 'none.yaml')), says(InvalidConfig, 'none.yaml'))
  process.env.POLYBUS_SERVICE = 'env'
  process.env.POLYBUS_LEASE_MS = '1500'
  try {
    assert.equal(Bus.fromEnv().service, 'env')
  } finally {
    delete process.env.POLYBUS_SERVICE
    delete process.env.POLYBUS_LEASE_MS
  }
})
