/**
 * The test kit: a bus in memory with a clock that tests move.
 *
 * @module
 */
import { AssertionError } from 'node:assert'
import { clearTimeout, setTimeout } from 'node:timers'
import { inspect, isDeepStrictEqual } from 'node:util'
import { bridge, type Handler, run } from './bridge.js'
import { type AnyEvents, Bus, type BusOptions, type Draft, nativeOf, type Receipt } from './bus.js'
import { call, InvalidConfig, RequestTimeout } from './errors.js'
import { type Cut, type Event, type Received, uncut } from './event.js'
import type { SubscribeOptions } from './subscription.js'

/** A handler that remembers. */
export interface MockHandler<T = any> {
  /** How often it was called, retries included. */
  readonly called: number
  /** The events that it got, in order. */
  readonly events: readonly Received<T>[]
}

class Mock implements MockHandler {
  readonly events: Received[] = []

  get called(): number {
    return this.events.length
  }
}

/**
 * A bus in memory, with the same semantics as the others, and a clock that stands still until {@link TestBus.advance}.
 */
export class TestBus<E extends object = AnyEvents> extends Bus<E> {
  #mocks = 0
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
  async waitFor<T = any>(pattern: string, timeoutMs = 1000): Promise<Event<T>> {
    let key = 0
    const found = run((given) => {
      key = given
      return nativeOf(this).waitFor(given, pattern)
    })
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => {
        bridge().forget(key)
        const seen = [...new Set(this.published().map((event) => event.type))].join(', ') || 'nothing'
        reject(
          new RequestTimeout(`no event matched ${JSON.stringify(pattern)} within ${timeoutMs} ms; published: ${seen}`),
        )
      }, timeoutMs)
    })
    try {
      return uncut(JSON.parse(await Promise.race([found, late])))
    } finally {
      clearTimeout(timer)
    }
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
   * The first event of that type that was published, with that payload if one is given.
   *
   * @throws AssertionError, which shows what was published instead.
   */
  assertPublished<T = any>(type: string, expected: { payload?: T } = {}): Event<T> {
    const events = this.published().filter((event) => event.type === type)
    const found = events.find((event) => !('payload' in expected) || isDeepStrictEqual(event.payload, expected.payload))
    if (found !== undefined) return found
    const message =
      events.length === 0
        ? `no ${type} was published; published: ${[...new Set(this.published().map((event) => event.type))].join(', ') || 'nothing'}`
        : `no ${type} with payload ${inspect(expected.payload)} was published; payloads: ${inspect(events.map((event) => event.payload))}`
    throw new AssertionError({
      message,
      actual: events.map((event) => event.payload),
      expected: expected.payload,
      operator: 'assertPublished',
      stackStartFn: this.assertPublished,
    })
  }

  /** Moves time: retries, delays, expiries and timeouts that fall due happen, and this resolves when they have. */
  async advance(ms: number): Promise<void> {
    await this.idle()
    if (!(typeof ms === 'number' && ms >= 0 && Number.isFinite(ms)))
      throw new InvalidConfig(`advance(${String(ms)}): give milliseconds, at least 0`)
    call(() => nativeOf(this).advance(ms))
    await this.idle()
  }

  /** Resolves when nothing is left to do at this moment of the bus's time. */
  async idle(): Promise<void> {
    await this.#ready()
    await run((key) => nativeOf(this).idle(key))
  }

  /** The next `times` attempts to handle a matching event fail before the handler sees it. */
  failNext(pattern: string, times = 1): void {
    call(() => nativeOf(this).failNext(pattern, times))
  }

  /** The next `times` matching events are published twice. */
  duplicateNext(pattern: string, times = 1): void {
    call(() => nativeOf(this).duplicateNext(pattern, times))
  }

  override async publish(...args: any[]): Promise<Receipt> {
    await this.#ready()
    return await (super.publish as (...args: any[]) => Promise<Receipt>)(...args)
  }

  override async publishMany(events: readonly (Event | Draft)[]): Promise<Receipt[]> {
    await this.#ready()
    return await super.publishMany(events)
  }

  /** Mocks are subscribed in the background; whoever uses the bus next waits for them, and gets their errors. */
  async #ready(): Promise<void> {
    while (this.#pending.length > 0) await Promise.all(this.#pending.splice(0))
  }
}
