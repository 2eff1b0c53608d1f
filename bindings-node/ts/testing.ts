/**
 * The test kit: a bus in memory with a clock that tests move.
 *
 * @module
 */
import { AssertionError } from 'node:assert'
import { clearTimeout, setTimeout } from 'node:timers'
import { inspect, isDeepStrictEqual } from 'node:util'
import type { Draft, PublishOptions } from './batch.js'
import { bridge, type Handler, run } from './bridge.js'
import { type AnyEvents, Bus, type BusOptions, nativeOf, type Receipt, type TypeOf } from './bus.js'
import { call, InvalidConfig, RequestTimeout } from './errors.js'
import { type Cut, type Event, type MetaInput, type Received, uncut } from './event.js'
import type { RequestOptions } from './request.js'
import type { Events, EventsOptions, SubscribeOptions } from './subscription.js'

/** A handler that remembers. */
export interface MockHandler<T = any> {
  /** Whether it was called. */
  readonly called: boolean
  /** How often, retries included. */
  readonly callCount: number
  /** The events that it got, in order. */
  readonly events: readonly Received<T>[]
}

class Mock implements MockHandler {
  readonly events: Received[] = []

  get called(): boolean {
    return this.events.length > 0
  }

  get callCount(): number {
    return this.events.length
  }
}

/**
 * A bus in memory, with the same semantics as the others, and a clock that stands still until {@link TestBus.advance}.
 * It starts itself when it is used.
 */
export class TestBus<E extends object = AnyEvents> extends Bus<E> {
  #mocks = 0
  #keeping = false
  /** Mock handlers that are being subscribed. */
  #pending: Promise<unknown>[] = []

  constructor(options: Partial<BusOptions> = {}) {
    // Not in the type: only a test bus has it.
    const virtual = { virtualClock: true }
    super('memory://', { service: 'test', ...options, ...virtual })
    // A test that forgets to close must not hang.
    this.unref()
  }

  /** What this bus published so far, in order. */
  published<T = any>(pattern = '**'): Event<T>[] {
    const cuts: Cut[] = JSON.parse(call(() => nativeOf(this).published(pattern)))
    return cuts.map(uncut)
  }

  /**
   * The first event that matches, published before or after the call. Real time: the clock of the test does not count.
   *
   * @throws RequestTimeout when there is none within `timeoutMs`.
   */
  async waitFor<T = any>(pattern: string, timeoutMs = 5000): Promise<Event<T>> {
    const found = await within(timeoutMs, (key) => nativeOf(this).waitFor(key, pattern))
    if (found !== undefined) return uncut(JSON.parse(found))
    throw new RequestTimeout(`no event matched ${JSON.stringify(pattern)} within ${timeoutMs} ms; ${this.#seen()}`)
  }

  #seen(): string {
    const types = new Set(this.published().map((event) => event.type))
    return `published: ${[...types].join(', ') || 'nothing'}`
  }

  /** Subscribes a handler that remembers what it got. What is published from now on reaches it. */
  mockHandler<T = any>(pattern: string, options: SubscribeOptions & { handler?: Handler<T> } = {}): MockHandler<T> {
    const { handler, ...rest } = options
    const mock = new Mock()
    const record: Handler<T> = (event, context) => {
      mock.events.push(event)
      return handler?.(event, context)
    }
    this.#pending.push(this.subscribe(pattern, record, { name: `mock-${++this.#mocks}`, ...rest }))
    return mock
  }

  /**
   * The first event of that type (a pattern works too) that was published, with that payload if one is given.
   *
   * @throws AssertionError, which shows what was published instead.
   */
  assertPublished<T = any>(type: string, expected: { payload?: T } = {}): Event<T> {
    const events = this.published(type)
    const found = events.find((event) => !('payload' in expected) || isDeepStrictEqual(event.payload, expected.payload))
    if (found !== undefined) return found
    const message =
      events.length === 0
        ? `no ${type} was published; ${this.#seen()}`
        : `no ${type} with payload ${inspect(expected.payload)} was published; payloads: ${inspect(events.map((event) => event.payload))}`
    throw new AssertionError({
      message,
      actual: events.map((event) => event.payload),
      expected: expected.payload,
      operator: 'assertPublished',
      stackStartFn: this.assertPublished,
    })
  }

  /**
   * Moves time: retries, delays, expiries and timeouts that fall due happen before this resolves, each at its time.
   *
   * What was published before is handled first, and what falls due because of it within that time happens, too: a handler
   * that fails twice, with retries after a second, has succeeded after `advance(2000)`. A handler that does not end is
   * waited for briefly: its timeout may be what the test is about.
   */
  async advance(ms: number): Promise<void> {
    if (!(typeof ms === 'number' && ms >= 0 && Number.isFinite(ms))) {
      throw new InvalidConfig(`advance(${String(ms)}): give milliseconds, at least 0`)
    }
    await this.#ready()
    await run((key) => nativeOf(this).advance(key, ms))
  }

  /** Resolves when nothing is left to do at this moment of the bus's time. A paused subscription has nothing to do. */
  async idle(): Promise<void> {
    await this.#ready()
    await run((key) => nativeOf(this).idle(key))
  }

  /** As {@link TestBus.idle}, for at most `ms` of real time. */
  async #settle(ms: number): Promise<void> {
    await this.#ready()
    await within(ms, (key) => nativeOf(this).idle(key))
  }

  /** The next `times` attempts to handle a matching event fail before the handler sees it. */
  failNext(pattern: string, times = 1): void {
    call(() => nativeOf(this).failNext(pattern, times))
  }

  /** The next `times` matching events are published twice. */
  duplicateNext(pattern: string, times = 1): void {
    call(() => nativeOf(this).duplicateNext(pattern, times))
  }

  override events<K extends TypeOf<E>>(pattern: K, options?: EventsOptions): Events<E[K]>
  override events<T = any>(pattern: string, options?: EventsOptions): Events<T>
  override events(pattern: string, options?: EventsOptions): Events {
    const events = super.events(pattern, options)
    const next = events.next.bind(events)
    events.next = async () => {
      await this.#ready()
      const result = next()
      this.#keep()
      return await result
    }
    return events
  }

  override publish(event: Event, options?: PublishOptions): Promise<Receipt>
  override publish<K extends TypeOf<E>>(
    type: K,
    payload: E[K] | Uint8Array,
    meta?: MetaInput,
    options?: PublishOptions,
  ): Promise<Receipt>
  override async publish(...args: any[]): Promise<Receipt> {
    await this.#ready()
    const receipt = await (super.publish as (...args: any[]) => Promise<Receipt>)(...args)
    this.#keep()
    return receipt
  }

  override request<T = any>(event: Event, options?: RequestOptions): Promise<Event<T>>
  override request<T = any, K extends TypeOf<E> = TypeOf<E>>(
    type: K,
    payload?: E[K] | Uint8Array,
    meta?: MetaInput,
    options?: RequestOptions,
  ): Promise<Event<T>>
  override async request(...args: any[]): Promise<Event> {
    await this.#ready()
    return await (super.request as (...args: any[]) => Promise<Event>)(...args)
  }

  override async publishMany(events: readonly (Event | Draft)[]): Promise<Receipt[]> {
    await this.#ready()
    const receipts = await super.publishMany(events)
    this.#keep()
    return receipts
  }

  /** Subscriptions of a test bus do not hold the process; what was published does, until it is handled, for a while. */
  #keep(): void {
    if (this.#keeping) return
    this.#keeping = true
    const done = () => {
      this.#keeping = false
    }
    this.#settle(5000).then(done, done)
  }

  /** Mocks are subscribed in the background; whoever uses the bus next waits for them, and gets their errors. */
  async #ready(): Promise<void> {
    if (!nativeOf(this).isClosed) await this.start()
    while (this.#pending.length > 0) await Promise.all(this.#pending.splice(0))
  }
}

/** Awaits an operation, or forgets it after `ms` of real time. */
async function within(ms: number, start: (key: number) => string | null): Promise<string | undefined> {
  let key = 0
  const operation = run((given) => {
    key = given
    return start(given)
  })
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, ms, undefined)
  })
  try {
    const text = await Promise.race([operation, late])
    if (text === undefined) bridge().forget(key)
    return text
  } finally {
    clearTimeout(timer)
  }
}
