// Redis as a TypeScript program sees it: what it does, what is refused, what is promised. A test that harms its server
// starts one of its own; the others have a bus of their own on one server.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { EventEmitter, once } from 'node:events'
import { readFileSync } from 'node:fs'
import { after, test as always, before } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { inspect } from 'node:util'
import {
  AuthFailed,
  Bus,
  BusClosed,
  type BusOptions,
  ConnectionFailed,
  type Event,
  InvalidConfig,
  PayloadTooLarge,
  type PolybusError,
  Reject,
  Unsupported,
} from 'polybus'
import { Child, runs } from './support/child.ts'
import { type RedisServer, startRedis } from './support/redis.ts'

const transports: string[] = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8'))
const landed = transports.includes('redis')
const test = (name: string, run: () => Promise<void>) =>
  always(name, { skip: !landed && 'not in transports.json' }, run)

let shared: RedisServer
before(async () => {
  if (landed) shared = await startRedis({ appendfsync: 'everysec' })
})
after(() => shared?.[Symbol.asyncDispose]())

const make = (url: string, options: object) => new Bus(url, { service: 'shop', ...options } as BusOptions)
/** Buses of one name that no other test has. */
function place(url = shared.url): (options?: object) => Bus {
  const bus = randomUUID()
  return (options = {}) => make(url, { bus, retry: { maxRetries: 1, initialDelayMs: 5, jitter: 'none' }, ...options })
}

const says =
  (kind: new (...args: never[]) => PolybusError, ...parts: string[]) =>
  (error: PolybusError): boolean => {
    assert.ok(error instanceof kind, `${String(error)} is no ${kind.name}`)
    for (const part of parts) assert.ok(error.message.includes(part), `${error.message} does not say ${part}`)
    assert.ok(!error.message.includes('secret'), error.message)
    return true
  }

/** Events that arrived, and a way to wait for them. */
class Seen {
  readonly events: Event[] = []
  #arrived = new EventEmitter()

  readonly add = (event: Event): void => {
    this.events.push(event)
    this.#arrived.emit('event')
  }

  async payloads(count: number): Promise<unknown[]> {
    const deadline = { signal: AbortSignal.timeout(20_000) }
    while (this.events.length < count) await once(this.#arrived, 'event', deadline)
    return this.events.map((event) => event.payload)
  }
}

/** For states that no event announces. */
async function until(condition: () => Promise<boolean>): Promise<void> {
  const deadline = Date.now() + 20_000
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, `never: ${condition}`)
    await sleep(5)
  }
}

test('an event reaches each group once and each broadcast, with its facts', async () => {
  const another = place()
  const [one, two, shares, copies] = [another(), another(), new Seen(), new Seen()]
  for (const bus of [one, two]) {
    await bus.subscribe('order.*', shares.add, { name: 'mail' })
    await bus.subscribe('order.*', copies.add, { name: 'copy', broadcast: true })
  }
  const receipt = await one.publish('order.placed', 0, { partitionKey: 'k', headers: { a: 'ü ☃' } })
  assert.match(String(receipt.position), /^\d+-\d+$/)
  await one.publishMany(Array.from({ length: 19 }, (_, n) => ({ type: 'order.placed', payload: n + 1 })))
  const numbers = Array.from({ length: 20 }, (_, n) => n)
  await copies.payloads(40)
  assert.deepEqual(
    ((await shares.payloads(20)) as number[]).sort((a, b) => a - b),
    numbers,
  )
  const first = shares.events.find(({ meta }) => meta.id === receipt.id)
  assert.deepEqual([first?.meta.headers, first?.meta.partitionKey, first?.meta.source], [{ a: 'ü ☃' }, 'k', 'shop'])
  assert.deepEqual([first?.delivery?.attempt, first?.delivery?.group], [1, 'shop/mail'])
  await Promise.all([one.close(), two.close()])
})

test('what fails is retried, becomes a dead letter, and is replayed', async () => {
  await using bus = place()()
  const seen = new Seen()
  let broken = true
  function charge(event: Event): void {
    seen.add(event)
    if (event.payload === 'refused' && broken) throw new Reject('no such order')
    if (event.payload === 'fails' && broken) throw new TypeError('no')
  }
  await bus.subscribe('x', charge)
  await bus.publishMany(['fails', 'refused', 'fine'].map((payload) => ({ type: 'x', payload })))
  await until(async () => (await bus.deadLetters.count()) === 2)
  const letters = await bus.deadLetters.list()
  const facts = letters.map(({ event, reason, attempts, error }) => [event?.payload, reason, attempts, error.type])
  assert.deepEqual(facts.sort(), [
    ['fails', 'exhausted', 2, 'TypeError'],
    ['refused', 'rejected', 1, 'Reject'],
  ])
  broken = false
  assert.equal(await bus.deadLetters.replay(letters[0]?.id as string), 1)
  assert.equal(await bus.deadLetters.purge({}), 1)
  await seen.payloads(5)
  assert.deepEqual(seen.events[4]?.meta.id, letters[0]?.event?.meta.id)
})

test('a delayed event is not early, and holds up no other', async () => {
  await using bus = place()()
  const seen = new Seen()
  await bus.subscribe('x', seen.add, { name: 'x' })
  const began = performance.now()
  const receipt = await bus.publish('x', 'later', {}, { delayMs: 200 })
  assert.equal(receipt.position, undefined)
  await bus.publish('x', 'now')
  assert.deepEqual(await seen.payloads(2), ['now', 'later'])
  assert.ok(performance.now() - began >= 195)
})

test('a loop over events goes on where it stopped', async () => {
  const another = place()
  await using publisher = another()
  await publisher.publishMany([0, 1, 2].map((payload) => ({ type: 'x', payload })))
  const seen: unknown[] = []
  for (const stop of [0, 2]) {
    await using bus = another()
    for await (const event of bus.events('x', { name: 'loop', start: 'beginning' })) {
      if (seen.at(-1) !== event.payload) seen.push(event.payload)
      if (event.payload === stop) break
    }
  }
  assert.deepEqual(seen, [0, 1, 2])
})

test('URLs and options that can never work are refused at construction', async () => {
  const wrong: [string, object, string][] = [
    ['redi://:secret@localhost', {}, 'did you mean redis://'],
    ['redis+pubsb://:secret@localhost', {}, 'did you mean redis+pubsub://'],
    ['redis://:secret@localhost:99999', {}, 'port'],
    ['redis://:secret@localhost/events', {}, 'events'],
    ['rediss://:secret@localhost?ca_fil=ca.pem', {}, 'ca_file'],
    ['redis+sentinel://:secret@localhost:26379', {}, 'master'],
    ['redis://localhost', { confirm: 'dsk' }, 'disk'],
    ['redis://localhost', { partitions: 0 }, 'partitions'],
    ['redis://localhost', { partition: 2 }, 'partitions'],
  ]
  for (const [url, options, part] of wrong) assert.throws(() => make(url, options), says(InvalidConfig, part), url)
})

test('a server that is not there is named, and used when it is', async () => {
  await using server = await startRedis()
  await server.stop()
  const bus = make(server.url, {})
  for (const use of [() => bus.start(), () => bus.publish('x', 1)]) {
    await assert.rejects(use(), says(ConnectionFailed, server.address))
  }
  await server.restart()
  await bus.publish('x', 1)
  await bus.close()
})

test('a wrong password is refused, and told nowhere', async () => {
  await using server = await startRedis({ password: 'right-secret' })
  const records: string[] = []
  const log = (...parts: unknown[]) => void records.push(parts.map(String).join(' '))
  const logger = { debug: log, info: log, warn: log, error: log }
  for (const url of [`redis://:wrong-secret@${server.address}`, `redis://${server.address}`]) {
    const bus = make(url, { logger })
    await assert.rejects(bus.start(), says(AuthFailed))
    assert.ok(!`${bus.url} ${inspect(bus)} ${records}`.includes('secret'))
  }
  await using bus = make(server.url, { logger })
  await bus.publish('x', 1)
  assert.equal(bus.url, `redis://:***@${server.address}`)
})

test('a closed bus and a huge payload', async () => {
  const bus = place()({ maxPayloadBytes: 100 })
  await assert.rejects(bus.publish('x', 'y'.repeat(100)), says(PayloadTooLarge, '102', '100'))
  await bus.publish('x', 'y'.repeat(98))
  await bus.close()
  await assert.rejects(bus.publish('x', 1), says(BusClosed))
  await assert.rejects(bus.guarantees(), says(BusClosed))
})

test('guarantees are those of the server', async () => {
  for (const [appendfsync, durability] of [
    [undefined, 'memory'],
    ['everysec', 'process'],
    ['always', 'disk'],
  ] as const) {
    await using server = await startRedis(appendfsync && { appendfsync })
    await using bus = make(server.url, { durability: 'off' })
    const told = await bus.guarantees()
    assert.deepEqual([told.transport, told.delivery, told.durability], ['redis', 'at-least-once', durability])
    assert.ok(Object.values(told.capabilities).every(Boolean))
    assert.equal(told.details.version, (await server.version()).join('.'))
    assert.equal(told.details.maxmemory_policy, 'noeviction')
    if (!appendfsync) assert.ok(told.warnings.some((warning) => warning.includes('append')))
  }
})

test('durability can be required', async () => {
  await using weak = await startRedis()
  await assert.rejects(make(weak.url, { durability: 'required' }).start(), says(Unsupported, 'append'))
  await using strong = await startRedis({ appendfsync: 'always' })
  await using bus = make(strong.url, { durability: 'required' })
  await bus.publish('x', 1)
})

test('confirm on disk needs a server that can', async () => {
  await using bus = place()({ confirm: 'disk' })
  const [major, minor] = await shared.version()
  if (major < 7 || (major === 7 && minor < 2)) await assert.rejects(bus.publish('x', 1), says(Unsupported, '7.2'))
  else await bus.publish('x', 1)
})

test('partitions are fixed by the first', async () => {
  const another = place()
  await using bus = another({ partitions: 2 })
  await bus.publish('x', 1)
  for (const partitions of [4, 1])
    await assert.rejects(another({ partitions }).start(), says(InvalidConfig, 'partitions'))
})

test('pub/sub only broadcasts', async () => {
  const another = place(shared.pubsubUrl)
  await using bus = another()
  const told = await bus.guarantees()
  assert.deepEqual([told.transport, told.delivery], ['redis+pubsub', 'at-most-once'])
  const can = Object.entries(told.capabilities).flatMap(([name, can]) => (can ? name : []))
  assert.deepEqual(can.sort(), ['broadcast', 'crossProcess'])
  const seen = new Seen()
  for (const use of [
    () => bus.subscribe('x', seen.add, { name: 'x' }),
    () => bus.subscribe('x', seen.add, { name: 'x', broadcast: true, start: 'beginning' }),
    () => bus.publish('x', 1, {}, { delayMs: 1000 }),
    () => bus.deadLetters.list(),
  ]) {
    await assert.rejects(use(), says(Unsupported), String(use))
  }
  await bus.subscribe('x', seen.add, { name: 'x', broadcast: true })
  await using other = another()
  await other.publish('x', 7)
  assert.deepEqual(await seen.payloads(1), [7])
})

test('a process ends by itself on Redis as on other transports', async () => {
  await using server = await startRedis()
  assert.deepEqual(await runs('unused', server.url), [])
  assert.deepEqual(await runs('close', server.url), [{ saw: 1 }])
  assert.deepEqual(await runs('unref', server.url), ['subscribed'])
})

test('what a killed process held is delivered again', async () => {
  await using server = await startRedis()
  const child = new Child('wait', server.url)
  assert.deepEqual(await child.tells(), { attempt: 1 })
  child.process.kill('SIGKILL')
  assert.deepEqual(await child.ended, [null, 'SIGKILL'])
  assert.deepEqual(await runs('take', server.url), [{ attempt: 2, redelivered: true }])
})

test('a server that dies comes back with what it had, and subscriptions go on', async () => {
  await using server = await startRedis({ appendfsync: 'always' })
  await using bus = make(server.url, { leaseMs: 1000 })
  const seen = new Seen()
  const subscription = await bus.subscribe('x', seen.add, { name: 'x' })
  subscription.pause()
  await bus.publish('x', 1)
  await server.kill()
  await assert.rejects(bus.publish('x', 2), (error: PolybusError) => error.retryable)
  await server.restart()
  subscription.resume()
  assert.equal((await seen.payloads(1))[0], 1)
  await bus.publish('x', 3)
  await until(async () => seen.events.some((event) => event.payload === 3))
})
