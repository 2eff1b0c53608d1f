// Requests and replies as a TypeScript program sees them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, test as always, before } from 'node:test'
import {
  Bus,
  BusClosed,
  Event,
  HandlerError,
  InvalidConfig,
  NoResponder,
  NotFound,
  type PolybusError,
  RequestTimeout,
  Unsupported,
} from 'polybus'
import { TestBus } from 'polybus/testing'
import { type RedisServer, startRedis } from './support/redis.ts'

const transports: string[] = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8'))
const LONG = { timeoutMs: 30_000 }

let server: RedisServer
const folder = mkdtempSync(join(tmpdir(), 'polybus-requests-'))
before(async () => {
  server = await startRedis({})
})
after(async () => {
  await server[Symbol.asyncDispose]()
  rmSync(folder, { recursive: true })
})

/** Runs on every transport that processes share, with a maker of buses of one name. */
function test(name: string, run: (bus: () => Bus) => Promise<void>): void {
  for (const transport of ['sqlite', 'redis'].filter((known) => transports.includes(known))) {
    always(`${transport}: ${name}`, async () => {
      const id = randomUUID()
      const url = transport === 'redis' ? server.url : `sqlite:///${join(folder, id)}.db`
      await run(() => new Bus(url, { service: 'shop', bus: id }))
    })
  }
}

test('a reply is an event of the chain', async (make) => {
  await using asking = make()
  await using answering = make()
  const subscription = await answering.respond<{ n: number }>('quote.*', async function quote(event) {
    return { total: event.payload.n * 2, user: event.meta.userId }
  })
  assert.equal(subscription.group, 'shop/quote')
  const reply = await asking.request('quote.get', { n: 21 }, { userId: 'u' }, LONG)
  assert.deepEqual(reply.payload, { total: 42, user: 'u' })
  assert.equal(reply.type, 'quote.get')
  const request = Event.create('quote.get', { n: 1 }, { correlationId: 'c' })
  const { meta } = await asking.request(request, LONG)
  assert.deepEqual([meta.correlationId, meta.causationId], ['c', request.meta.id])
})

test('nobody answers until somebody does', async (make) => {
  await using asking = make()
  await using answering = make()
  await assert.rejects(asking.request('quote'), NoResponder)
  const responder = await answering.respond('quote', { name: 'q' }, () => undefined)
  assert.equal((await asking.request('quote', 1, {}, LONG)).payload, null)
  await responder.unsubscribe()
  await assert.rejects(asking.request('quote'), NoResponder)
})

test('errors arrive at once, as what they were', async (make) => {
  await using asking = make()
  await using answering = make()
  await answering.respond('quote', function fails(event) {
    if (event.payload === 'ours') throw new NotFound('no such quote')
    if (event.payload === 'bigint') return 1n
    throw new RangeError('sku ☃')
  })
  const remote = async (payload: unknown) => {
    const answer = asking.request('quote', payload, {}, LONG)
    const error: PolybusError = await answer.then(
      () => assert.fail('it was answered'),
      (error) => error,
    )
    assert.ok(error instanceof HandlerError)
    return error.remote
  }
  assert.deepEqual(await remote(1), { type: 'RangeError', message: 'sku ☃', code: null })
  assert.deepEqual(await remote('ours'), { type: 'NotFound', message: 'no such quote', code: 'not_found' })
  assert.equal((await remote('bigint'))?.code, 'invalid_event')
  assert.equal(await answering.deadLetters.count(), 0)
})

test('a timeout, an abort and close end the wait', async (make) => {
  const asking = make()
  const answering = make()
  let began = () => {}
  await answering.respond('quote', async function hangs() {
    began()
    await new Promise(() => {})
  })
  await assert.rejects(asking.request('quote', 1, {}, { timeoutMs: 100 }), RequestTimeout)
  const gone = new Error('the user left')
  const abort = new AbortController()
  let running = new Promise<void>((resolve) => {
    began = resolve
  })
  const aborted = assert.rejects(asking.request('quote', 1, {}, { ...LONG, signal: abort.signal }), gone)
  await running
  abort.abort(gone)
  await aborted
  await assert.rejects(asking.request('quote', 1, {}, { signal: abort.signal }), gone)
  running = new Promise<void>((resolve) => {
    began = resolve
  })
  const closed = assert.rejects(asking.request('quote', 1, {}, LONG), BusClosed)
  await running
  await asking.close()
  await closed
  await answering.close({ timeoutMs: 0 })
})

test('many at once, and inside a handler', async (make) => {
  await using asking = make()
  await using answering = make()
  await answering.respond<number>('inner', { concurrency: 100 }, function inner(event) {
    return event.payload * 2
  })
  await answering.respond<number>('outer', { concurrency: 100 }, async function outer(event) {
    const reply = await answering.request<number>(event.child('inner', event.payload), LONG)
    assert.equal(reply.meta.correlationId, event.meta.correlationId)
    return reply.payload + 1
  })
  const numbers = Array.from({ length: 300 }, (_, n) => n)
  const replies = await Promise.all(numbers.map((n) => asking.request('outer', n, {}, LONG)))
  assert.deepEqual(
    replies.map((reply) => reply.payload),
    numbers.map((n) => 2 * n + 1),
  )
})

always('a test bus starts itself, and its clock ends a request', async () => {
  await using bus = new TestBus()
  let began = () => {}
  const running = new Promise<void>((resolve) => {
    began = resolve
  })
  await bus.respond('quote', async function quote(event) {
    if (event.payload === 1) return 7
    began()
    return await new Promise(() => {})
  })
  assert.equal((await bus.request('quote', 1)).payload, 7)
  const late = assert.rejects(bus.request('quote', 2, {}, { timeoutMs: 60_000 }), RequestTimeout)
  await running
  await bus.advance(61_000)
  await late
  await bus.close({ timeoutMs: 0 })
})

always('what is refused', async () => {
  await using bus = new Bus('memory://', { service: 'shop' })
  await assert.rejects(
    bus.respond('quote', { name: 'q', broadcast: true }, () => 1),
    InvalidConfig,
  )
  await assert.rejects(bus.request('quote', 1, {}, { timeoutMs: 0 }), InvalidConfig)
  await assert.rejects(bus.request('quote', 1, {}, { timeout: 5 } as object), /timeoutMs/)
  assert.ok((await bus.guarantees()).capabilities.request)
  await using lossy = new Bus(server.url.replace('redis://', 'redis+pubsub://'), { service: 'shop' })
  await assert.rejects(lossy.request('quote'), Unsupported)
  await assert.rejects(
    lossy.respond('quote', { name: 'q' }, () => 1),
    Unsupported,
  )
})
