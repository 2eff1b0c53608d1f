// The TypeScript actor: obeys one JSON command a line, tells what happens. See README.md.
import { appendFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor } from '@opentelemetry/sdk-trace-base'
import { Bus, type DeadLetter, Event, type PolybusError, type Subscription } from 'polybus'
import { instrument } from 'polybus/opentelemetry'

const tell = (value: unknown) => process.stdout.write(`${JSON.stringify(value)}\n`)
const text = (event: Event<unknown>) => Buffer.from(event.raw).toString()

const [url, busName] = process.argv.slice(2) as [string, string]
const bus = new Bus(url, { service: 'node', bus: busName, leaseMs: 1000 })
await bus.start()
tell({ ready: true })
const subscriptions: Subscription[] = []
const exporter = new InMemorySpanExporter()

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (command.do === 'publish') {
    const event = Event.create(command.type, Buffer.from(command.payload), command.meta)
    tell({ published: (await bus.publish(event)).id })
  } else if (command.do === 'subscribe') {
    const handler = async (event: Event<unknown>) => {
      if (command.record) {
        appendFileSync(command.record, `begin ${event.meta.partitionKey} ${event.payload}\n`)
        await sleep(10) // work
        appendFileSync(command.record, `end ${event.meta.partitionKey} ${event.payload}\n`)
        return
      }
      tell({ saw: event.toDict(), payload: text(event), attempt: event.delivery?.attempt })
      if (command.hang) await new Promise(() => {})
      if (command.fail) throw new Error('as the test wants ☃')
    }
    const retry = { maxRetries: 1, initialDelayMs: 5, jitter: 'none' } as const
    const { name, group, ordered, once } = command
    const options = { name, group, ordered, idempotent: once && text, retry }
    if (command.batch) {
      const together = async (events: Event<unknown>[]) => {
        tell({ batch: events.map((event) => [text(event), event.delivery?.attempt]) })
        if (events.some((event) => event.payload === command.hang)) await new Promise(() => {})
      }
      const batch = { size: command.batch, waitMs: 10_000 }
      subscriptions.push(await bus.subscribe(command.pattern, together, { ...options, batch }))
    } else subscriptions.push(await bus.subscribe(command.pattern, handler, options))
    tell({ subscribed: command.name })
  } else if (command.do === 'trace') {
    const spanProcessors = [new SimpleSpanProcessor(exporter)]
    instrument(bus, { tracerProvider: new BasicTracerProvider({ spanProcessors }) })
    tell({ tracing: true })
  } else if (command.do === 'spans') {
    // As Python's exporter writes them.
    const spans = exporter.getFinishedSpans().map((span) => ({
      name: span.name,
      context: { trace_id: `0x${span.spanContext().traceId}`, span_id: `0x${span.spanContext().spanId}` },
      parent_id: span.parentSpanContext ? `0x${span.parentSpanContext.spanId}` : null,
      attributes: span.attributes,
    }))
    tell({ spans })
  } else if (command.do === 'respond') {
    await bus.respond(command.pattern, { name: command.name }, async (event) => {
      tell({ saw: event.toDict() })
      if (command.hang) await new Promise(() => {})
      if (command.fail) throw new Error('as the test wants ☃')
      return { by: 'node', got: event.payload }
    })
    tell({ responding: command.name })
  } else if (command.do === 'request') {
    const request = Event.create(command.type, Buffer.from(command.payload))
    const refused = ({ code, remote }: PolybusError) => tell({ refused: { code, remote: remote?.message ?? null } })
    await bus
      .request(request, { timeoutMs: command.timeoutMs })
      .then((reply) => tell({ replied: { event: reply.toDict(), request: request.meta.id } }), refused)
  } else if (command.do === 'unsubscribe') {
    await Promise.all(subscriptions.map((subscription) => subscription.unsubscribe()))
    tell({ unsubscribed: true })
  } else if (command.do === 'dead') {
    tell({ dead: (await bus.deadLetters.list({ limit: 100 })).map(described) })
  } else if (command.do === 'replay') {
    tell({ replayed: await bus.deadLetters.replay({}) })
  } else if (command.do === 'again') {
    const { group, after } = command
    tell({ again: await bus.replay(command.pattern, { group, limit: command.limit, after }) })
  }
}
await bus.close()

function described(letter: DeadLetter) {
  if (!letter.event) throw new Error('undecodable')
  const { event, reason, attempts, group, error } = letter
  return { event: event.toDict(), payload: text(event), reason, attempts, group, error: error.message }
}
