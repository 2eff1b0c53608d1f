/**
 * Where this JavaScript environment meets the core: wakes, takes, runs handlers, reports.
 *
 * The addon wakes us once for each burst; {@link Bridge.drain} pulls everything, and outcomes go back together. There is
 * one bridge for each environment (main thread or worker), kept in `globalThis` so that a reloaded module finds it.
 *
 * @module
 */
import { AsyncLocalStorage, AsyncResource } from 'node:async_hooks'
import { setInterval } from 'node:timers'
import { BusClosed, Failed, fromNative, HandlerTimeout, LeaseLost, PolybusError } from './errors.js'
import { deliver, type Received } from './event.js'
import { failureOf, payloadText } from './json.js'
import { native } from './native.js'
import { isBatchFailed, isReject, isRetry } from './retry.js'

/** What a handler is given beside the event. */
export interface HandlerContext {
  /** Aborted when the handler's outcome no longer counts: timeout, lost lease, close. The reason is the error. */
  readonly signal: AbortSignal
}

/** What a subscription runs. Return = done, throw = retry by policy, then dead letter. */
export type Handler<T = any> = (event: Received<T>, context: HandlerContext) => unknown

/** What a subscription with `batch` runs; {@link BatchFailed} fails some of the events. */
export type BatchHandler<T = any> = (events: Received<T>[], context: HandlerContext) => unknown

// As in bindings-node/src/bridge.rs.
const HEAD = 5
const JOB = 10
const CANCELLED = 3
const FINISHED = 3
/** Nobody destroys it: spares the garbage collector a hook. */
const MANUAL = { requireManualDestroy: true }
const MOST_JOBS = 256
const MOST_DONE = 1024
/** How an outcome is reported. */
const FAILED = 0
const RETRY = 1
const REJECTED = 2
const ABANDONED = 3

/** Where log records go: `console`, pino, winston and others fit. */
export interface Logger {
  debug?(message: string): void
  info?(message: string): void
  warn(message: string): void
  error(message: string): void
}

/** Thrown by our own handlers to hand a delivery back. */
export const HAND_BACK = Symbol.for('polybus.handBack')

/** Aborts a context's signal. */
export let abort: (context: Context, reason: number) => void

/** One running job. The controller is made on first touch: it costs more than the rest of the job. */
export class Context implements HandlerContext {
  #controller: AbortController | undefined
  #reason: Error | undefined

  static {
    abort = (context, reason) => {
      context.#reason = reasonOf(reason)
      context.#controller?.abort(context.#reason)
    }
  }

  constructor(
    /** @internal */ readonly runner: Runner,
    /** @internal */ readonly job: number,
    /** @internal For a handler of batches. */ readonly batch?: Gathering,
  ) {}

  /** Aborted when the handler's outcome no longer counts. */
  get signal(): AbortSignal {
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      if (this.#reason !== undefined) this.#controller.abort(this.#reason)
    }
    return this.#controller.signal
  }
}

function reasonOf(reason: number): Error {
  if (reason === 0) return new HandlerTimeout('the handler ran longer than its timeout')
  if (reason === 1) return new LeaseLost('another process has the delivery now; this outcome is refused')
  return new BusClosed('the bus is closing; the delivery was handed back')
}

/** The jobs of a batch, and their events. */
interface Gathering {
  readonly jobs: number[]
  readonly events: Received[]
}

/** A subscription, as the bridge sees it. */
export class Runner {
  /** Set when the subscription is made, like the next. */
  group = ''
  timeoutMs: number | null = null
  /** Tells the key of an event, in a subscription that asks for it. */
  key: ((event: Received) => unknown) | undefined
  readonly jobs = new Map<number, Context>()
  /** A batch that has not come over completely. */
  gathering: Gathering | undefined

  constructor(
    readonly id: number,
    readonly name: string,
    public handler: (given: any, context: HandlerContext) => unknown,
    /** What the handler returns answers requests. */
    readonly answers: boolean,
    readonly takesBatches = false,
  ) {}
}

interface Waiting {
  resolve(text: string): void
  reject(failure: unknown): void
}

/** The bridge of this environment. */
export class Bridge {
  readonly #native: InstanceType<typeof native.Bridge>
  readonly #numbers = new Float64Array(HEAD + JOB * MOST_JOBS)
  readonly #done = new Float64Array(2 * MOST_DONE)
  #doneCount = 0
  #flushing = false
  readonly #waiting = new Map<number, Waiting>()
  #lastKey = 0
  readonly #flushes = new Set<() => void>()
  readonly #runners = new Map<number, Runner>()
  #lastRunner = 0
  readonly #loggers = new Map<object, Logger>()
  #level = 'warn'
  /** Buses that modules share, by what names them; see {@link Bus.shared}. */
  readonly shared = new Map<string, unknown>()
  /** Ends what {@link closeOnSignals} began, by bus. */
  readonly closers = new WeakMap<object, () => void>()
  #holds = 0
  #holder: NodeJS.Timeout | undefined

  constructor() {
    this.#native = new native.Bridge(() => this.#drain(), isNode())
  }

  /** The bound object, for the constructor of a bus. */
  get native(): InstanceType<typeof native.Bridge> {
    return this.#native
  }

  /**
   * Runs an operation of the addon; resolves to its JSON text. The process lives until it is done.
   *
   * Rejects with what {@link fromNative} takes, so that the caller's own async function makes the error.
   */
  operation(start: (key: number) => string | null): Promise<string> | string {
    if (this.#flushes.size > 0) for (const flush of this.#flushes) flush()
    do this.#lastKey = (this.#lastKey + 1) >>> 0
    while (this.#waiting.has(this.#lastKey))
    const key = this.#lastKey
    const text = start(key)
    if (text !== null) return text
    this.hold()
    return new Promise<string>((resolve, reject) => this.#waiting.set(key, { resolve, reject }))
  }

  /** What waits for the end of this turn: `flush` is called before the next operation begins. */
  enter(flush: () => void): void {
    this.#flushes.add(flush)
  }

  /** It was called. */
  leave(flush: () => void): void {
    this.#flushes.delete(flush)
  }

  /** Drops an operation whose outcome nobody waits for any more; its promise stays pending. */
  forget(key: number): void {
    if (!this.#waiting.delete(key)) return
    this.#native.forget(key)
    this.release()
  }

  /** Keeps the process alive until {@link Bridge.release}. */
  hold(): void {
    if (this.#holds++ > 0) return
    // A referenced timer is what holds a Node process; this one never does anything.
    this.#holder ??= setInterval(() => {}, 2 ** 31 - 1)
    this.#holder.ref()
  }

  /** Ends one {@link Bridge.hold}. */
  release(): void {
    if (--this.#holds === 0) this.#holder?.unref()
  }

  /** A runner for a new subscription. */
  runner(name: string, handler: Runner['handler'], answers: boolean, takesBatches: boolean): Runner {
    do this.#lastRunner = (this.#lastRunner + 1) >>> 0
    while (this.#runners.has(this.#lastRunner))
    const runner = new Runner(this.#lastRunner, name, handler, answers, takesBatches)
    this.#runners.set(runner.id, runner)
    return runner
  }

  /** Forgets the runner of a subscription that has ended. */
  ended(runner: Runner): void {
    this.#runners.delete(runner.id)
    this.#native.ended(runner.id)
  }

  /** Called by the addon when something is ready. */
  #drain(): void {
    const numbers = this.#numbers
    let more = true
    while (more) {
      const text = this.#native.take(numbers)
      const finished = numbers[0] as number
      const cancelled = numbers[1] as number
      const jobs = numbers[2] as number
      more = numbers[3] === 1
      if (numbers[4] === 1) this.#log()
      let at = HEAD
      let start = 0
      for (let n = 0; n < finished; n++, at += FINISHED) {
        const end = start + (numbers[at + 2] as number)
        this.#finish(numbers[at] as number, numbers[at + 1] === 1, text.substring(start, end))
        start = end
      }
      for (let n = 0; n < cancelled; n++, at += CANCELLED) {
        const context = this.#runners.get(numbers[at] as number)?.jobs.get(numbers[at + 1] as number)
        if (context !== undefined) abort(context, numbers[at + 2] as number)
      }
      let runner: Runner | undefined
      for (let n = 0; n < jobs; n++, at += JOB) {
        const end = start + (numbers[at + 8] as number)
        const subscription = numbers[at] as number
        const job = numbers[at + 1] as number
        if (runner?.id !== subscription) runner = this.#runners.get(subscription)
        if (runner === undefined) {
          this.#native.fail(subscription, job, ABANDONED, 0, '', '', '', null)
        } else {
          const event = deliver(
            text.substring(start, end),
            numbers[at + 5] as number,
            numbers[at + 6] as number,
            numbers[at + 7] as number,
            numbers[at + 2] as number,
            numbers[at + 3] === 1,
            runner.group,
            numbers[at + 4] as number,
          )
          const more = numbers[at + 9] as number
          if (numbers[at + 2] === 0) this.#tellKey(runner, job, event)
          else if (more === 0) this.#run(runner, event, new Context(runner, job))
          else this.#gather(runner, job, event, more)
        }
        start = end
      }
    }
  }

  /** Hands records to the loggers of the buses of this environment; they do not say which bus they are about. */
  #log(): void {
    const records = this.#native.takeLogs()
    const loggers = this.#loggers.size > 0 ? [...new Set(this.#loggers.values())] : [console]
    for (let at = 0; at < records.length; at += 2) {
      const level = records[at] as keyof Logger
      for (const logger of loggers) {
        try {
          logger[level]?.(records[at + 1] as string)
        } catch {
          // A logger that fails must not stop deliveries.
        }
      }
    }
  }

  /** `owner`'s records go to `logger`, or no longer. */
  setLogger(owner: object, logger: Logger | undefined): void {
    if (logger === undefined) this.#loggers.delete(owner)
    else this.#loggers.set(owner, logger)
    const levels = [...this.#loggers.values()].map(levelOf)
    const level = (['debug', 'info'] as const).find((level) => levels.includes(level)) ?? 'warn'
    if (level !== this.#level) this.#native.setLogLevel(level)
    this.#level = level
  }

  #finish(key: number, ok: boolean, text: string): void {
    const waiting = this.#waiting.get(key)
    if (waiting === undefined) return
    this.#waiting.delete(key)
    this.release()
    if (ok) waiting.resolve(text)
    else waiting.reject(new Failed(text))
  }

  /** The core asks for the key of an event, and hands out the event again if it is to be handled. */
  #tellKey(runner: Runner, job: number, event: Received): void {
    try {
      const key = new AsyncResource('PolybusKey', MANUAL).runInAsyncScope(() => runner.key?.(event))
      if (key === undefined || key === null) this.#native.tellKey(runner.id, job)
      else if (isKey(key)) this.#native.tellKey(runner.id, job, String(key))
      else throw new TypeError(`idempotent told a key that is ${kindOf(key)}; return a string, an integer, or nothing`)
    } catch (error) {
      const { name, message, stack } = failureOf(error)
      this.#native.fail(runner.id, job, FAILED, 0, name, message, stack)
    }
  }

  /** One of a batch, of which `more` are still to come, this one included. */
  #gather(runner: Runner, job: number, event: Received, more: number): void {
    runner.gathering ??= { jobs: [], events: [] }
    runner.gathering.jobs.push(job)
    runner.gathering.events.push(event)
    if (more > 1) return
    const batch = runner.gathering
    runner.gathering = undefined
    const context = new Context(runner, job, batch)
    for (const other of batch.jobs) runner.jobs.set(other, context)
    // A copy: handlers may empty what they are given.
    this.#run(runner, [...batch.events], context)
  }

  #run(runner: Runner, given: Received | Received[], context: Context): void {
    if (context.batch === undefined) runner.jobs.set(context.job, context)
    try {
      // A context of its own: what one handler enters must not leak into the next.
      const result = new AsyncResource('PolybusHandler', MANUAL).runInAsyncScope(
        runner.handler,
        undefined,
        given,
        context,
      )
      if (isThenable(result)) {
        Promise.resolve(result).then(
          (value) => this.#returned(context, value),
          (error) => this.#failed(context, error),
        )
      } else {
        this.#returned(context, result)
      }
    } catch (error) {
      this.#failed(context, error)
    }
  }

  #returned(context: Context, value: unknown): void {
    const { runner, job } = context
    if (!runner.answers) {
      this.#succeeded(context)
      return
    }
    let text: string
    try {
      text = payloadText(value === undefined ? null : value)
    } catch (error) {
      this.#failed(context, error)
      return
    }
    runner.jobs.delete(job)
    this.#native.reply(runner.id, job, text)
  }

  #succeeded({ runner, job, batch }: Context): void {
    if (batch === undefined) this.#jobDone(runner, job)
    else for (const one of batch.jobs) this.#jobDone(runner, one)
  }

  #jobDone(runner: Runner, job: number): void {
    runner.jobs.delete(job)
    this.#done[2 * this.#doneCount] = runner.id
    this.#done[2 * this.#doneCount + 1] = job
    if (++this.#doneCount === MOST_DONE) this.#flush()
    if (!this.#flushing) {
      this.#flushing = true
      queueMicrotask(() => {
        this.#flushing = false
        this.#flush()
      })
    }
  }

  #flush(): void {
    if (this.#doneCount === 0) return
    const count = this.#doneCount
    this.#doneCount = 0
    this.#native.complete(this.#done, count)
  }

  #failed({ runner, job, batch }: Context, error: unknown): void {
    if (batch === undefined) {
      this.#jobFailed(runner, job, error)
      return
    }
    const said = batchOutcomes(batch.events, error)
    batch.jobs.forEach((one, index) => {
      const outcome = said[index]
      if (outcome === undefined) this.#jobDone(runner, one)
      else this.#jobFailed(runner, one, outcome.error)
    })
  }

  #jobFailed(runner: Runner, job: number, error: unknown): void {
    runner.jobs.delete(job)
    this.#flush()
    if (error === HAND_BACK) {
      this.#native.fail(runner.id, job, ABANDONED, 0, '', '', '', null)
      return
    }
    const { name, message, stack } = failureOf(error)
    const code = codeOf(error)
    if (isRetry(error)) this.#native.fail(runner.id, job, RETRY, error.afterMs, name, message, stack, code)
    else this.#native.fail(runner.id, job, isReject(error) ? REJECTED : FAILED, 0, name, message, stack, code)
  }
}

/** What a handler of batches that threw says of each event; nothing: it is done. */
function batchOutcomes(events: readonly Received[], error: unknown): ({ error: unknown } | undefined)[] {
  if (!isBatchFailed(error)) return events.map(() => ({ error }))
  const ids = new Set(events.map((event) => event.meta.id))
  const unknown = [...error.errors.keys()].find((id) => !ids.has(id))
  // Whoever names the wrong thing has not said which events are fine: none is taken for done.
  const message = `BatchFailed names ${JSON.stringify(unknown)}, which is no event of the batch: name them by event.meta.id`
  const rest = unknown === undefined ? undefined : { error: new TypeError(message) }
  return events.map(({ meta: { id } }) => (error.errors.has(id) ? { error: error.errors.get(id) } : rest))
}

/** The code of an error of ours. What a handler throws may be a trap. */
function codeOf(error: unknown): string | null {
  try {
    return error instanceof PolybusError ? error.code : null
  } catch {
    return null
  }
}

function isKey(key: unknown): boolean {
  return typeof key === 'string' || typeof key === 'bigint' || Number.isSafeInteger(key)
}

function kindOf(key: unknown): string {
  if (typeof key === 'number') return 'not a whole number'
  return isThenable(key) ? 'a promise' : `of type ${typeof key}`
}

/** The lowest level that `logger` wants; debug only if it says so, as pino does. */
function levelOf(logger: Logger): 'debug' | 'info' | 'warn' {
  const wants = (logger as { isLevelEnabled?: (level: string) => boolean }).isLevelEnabled?.bind(logger)
  if (wants === undefined) return logger.info === undefined ? 'warn' : 'info'
  return wants('debug') ? 'debug' : wants('info') ? 'info' : 'warn'
}

/** Whether the event loop is Node's own: others that call themselves Node end the process when an addon uses libuv. */
function isNode(): boolean {
  const { versions } = process
  return 'uv' in versions && !('bun' in versions || 'deno' in versions || 'electron' in versions)
}

/** Whether `value` can be awaited. A getter of the user may throw. */
export function isThenable(value: unknown): value is PromiseLike<unknown> {
  return typeof value === 'object' && value !== null && typeof (value as PromiseLike<unknown>).then === 'function'
}

// The wake must not run in the context of whoever happened to use the bus first, such as a request.
const atRoot = AsyncLocalStorage.snapshot()
const registry = globalThis as { [key: symbol]: Map<object, Bridge> | undefined }
const REGISTRY = Symbol.for('polybus.v1')

/**
 * The bridge of this environment, made on first use. A reloaded copy of this module finds the one there is; a second
 * installation of the package has an addon of its own, whose objects this one must not touch.
 */
export function bridge(): Bridge {
  registry[REGISTRY] ??= new Map()
  const bridges = registry[REGISTRY]
  let found = bridges.get(native)
  if (found === undefined) {
    found = atRoot(() => new Bridge())
    bridges.set(native, found)
  }
  return found
}

/** Awaits an operation; its failure becomes an error whose stack is the caller's. */
export async function run(start: (key: number) => string | null): Promise<string> {
  try {
    return await bridge().operation(start)
  } catch (failure) {
    throw fromNative(failure)
  }
}
