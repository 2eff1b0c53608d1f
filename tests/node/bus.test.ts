// The bus as a TypeScript program sees it: publish, subscribe, iterate, close.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import { Bus, BusClosed, DuplicateSubscription, Event, InvalidConfig } from 'polybus'

const deadline = () => ({ signal: AbortSignal.timeout(10_000) })

test('an event reaches each matching subscription, with its facts', async () => {
  const arrived = new EventTarget()
  const bus = new Bus('memory://', { service: 'shop' })
  bus.on<{ n: number }>('order.*', function mail(event, context) {
    assert.equal(context.signal.aborted, false)
    arrived.dispatchEvent(new CustomEvent('event', { detail: event }))
  })
  await using running = await bus.start()
  assert.equal(running, bus)
  const first = once(arrived, 'event', deadline())
  const receipt = await bus.publish('order.created', { n: 1 }, { partitionKey: 'k', headers: { a: 'b' } })
  const [{ detail }] = (await first) as [CustomEvent<Event<{ n: number }>>]
  assert.equal(detail.type, 'order.created')
  assert.equal(detail.meta.id, receipt.id)
  assert.equal(detail.meta.source, 'shop')
  assert.deepEqual(detail.meta.headers, { a: 'b' })
  assert.deepEqual(detail.payload, { n: 1 })
  assert.deepEqual([detail.delivery?.attempt, detail.delivery?.group], [1, 'shop/mail'])
})

test('a handler needs a name, and a name is used once', async () => {
  await using bus = new Bus('memory://', { service: 'shop' })
  assert.throws(() => bus.on('a', () => {}), InvalidConfig)
  await bus.subscribe('a', () => {}, { name: 's' })
  await assert.rejects(
    bus.subscribe('b', () => {}, { name: 's' }),
    DuplicateSubscription,
  )
})

test('a closed bus says so, and starts again', async () => {
  const bus = new Bus('memory://', { service: 'shop' })
  await bus.publish('a', 1)
  await bus.close()
  await assert.rejects(bus.publish('a', 1), BusClosed)
  await bus.start()
  await bus.publish('a', 1)
  await bus.close()
})

test('an error has the stack of its caller', async () => {
  async function placeOrder(bus: Bus): Promise<void> {
    await bus.publish('order placed', 1)
  }
  await using bus = new Bus('memory://', { service: 'shop' })
  const error = await placeOrder(bus).then(undefined, (error) => error)
  assert.match(error.stack, /placeOrder/)
})

test('a handler added to a running bus sees the next publish', async () => {
  await using bus = await new Bus('memory://', { service: 'shop' }).start()
  const seen = new Promise((resolve) => {
    bus.on('late', function late(event) {
      resolve(event.payload)
    })
  })
  await bus.publish('late', 7)
  assert.equal(await seen, 7)
})

test('an event made without meta is what the core would make', () => {
  const first = Event.create('order.made', { n: 1 })
  const second = Event.create('order.made', { n: 1 })
  assert.notEqual(first.meta.id, second.meta.id)
  for (const { meta, type, payload, raw, delivery } of [first, second]) {
    assert.match(meta.id, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
    assert.ok(Math.abs(Date.parse(meta.timestamp) - Date.now()) < 60_000)
    assert.ok(Math.abs(Number.parseInt(meta.id.replace('-', '').slice(0, 12), 16) - Date.parse(meta.timestamp)) < 1000)
    assert.deepEqual(meta, { id: meta.id, timestamp: meta.timestamp, correlationId: meta.id, headers: {} })
    assert.deepEqual([type, payload, raw.toString(), delivery], ['order.made', { n: 1 }, '{"n":1}', undefined])
  }
  assert.equal(Event.decode(second.encode()).encode().toString(), second.encode().toString())
  const ids = Array.from({ length: 5000 }, () => Event.create('order.made', 1).meta.id)
  assert.equal(new Set(ids).size, ids.length)
  assert.ok(
    ids.slice(1, 50).every((id, at) => id > (ids[at] as string)),
    'ids are in order of time',
  )
})

test('many publishes at once keep their order, large batches among them', async () => {
  await using bus = new Bus('memory://', { service: 'shop', bufferSize: 10_000 })
  const seen: number[] = []
  const all = new Promise<void>((resolve) => {
    bus.on('n', { concurrency: 1 }, function count(event) {
      if (seen.push(event.payload) === 2002) resolve()
    })
  })
  await bus.start()
  const some = (start: number) => Array.from({ length: 1000 }, (_, n) => ({ type: 'n', payload: start + n }))
  const receipts = [
    bus.publishMany(some(0)),
    bus.publish('n', 1000),
    bus.publishMany(some(1001)),
    bus.publish('n', 2001),
  ]
  await Promise.all(receipts)
  await all
  assert.deepEqual(
    seen,
    Array.from({ length: 2002 }, (_, n) => n),
  )
})
