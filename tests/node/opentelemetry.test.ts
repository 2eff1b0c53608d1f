// Spans of publish and of handling, as an exporter in memory sees them.
import assert from 'node:assert/strict'
import { after, before, test } from 'node:test'
import { context, SpanKind, SpanStatusCode, trace } from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import {
  BasicTracerProvider,
  InMemorySpanExporter,
  type ReadableSpan,
  SimpleSpanProcessor,
} from '@opentelemetry/sdk-trace-base'
import { Event } from 'polybus'
import { instrument } from 'polybus/opentelemetry'
import { TestBus } from 'polybus/testing'

const quiet = { warn() {}, error() {} }
const THERE = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'

before(() => context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable()))
after(() => context.disable())

class Spans {
  readonly exporter = new InMemorySpanExporter()
  readonly tracerProvider = new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(this.exporter)] })
  readonly tracer = this.tracerProvider.getTracer('test')

  named(name: string): ReadableSpan[] {
    return this.exporter.getFinishedSpans().filter((span) => span.name === name)
  }

  one(name: string): ReadableSpan {
    const [span, ...rest] = this.named(name)
    assert.ok(span && rest.length === 0, name)
    return span
  }
}

const ids = (span: ReadableSpan) => `${span.spanContext().traceId}-${span.spanContext().spanId}`
const parent = ({ parentSpanContext: of }: ReadableSpan) => of && `${of.traceId}-${of.spanId}`

test('a chain of events is one trace', async () => {
  const spans = new Spans()
  const bus = instrument(new TestBus(), spans)
  assert.equal(instrument(bus, spans), bus, 'and not twice')
  const inside: unknown[] = []
  bus.on('a', async function first(event) {
    inside.push(trace.getActiveSpan()?.spanContext().spanId)
    await bus.publish(event.child('b', 2))
  })
  bus.on('b', function last(event) {
    inside.push(event.meta.traceparent)
  })
  const { id } = await spans.tracer.startActiveSpan('request', async (span) => {
    try {
      return await bus.publish('a', 1)
    } finally {
      span.end()
    }
  })
  await bus.idle()
  await bus.close()
  const chain = ['request', 'publish a', 'process a', 'publish b', 'process b'].map((name) => spans.one(name))
  for (let at = 1; at < chain.length; at++) {
    assert.equal(parent(chain[at] as ReadableSpan), ids(chain[at - 1] as ReadableSpan), chain[at]?.name)
  }
  const [, publish, process, child] = chain as [ReadableSpan, ReadableSpan, ReadableSpan, ReadableSpan]
  assert.deepEqual([publish.kind, process.kind], [SpanKind.PRODUCER, SpanKind.CONSUMER])
  assert.deepEqual(inside, [process.spanContext().spanId, `00-${ids(child)}-01`])
  assert.deepEqual(publish.attributes, {
    'messaging.system': 'polybus',
    'messaging.operation.name': 'publish',
    'messaging.operation.type': 'send',
    'messaging.destination.name': 'a',
    'messaging.message.id': id,
    'messaging.message.conversation_id': id,
  })
})

test('errors are recorded, and attempts are siblings', async () => {
  const spans = new Spans()
  const retry = { maxRetries: 1, initialDelayMs: 1000, jitter: 'none' } as const
  const bus = instrument(new TestBus({ retry, logger: quiet }), spans)
  bus.on('a', function h(event) {
    if (event.delivery.attempt === 1) throw new RangeError('nobody there')
  })
  await bus.publish('a', 1)
  await bus.advance(1000)
  const [first, second] = spans.named('process a') as [ReadableSpan, ReadableSpan]
  assert.deepEqual([first.status.code, second.status.code], [SpanStatusCode.ERROR, SpanStatusCode.UNSET])
  assert.equal(first.attributes['error.type'], 'RangeError')
  assert.equal(first.events[0]?.name, 'exception')
  assert.deepEqual(
    [first, second].map(({ attributes }) => attributes['messaging.polybus.attempt']),
    [1, 2],
  )
  for (const span of [first, second]) assert.equal(parent(span), ids(spans.one('publish a')))
  await bus.close()
  await assert.rejects(bus.publish('a', 1), { code: 'bus_closed' })
  assert.equal(spans.named('publish a').at(-1)?.status.code, SpanStatusCode.ERROR)
})

test('an event of another trace stays there; each of many has its span', async () => {
  const spans = new Spans()
  const bus = instrument(new TestBus(), spans)
  await spans.tracer.startActiveSpan('relay', async (span) => {
    await bus.publish('a', 1, { traceparent: THERE, tracestate: 'vendor=x' })
    await bus.publish('b', 1, { traceparent: 'nonsense' })
    await bus.publishMany([1, 2, 3].map((payload) => Event.create('c', payload)))
    span.end()
  })
  const [a, , ...many] = bus.published()
  assert.equal(parent(spans.one('publish a')), THERE.slice(3, -3))
  assert.deepEqual([a?.meta.traceparent, a?.meta.tracestate], [`00-${ids(spans.one('publish a'))}-01`, 'vendor=x'])
  for (const span of [spans.one('publish b'), ...spans.named('publish c')]) {
    assert.equal(parent(span), ids(spans.one('relay')))
  }
  assert.equal(new Set(many.map(({ meta }) => meta.traceparent)).size, 3)
  await bus.close()
})

test('without an SDK the trace is passed on', async () => {
  const bus = instrument(new TestBus())
  await bus.publish('a', 1, { traceparent: THERE })
  await bus.publish('a', 2)
  assert.deepEqual(
    bus.published().map(({ meta }) => meta.traceparent),
    [THERE, undefined],
  )
  await bus.close()
})
