/**
 * The handle of a running subscription, and the subscription that is read with `for await`.
 *
 * @module
 */
import { HAND_BACK, type Handler } from './bridge.js'
import { BusClosed } from './errors.js'
import type { Received } from './event.js'
import type { RetryPolicy } from './retry.js'

/** When a subscription stops taking events, and how it starts again. */
export interface BreakerOptions {
  /** So many failed calls of the handler … Default 5. */
  threshold?: number
  /** … within this time open the breaker: nothing is taken any more. Default 60 000. */
  windowMs?: number
  /** How long. Default 30 000. */
  recoveryMs?: number
  /** How many calls are tried then, at once; when all succeed it closes, when one fails it opens again. Default 1. */
  probes?: number
}

/** How events are gathered for a handler that takes an array. */
export interface BatchOptions {
  /** Most events of one batch. Default 100. */
  size?: number
  /** How long the first one waits for the others. Default 50. */
  waitMs?: number
}

/** Options of a subscription. */
export interface SubscribeOptions {
  /** Unique on the bus. Default the handler's name. */
  name?: string
  /** Durable group. Default `<service>/<name>`. */
  group?: string
  /** Handlers that run at once. Default the bus's `workerCount`, and 1 for a handler of batches. */
  concurrency?: number
  /** Deliveries taken ahead of a free handler. Default 0: nothing waits here that another process could do. */
  prefetch?: number
  /** Default the bus's policy. */
  retry?: RetryPolicy
  /** A handler that runs longer is told to stop, and its delivery is retried. Default none. */
  timeoutMs?: number
  /** Where a new group begins: with what is published from now on, the oldest event kept, or a time. Default `new`. */
  start?: 'new' | 'beginning' | Date | number
  /** Every process gets every event from now on; nothing is settled, retried or kept. Default false. */
  broadcast?: boolean
  /**
   * Events of one `partitionKey` are handled one at a time and in order, over all processes of the group; other keys go on.
   * All processes of a group must agree: `InvalidConfig`. Default false.
   */
  ordered?: boolean
  /** Keep what cannot be handled; otherwise it is logged, counted and dropped. Default true. */
  deadLetter?: boolean
  /** Keep what expires before a handler got it, too; otherwise it is dropped and counted as `expired`. Default false. */
  deadLetterExpired?: boolean
  /** Stop taking while the handler keeps failing; `true` for the defaults. Default none. */
  breaker?: BreakerOptions | boolean
  /** The handler takes an array of events; {@link BatchFailed} fails some of them. `true` for the defaults. */
  batch?: BatchOptions | boolean
  /**
   * Handle events of one key once, in the whole group. `true`: the event's `idempotencyKey`, or its id where it has none.
   * A function, not an async one, tells the key; where it returns nothing, the event's own counts. Default false.
   */
  idempotent?: boolean | ((event: Received) => string | number | bigint | null | undefined)
  /** How long a handled key is remembered. Default 7 days. */
  idempotentRetentionMs?: number
}

/** Options of a subscription whose handler takes batches. */
export type WithBatch = SubscribeOptions & { batch: BatchOptions | true }

/** Whether these are the options of a handler of batches. */
export function takesBatches({ batch = false }: SubscribeOptions): boolean {
  return batch !== false && batch !== null
}

/** Numbers of one subscription: its group's on the live store, then this process's own since it began. */
export interface SubscriptionStats {
  readonly name: string
  readonly group: string
  readonly pattern: string
  /** Not finished: `lag + inFlight + retrying`. */
  readonly pending: number
  /** Published and not yet taken by anyone of the group. */
  readonly lag: number
  /** Leased, in any process. */
  readonly inFlight: number
  readonly retrying: number
  /** Dead letters. */
  readonly dead: number
  readonly expired: number
  /** Age of the oldest event that is not finished. */
  readonly oldestAgeMs: number | null
  readonly running: number
  readonly buffered: number
  readonly completed: number
  readonly failed: number
  readonly retried: number
  readonly deadLettered: number
  readonly dropped: number
  readonly released: number
  readonly timedOut: number
  /** Absorbed by an idempotent subscription, because their key was handled before. */
  readonly duplicates: number
  readonly leasesLost: number
  /** Where the breaker stands; `null` without one. */
  readonly breaker: 'closed' | 'open' | 'half_open' | null
  /** Sum of handler times. */
  readonly busyMs: number
}

/** How long to wait for running handlers: milliseconds, also as `{ timeoutMs }`. */
export type DrainTimeout = number | { timeoutMs?: number }

/** What a subscription asks of its bus. */
export interface SubscriptionControl {
  pause(): void
  resume(): void
  drain(timeout: DrainTimeout | undefined): Promise<void>
  stats(): Promise<SubscriptionStats>
}

/** The longest wait for running handlers, unless told otherwise. */
export const DRAIN_MS = 10_000

/** A running subscription. */
export class Subscription {
  /** Unique on its bus. */
  readonly name: string
  /** Its durable group, which outlives this subscription and this process. */
  readonly group: string
  readonly pattern: string
  readonly #control: SubscriptionControl

  /** @internal */
  constructor(facts: { name: string; group: string; pattern: string }, control: SubscriptionControl) {
    this.name = facts.name
    this.group = facts.group
    this.pattern = facts.pattern
    this.#control = control
  }

  /** Takes nothing more until {@link Subscription.resume}; running handlers go on. */
  pause(): void {
    this.#control.pause()
  }

  /** Takes again. */
  resume(): void {
    this.#control.resume()
  }

  /**
   * Stops taking, waits for running handlers (10 seconds unless told otherwise), then hands the rest back without
   * counting the attempt. The subscription has ended then; its durable group stays and keeps collecting events.
   *
   * From inside a handler of its bus it begins and returns at once: a handler cannot wait for itself.
   */
  drain(timeout?: DrainTimeout): Promise<void> {
    return this.#control.drain(timeout)
  }

  /** The same. */
  unsubscribe(timeout?: DrainTimeout): Promise<void> {
    return this.#control.drain(timeout)
  }

  /** Its numbers. */
  stats(): Promise<SubscriptionStats> {
    return this.#control.stats()
  }
}

interface Offered<T> {
  event: Received<T>
  done(): void
  handBack(): void
}

/** Options of {@link Bus.events}. */
export type EventsOptions = Omit<SubscribeOptions, 'retry' | 'concurrency' | 'batch'>

/** A subscription read with `for await`: see {@link Bus.events}. */
export class Events<T = any> implements AsyncIterableIterator<Received<T>> {
  readonly #subscribe: (handler: Handler<T>) => Promise<Subscription>
  #subscription: Promise<Subscription> | undefined
  readonly #offered: Offered<T>[] = []
  #current: Offered<T> | undefined
  readonly #asking: { resolve(result: IteratorResult<Received<T>>): void; reject(error: unknown): void }[] = []
  #ended = false

  /** @internal */
  constructor(subscribe: (handler: Handler<T>) => Promise<Subscription>) {
    this.#subscribe = subscribe
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  /** Acknowledges the event before, and waits for the next. The first call subscribes. */
  async next(): Promise<IteratorResult<Received<T>>> {
    if (this.#ended) return { done: true, value: undefined }
    this.#current?.done()
    this.#current = undefined
    this.#subscription ??= this.#subscribe((event, context) => this.#offer(event, context.signal))
    await this.#subscription
    const offered = this.#offered.shift()
    if (offered !== undefined) return this.#give(offered)
    if (this.#ended) return { done: true, value: undefined }
    return new Promise((resolve, reject) => this.#asking.push({ resolve, reject }))
  }

  /** Called by `break`: hands the current event back and ends the subscription. */
  async return(): Promise<IteratorResult<Received<T>>> {
    this.#ended = true
    this.#current?.handBack()
    this.#current = undefined
    for (const offered of this.#offered.splice(0)) offered.handBack()
    for (const asking of this.#asking.splice(0)) asking.resolve({ done: true, value: undefined })
    const subscription = await this.#subscription?.catch(() => undefined)
    await subscription?.drain(0)
    return { done: true, value: undefined }
  }

  #offer(event: Received<T>, signal: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const offered = { event, done: resolve, handBack: () => reject(HAND_BACK) }
      signal.addEventListener('abort', () => this.#withdraw(offered, signal.reason), { once: true })
      if (this.#ended) return offered.handBack()
      const asking = this.#asking.shift()
      if (asking === undefined) this.#offered.push(offered)
      else asking.resolve(this.#give(offered))
    })
  }

  #give(offered: Offered<T>): IteratorResult<Received<T>> {
    this.#current = offered
    return { done: false, value: offered.event }
  }

  /** Its outcome no longer counts. When the bus is closing, the loop ends. */
  #withdraw(offered: Offered<T>, reason: unknown): void {
    const at = this.#offered.indexOf(offered)
    if (at >= 0) this.#offered.splice(at, 1)
    offered.handBack()
    if (reason instanceof BusClosed) this.end()
  }

  /** @internal The subscription has ended. */
  end(): void {
    this.#ended = true
    for (const asking of this.#asking.splice(0)) asking.resolve({ done: true, value: undefined })
  }
}
