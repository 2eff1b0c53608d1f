/**
 * OpenTelemetry for a bus: spans for publish and for handling, in one trace across processes and languages.
 *
 * Needs the package `@opentelemetry/api`; nothing else of this package does.
 *
 * @module
 */
import { createRequire } from 'node:module'
import type * as Api from '@opentelemetry/api'
import { HAND_BACK } from './bridge.js'
import type { Bus } from './bus.js'
import { InvalidConfig } from './errors.js'
import type { Event, MetaInput } from './event.js'
import { failureOf } from './json.js'
import { native } from './native.js'

/** Options of {@link instrument}. */
export interface InstrumentOptions {
  /** Default the global provider. */
  tracerProvider?: Api.TracerProvider
}

const instrumented = new WeakSet<object>()

/**
 * Adds middleware that traces the bus, and returns the bus. The first middleware is the outermost: call it first.
 *
 * Publishing makes a PRODUCER span and writes `traceparent` and `tracestate` into the event's meta; handling makes a
 * CONSUMER span that continues that trace. A second call does nothing.
 *
 * @throws InvalidConfig that says what to install.
 */
export function instrument<B extends Bus<any>>(bus: B, { tracerProvider }: InstrumentOptions = {}): B {
  const api = load()
  if (instrumented.has(bus)) return bus
  instrumented.add(bus)
  const { context, trace, SpanKind } = api
  const tracer = (tracerProvider ?? trace).getTracer('polybus', native.version())

  /** The current context, with the span that the event names. */
  const carried = (event: Event) => {
    const named = parse(api, event)
    return named === undefined ? context.active() : trace.setSpanContext(context.active(), named)
  }

  const run = async <T>(
    kind: Api.SpanKind,
    [name, type]: readonly [string, string],
    event: Event,
    parent: Api.Context,
    more: Api.Attributes,
    inside: (span: Api.Span) => T | PromiseLike<T>,
  ): Promise<T> => {
    const attributes = { ...facts(name, type, event), ...more }
    const span = tracer.startSpan(`${name} ${event.type}`, { kind, attributes }, parent)
    try {
      return await context.with(trace.setSpan(parent, span), () => inside(span))
    } catch (error) {
      if (error !== HAND_BACK) record(api, span, error)
      throw error
    } finally {
      span.end()
    }
  }

  bus.use(
    function tracePublish(event, next) {
      const here = trace.getSpanContext(context.active())
      const named = parse(api, event)
      // An event that was made in another trace, perhaps long ago, stays there; in the same one, the span that is active
      // now is the nearer parent.
      const parent = named !== undefined && named.traceId !== here?.traceId ? carried(event) : context.active()
      return run(SpanKind.PRODUCER, ['publish', 'send'], event, parent, {}, (span) => {
        const meta = format(api, span.spanContext())
        return next(meta === undefined ? event : event.withMeta(meta))
      })
    },
    { on: 'publish' },
  )
  bus.use(function traceHandle(event, next) {
    const more = {
      'messaging.consumer.group.name': event.delivery.group,
      'messaging.polybus.attempt': event.delivery.attempt,
    }
    return run(SpanKind.CONSUMER, ['process', 'process'], event, carried(event), more, () => next())
  })
  return bus
}

/** When it is needed, and not before: a bus without tracing needs no package for it. */
function load(): typeof Api {
  try {
    return createRequire(import.meta.url)('@opentelemetry/api')
  } catch (cause) {
    throw new InvalidConfig('polybus/opentelemetry needs the OpenTelemetry API: npm install @opentelemetry/api', {
      cause,
    })
  }
}

/** The attributes of the semantic conventions for messaging. */
function facts(name: string, type: string, { type: destination, meta }: Event): Api.Attributes {
  return {
    'messaging.system': 'polybus',
    'messaging.operation.name': name,
    'messaging.operation.type': type,
    'messaging.destination.name': destination,
    'messaging.message.id': meta.id,
    ...(meta.correlationId === undefined ? {} : { 'messaging.message.conversation_id': meta.correlationId }),
  }
}

function record(api: typeof Api, span: Api.Span, error: unknown): void {
  const { name, message } = failureOf(error)
  span.recordException(error instanceof Error ? error : { name, message })
  span.setStatus({ code: api.SpanStatusCode.ERROR, message: `${name}: ${message}` })
  span.setAttribute('error.type', name)
}

/** W3C trace context: version, trace id, span id, flags. A later version may have more after a hyphen. */
const TRACEPARENT = /^(?!ff)([\da-f]{2})-([\da-f]{32})-([\da-f]{16})-([\da-f]{2})(-.*)?$/

function parse(api: typeof Api, { meta }: Event): Api.SpanContext | undefined {
  const [, version, traceId = '', spanId = '', flags = '', more] = TRACEPARENT.exec(meta.traceparent ?? '') ?? []
  const found: Api.SpanContext = { traceId, spanId, traceFlags: Number.parseInt(flags, 16), isRemote: true }
  if (meta.tracestate !== undefined) found.traceState = api.createTraceState(meta.tracestate)
  const fits = version !== '00' || more === undefined
  return fits && api.isSpanContextValid(found) ? found : undefined
}

function format(api: typeof Api, span: Api.SpanContext): MetaInput | undefined {
  if (!api.isSpanContextValid(span)) return undefined
  const flags = span.traceFlags.toString(16).padStart(2, '0')
  const tracestate = span.traceState?.serialize()
  return {
    traceparent: `00-${span.traceId}-${span.spanId}-${flags}`,
    ...(tracestate ? { tracestate } : {}),
  }
}
