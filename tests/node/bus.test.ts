// The bus as a TypeScript program sees it: publish, subscribe, iterate, close.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { test } from 'node:test'
import { Bus, BusClosed, DuplicateSubscription, type Event, InvalidConfig } from 'polybus'

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
