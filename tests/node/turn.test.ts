// Publishes of one turn of the event loop cross to the core together: nobody may notice.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { Bus, type BusOptions, Event, InvalidEvent, PayloadTooLarge, type PolybusError } from 'polybus'
import { type RedisServer, startRedis } from './support/redis.ts'

const transports: string[] = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8'))
const folder = mkdtempSync(join(tmpdir(), 'polybus-turn-'))
let server: RedisServer | undefined
before(async () => {
  if (transports.includes('redis')) server = await startRedis({})
})
after(async () => {
  await server?.[Symbol.asyncDispose]()
  rmSync(folder, { recursive: true })
})

/** Runs a test on every transport that keeps a log, each time on a bus of its own. */
function everywhere(
  name: string,
  run: (bus: Bus, make: () => Bus) => Promise<void>,
  given: Partial<BusOptions> = {},
): void {
  for (const transport of ['memory', 'sqlite', 'redis'].filter((transport) => transports.includes(transport))) {
    test(`${name} (${transport})`, async () => {
      const url = { memory: `memory://${randomUUID()}`, sqlite: `sqlite:///${join(folder, `${randomUUID()}.db`)}` }
      const place = transport === 'redis' ? (server as RedisServer).url : url[transport as 'memory' | 'sqlite']
      const options = { service: 'test', bus: randomUUID(), ...given }
      const buses: Bus[] = []
      const make = () => {
        buses.push(new Bus(place, options))
        return buses.at(-1) as Bus
      }
      try {
        await run(await make().start(), make)
      } finally {
        for (const bus of buses) await bus.close({ timeoutMs: 0 })
      }
    })
  }
}

const stored = async (bus: Bus) => (await bus.history('*', { limit: 10_000 })).map(({ event }) => event?.payload)

everywhere('all kinds of publish keep the order of their calls, however many', async (bus) => {
  const calls: Promise<unknown>[] = []
  const wanted: number[] = []
  const next = () => wanted.push(wanted.length) - 1
  for (let round = 0; round < 150; round++) {
    for (let one = 0; one < 5; one++) calls.push(bus.publish('turn.one', next()))
    calls.push(bus.publish(Event.create('turn.event', next())))
    calls.push(bus.publish('turn.meta', next(), { userId: 'ü' }))
    if (round % 7 === 0) {
      calls.push(bus.publishMany([Event.create('turn.many', next()), { type: 'turn.many', payload: next() }]))
    }
  }
  const receipts = (await Promise.all(calls)).flat() as { id: string; position: string }[]
  assert.deepEqual(await stored(bus), wanted)
  assert.equal(new Set(receipts.map(({ id }) => id)).size, wanted.length)
  assert.equal(new Set(receipts.map(({ position }) => position)).size, wanted.length)
})

everywhere(
  'one that is refused takes no other with it',
  async (bus) => {
    const calls = [
      bus.publish('turn.a', 1),
      bus.publish('turn..b', 2),
      bus.publish('turn.c', 'x'.repeat(2000)),
      bus.publish('turn.d', 3, { nonsense: 1 } as object),
      bus.publish('turn.e', () => 4),
      bus.publish(5 as unknown as string, 5),
      bus.publish('turn.f', new TextEncoder().encode('{"no')),
      bus.publish('turn.g', 'größe'),
      bus.publish(Event.create('turn.h', 'größer')),
    ]
    const outcomes = await Promise.allSettled(calls)
    const kinds = outcomes.map((one) => (one.status === 'rejected' ? one.reason.constructor : undefined))
    const [invalid, none] = [InvalidEvent, undefined]
    assert.deepEqual(kinds, [none, invalid, PayloadTooLarge, invalid, invalid, invalid, invalid, none, none])
    const [refused] = outcomes.filter((one) => one.status === 'rejected') as { reason: PolybusError }[]
    assert.match(refused?.reason.stack ?? '', /turn\.test\.ts/)
    assert.deepEqual(await stored(bus), [1, 'größe', 'größer'])
  },
  { maxPayloadBytes: 1000 },
)

everywhere('a payload that publishes while it is read comes after what it published', async (bus) => {
  const inner: Promise<unknown>[] = []
  const toJSON = () => {
    if (inner.length === 0) for (let n = 0; n < 300; n++) inner.push(bus.publish('turn.inner', n))
    return 'outer'
  }
  await bus.publish('turn.outer', { toJSON })
  await Promise.all(inner)
  assert.deepEqual(await stored(bus), [...Array(300).keys(), 'outer'])
})

everywhere('what was published before a close is there', async (bus, make) => {
  await bus.publish('turn.first', 1) // so that it is connected
  const published = bus.publish('turn.last', 2)
  await bus.close()
  await published
  if (bus.url.startsWith('memory')) return
  assert.deepEqual(await stored(await make().start()), [1, 2])
})

everywhere('receipts say which was a duplicate', async (bus) => {
  const idempotencyKey = randomUUID()
  const [first, second, other] = await Promise.all([
    bus.publish('turn.once', 1, { idempotencyKey }),
    bus.publish('turn.once', 2, { idempotencyKey }),
    bus.publish('turn.once', 3),
  ])
  assert.deepEqual([first?.duplicate, second?.duplicate, other?.duplicate], [undefined, true, undefined])
  assert.equal(second?.id, first?.id)
  assert.deepEqual(await stored(bus), [1, 3])
})
