/**
 * Trying again: what a handler may ask for, and the same arithmetic around any async function.
 *
 * @module
 */
import { setTimeout } from 'node:timers'
import { call, InvalidConfig } from './errors.js'
import { optionsText } from './json.js'
import { native } from './native.js'

/** Exponential back-off with a cap. */
export interface RetryPolicy {
  /** Retries after the first attempt: 3 means four attempts. Default 3. */
  readonly maxRetries?: number
  /** Delay before the first retry. Default 1000. */
  readonly initialDelayMs?: number
  /** No delay is longer. Default 30 000. */
  readonly maxDelayMs?: number
  /** Each delay is this many times the one before; at least 1. Default 2. */
  readonly factor?: number
  /** `full` spreads each delay between zero and itself. Default `full`. */
  readonly jitter?: 'full' | 'none'
}

const RETRY = Symbol.for('polybus.retry')
const REJECT = Symbol.for('polybus.reject')
const BATCH_FAILED = Symbol.for('polybus.batchFailed')

/** Thrown by a handler: try again after this long. Counts as an attempt. */
export class Retry extends Error {
  override readonly name = 'Retry'
  /** Milliseconds until the next attempt. */
  readonly afterMs: number

  constructor({
    afterMs,
    reason = 'the handler asked for another attempt',
    cause,
  }: { afterMs: number; reason?: string; cause?: unknown }) {
    super(reason, cause === undefined ? undefined : { cause })
    if (!(typeof afterMs === 'number' && afterMs >= 0 && Number.isFinite(afterMs))) {
      throw new InvalidConfig(`afterMs=${String(afterMs)} is not valid; give milliseconds, at least 0`)
    }
    this.afterMs = afterMs
    Object.defineProperty(this, RETRY, { value: true })
  }
}

/** Thrown by a handler: do not try again, keep it as a dead letter now. */
export class Reject extends Error {
  override readonly name = 'Reject'

  constructor(reason: string, options?: { cause?: unknown }) {
    super(reason, options)
    Object.defineProperty(this, REJECT, { value: true })
  }
}

/**
 * Thrown by a handler of batches: these of its events failed, by `event.meta.id`. All others are done.
 *
 * What went wrong with each may be anything that a handler throws, {@link Retry} and {@link Reject} among it. An id that
 * the batch does not have fails all events that are not named.
 */
export class BatchFailed extends Error {
  override readonly name = 'BatchFailed'
  /** By event id. */
  readonly errors: ReadonlyMap<string, unknown>

  /** @throws InvalidConfig for what is neither a map nor a plain object. */
  constructor(errors: ReadonlyMap<string, unknown> | Readonly<Record<string, unknown>>) {
    if (typeof errors !== 'object' || errors === null || Array.isArray(errors)) {
      throw new InvalidConfig('BatchFailed takes the errors by event.meta.id, as a Map or an object')
    }
    const byId = new Map(errors instanceof Map ? errors : Object.entries(errors))
    super(`${byId.size} events of the batch failed`)
    this.errors = byId
    Object.defineProperty(this, BATCH_FAILED, { value: true })
  }
}

/** Whether `error` is a {@link BatchFailed}, of this copy of the package or another. */
export function isBatchFailed(error: unknown): error is BatchFailed {
  return has(error, BATCH_FAILED)
}

/** Whether `error` is a {@link Retry}, of this copy of the package or another. */
export function isRetry(error: unknown): error is Retry {
  return has(error, RETRY) && typeof (error as Retry).afterMs === 'number'
}

/** Whether `error` is a {@link Reject}, of this copy of the package or another. */
export function isReject(error: unknown): error is Reject {
  return has(error, REJECT)
}

/** Never throws: what was thrown may be a proxy. */
function has(error: unknown, mark: symbol): boolean {
  try {
    return typeof error === 'object' && error !== null && mark in error
  } catch {
    return false
  }
}

/** Options of {@link withRetry}. */
export interface WithRetryOptions<A extends unknown[] = any[]> extends RetryPolicy {
  /** Called with the last error and the arguments before it is thrown. What it throws is thrown instead. */
  onDead?: (error: unknown, ...args: A) => unknown
  /** For messages. Default the function's name. */
  name?: string
  /** Told at `warn` about each attempt that failed. */
  logger?: { warn(message: string): void }
  /** Ends the wait for the next attempt; also a `signal` of the last argument, such as a handler's context. */
  signal?: AbortSignal
}

/**
 * Wraps an async function: tries again in this process as the policy says, and throws the last error when it gives up.
 * Inside a subscription prefer its `retry` option: a durable transport keeps a scheduled retry when the process dies.
 *
 * @throws InvalidConfig for a policy that is not valid, at once.
 */
export function withRetry<A extends unknown[], R>(
  handler: (...args: A) => R | PromiseLike<R>,
  options: WithRetryOptions<A> = {},
): (...args: A) => Promise<R> {
  if (typeof handler !== 'function') throw new InvalidConfig('withRetry needs a function')
  const { onDead, name = handler.name || 'function', logger, signal, ...policy } = options
  const text = optionsText(policy, 'retry')
  call(() => native.checkRetryPolicy(text))
  const wrapped = async (...args: A): Promise<R> => {
    const signals = [signal, (args.at(-1) as { signal?: unknown } | undefined)?.signal].filter(isSignal)
    for (let attempt = 1; ; attempt++) {
      try {
        return await handler(...args)
      } catch (error) {
        const computed = native.retryDelay(text, attempt, Math.random())
        const delay = isReject(error) || signals.some((signal) => signal.aborted) ? null : computed
        if (delay === null) {
          await onDead?.(error, ...args)
          throw error
        }
        const wait = isRetry(error) ? error.afterMs : delay
        logger?.warn(`${name}: attempt ${attempt} failed, again in ${Math.round(wait)} ms`)
        if (!(await sleep(wait, signals))) throw error
      }
    }
  }
  Object.defineProperty(wrapped, 'name', { value: name })
  return wrapped
}

function isSignal(value: unknown): value is AbortSignal {
  return typeof value === 'object' && value !== null && typeof (value as AbortSignal).addEventListener === 'function'
}

/** Resolves to false if a signal ended it. */
function sleep(ms: number, signals: AbortSignal[]): Promise<boolean> {
  return new Promise((resolve) => {
    const end = (whole: boolean) => {
      clearTimeout(timer)
      for (const signal of signals) signal.removeEventListener('abort', stop)
      resolve(whole)
    }
    const stop = () => end(false)
    // A timer cannot be longer than 2^31 - 1 ms; no policy gets there.
    const timer = setTimeout(() => end(true), Math.min(ms, 2 ** 31 - 1))
    for (const signal of signals) signal.addEventListener('abort', stop)
  })
}
