// Checked by tsc, never run: what users write must type-check, and what they must not write must not.
import {
  BatchFailed,
  Bus,
  closeOnSignals,
  type DeadLetter,
  Event,
  type Handler,
  PublishUnknown,
  type Receipt,
  type Received,
  Retry,
  type Subscription,
  version,
  withRetry,
} from 'polybus'
import { instrument } from 'polybus/opentelemetry'
import { TestBus } from 'polybus/testing'

export const right: string = version()
// @ts-expect-error: a version is a string
export const wrong: number = version()

interface OrderPlaced {
  orderId: string
}

// The examples of api.md.
export async function untyped(): Promise<void> {
  const bus = new Bus('sqlite:///events.db', { service: 'shop' })
  bus.on('order.*', { retry: { maxRetries: 5 }, timeoutMs: 5000 }, async function sendMail(event, ctx) {
    console.log(event.type, event.payload.orderId, event.meta.correlationId, event.delivery.attempt)
    ctx.signal.throwIfAborted()
  })
  await using running = await bus.start()
  const receipt = await running.publish('order.created', { orderId: 'o-1' }, { partitionKey: 'o-1' })
  const duplicate: boolean | undefined = receipt.duplicate
  await bus.subscribe('x', (event) => event.payload, {
    name: 'x',
    idempotent: (event) => (duplicate ? event.meta.id : null),
  })
  const sub = await bus.subscribe('*.*.delete', async function audit() {}, {
    name: 'audit',
    start: new Date(),
    ordered: true,
  })
  await sub.drain(1000)
  await sub.unsubscribe()
  for await (const event of bus.events('order.*')) console.log(event.payload.anything, receipt.id)
  await bus.close({ timeoutMs: 5 })
  const letters: DeadLetter[] = await bus.deadLetters.list({ group: 'shop/mail', since: Date.now(), limit: 10 })
  await bus.deadLetters.replay(letters[0]?.id ?? {})
  // @ts-expect-error: which ones must be said
  await bus.deadLetters.purge()
}

// A payload type for one handler; handlers that take less than they are given.
export function typedHandlers(bus: Bus): void {
  bus.on<OrderPlaced>('order.placed', function one(event) {
    const id: string = event.payload.orderId
    // @ts-expect-error: not a member of OrderPlaced
    event.payload.other
    void id
  })
  bus.on<OrderPlaced>('order.*', { concurrency: 2 }, async function two(event: Event<OrderPlaced>) {
    await bus.publish(event.child('x', { of: event.payload.orderId }))
    // @ts-expect-error: an event that was not delivered may have no delivery
    event.delivery.attempt
  })
  const handler: Handler<OrderPlaced> = (event) => event.payload.orderId
  bus.on('order.placed', handler)
  // @ts-expect-error: unknown option
  bus.on('a', { concurency: 1 }, handler)
  // @ts-expect-error: seconds have another name
  bus.on('a', { timeout: 1 }, handler)
}

// A map of events: what is published and what arrives agree.
interface Events {
  'order.placed': OrderPlaced
  'order.paid': { cents: number }
}
export async function mapped(): Promise<void> {
  const bus = new Bus<Events>('memory://', { service: 'shop' })
  await bus.publish('order.placed', { orderId: 'o-1' })
  // @ts-expect-error: the payload of another event
  await bus.publish('order.placed', { cents: 1 })
  // @ts-expect-error: not in the map
  await bus.publish('order.plcaed', { orderId: 'o-1' })
  bus.on('order.paid', function paid(event) {
    const cents: number = event.payload.cents
    void cents
  })
  bus.on('order.*', function any(event) {
    void event.payload
  })
  bus.on('order.paid', { batch: { size: 5, waitMs: 10 }, breaker: true }, function many(events) {
    const cents: number | undefined = events[0]?.payload.cents
    throw new BatchFailed({ [String(cents)]: new Error('no') })
  })
  // @ts-expect-error: a handler of batches needs the option
  await bus.subscribe('order.paid', (events: Received<{ cents: number }>[]) => events.length, { name: 'many' })
  await bus.subscribe('order.paid', (events) => events.length, { name: 'many', batch: true })
  // @ts-expect-error: misspelt
  await bus.subscribe('order.paid', () => {}, { name: 'x', breaker: { treshold: 5 } })
  const kit = new TestBus<Events>()
  // @ts-expect-error: the payload of another event
  await kit.publish('order.placed', { cents: 1 })
}

export async function requests(bus: Bus): Promise<void> {
  const reply = await bus.request<{ cents: number }>('quote', { n: 1 }, { userId: 'u' }, { timeoutMs: 5 })
  const cents: number = reply.payload.cents
  await bus.request(reply.child('quote', cents), { signal: AbortSignal.timeout(5) })
  const subscription: Subscription = await bus.respond<number>('quote', { name: 'q' }, (event) => event.payload + 1)
  // @ts-expect-error: an option of publish
  await bus.request('quote', 1, {}, { delayMs: 5 })
  void subscription
}

export async function rest(bus: Bus): Promise<void> {
  const event: Event<OrderPlaced> = Event.create(
    'order.placed',
    { orderId: 'o-1' },
    { userId: 'u', headers: { a: 'b' } },
  )
  const [entry] = await bus.history<OrderPlaced>('order.*', { since: new Date(), limit: 5, records: true })
  const orderId: string | undefined = entry?.event?.payload.orderId
  const status: 'pending' | 'processing' | 'completed' | 'failed' | undefined = entry?.records?.[0]?.status
  const { count, position } = await bus.replay('order.*', { group: 'shop/mail', progress: ({ done }) => done })
  console.log(orderId, status, count + 1, position?.length)
  // @ts-expect-error: a replay goes into one group
  await bus.replay('order.*', {})
  // @ts-expect-error: events are immutable
  event.type = 'other'
  // @ts-expect-error: unknown meta
  Event.create('a', 1, { correlation_id: 'x' })
  await bus.publishMany([event, { type: 'a', payload: 1, delayMs: 5 }])
  const charge = withRetry(async (order: OrderPlaced, cents: number) => `${order.orderId} ${cents}`, { maxRetries: 2 })
  const text: string = await charge({ orderId: 'o-1' }, 5)
  // @ts-expect-error: arguments are kept
  await charge('o-1')
  try {
    throw new Retry({ afterMs: 5 })
  } catch (error) {
    if (error instanceof PublishUnknown) console.log(error.code, error.failures[0]?.index, text)
  }
}

// Middleware.
export function middleware(bus: Bus<Events>): void {
  bus.use(async (event, next, { signal }) => {
    signal.throwIfAborted()
    const attempt: number = event.delivery.attempt
    void attempt
    return await next()
  })
  bus.use(async (event, next) => next(event.withMeta({ userId: 'u' })), { on: 'publish' })
  bus.use(
    async (_, next) => {
      const receipt: Receipt = await next()
      void receipt
    },
    { on: 'publish' },
  )
  // @ts-expect-error: what publish middleware returns is a receipt
  bus.use(async () => 5, { on: 'publish' })
  // @ts-expect-error: there is no such place
  bus.use(async () => {}, { on: 'subscribe' })
  const stop: () => void = closeOnSignals([bus], { timeoutMs: 1, before: async () => {} })
  stop()
  const shared: Bus<Events> = Bus.shared<Events>('memory://', { service: 'a', onDuplicate: 'replace' })
  void instrument(shared).publish('order.paid', { cents: 1 })
}
