// What a registry of prom-client shows of a bus.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Bus, InvalidConfig, Reject } from 'polybus'
import { registerMetrics } from 'polybus/prometheus'
import { TestBus } from 'polybus/testing'
import { Registry } from 'prom-client'

test('attempts are told apart by how they ended, and buses by their labels', async () => {
  const registry = new Registry()
  const bus = new TestBus({ logger: { debug() {}, warn() {}, error() {} } })
  registerMetrics(bus, registry)
  bus.on('order.*', { name: 'h', retry: { jitter: 'none', initialDelayMs: 1000 } }, (event) => {
    if (event.payload === 'reject') throw new Reject('no')
    if (event.payload === 'retry' && event.delivery.attempt === 1) throw new Error('again')
  })
  for (const payload of ['fine', 'reject', 'retry']) await bus.publish('order.placed', payload)
  await bus.advance(1000)
  await bus.idle()
  const labels = 'service="test",bus="default"'
  const origin = `source="test",type="order.placed"`
  const text = await registry.metrics()
  const shows = (text: string, name: string, expected: Record<string, string | number>, value: number) => {
    const line = text.split('\n').find((line) => {
      const all = Object.entries(expected).every(([label, of]) => line.includes(`${label}="${of}"`))
      return line.startsWith(`polybus_${name}{`) && all
    })
    assert.equal(line?.split(' ').at(-1), String(value), `${name} ${JSON.stringify(expected)} in\n${text}`)
  }
  const group = { service: 'test', group: 'test/h', type: 'order.placed', source: 'test' }
  shows(text, 'events_published_total', { type: 'order.placed', source: 'test' }, 3)
  shows(text, 'events_processed_total', { ...group, status: 'completed' }, 2)
  shows(text, 'events_processed_total', { ...group, status: 'retried' }, 1)
  shows(text, 'events_processed_total', { ...group, status: 'dead_lettered' }, 1)
  shows(text, 'events_processing_duration_seconds_bucket', { ...group, le: '+Inf' }, 4)
  shows(text, 'events_processing_duration_seconds_count', group, 4)
  assert.ok(bus.metrics().includes(`polybus_events_published_total{${labels},${origin}} 3\n`))

  const other = new Bus('memory://', { service: 'other' })
  const forget = registerMetrics(other, registry)
  registerMetrics(other, registry) // changes nothing
  const both = await registry.metrics()
  assert.equal(both.split('# TYPE polybus_publish_failed_total counter\n').length, 2)
  for (const service of ['test', 'other']) shows(both, 'publish_failed_total', { service }, 0)
  forget()
  assert.ok(!(await registry.metrics()).includes('service="other"'))
  assert.throws(() => registerMetrics(bus, undefined as never), InvalidConfig)
  await bus.close()
})
