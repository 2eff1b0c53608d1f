/**
 * The bus.
 *
 * @module
 */
import { Batch, type Draft, eventsOf, type PublishOptions } from './batch.js'
import { type BatchHandler, bridge, type Handler, type Logger, run } from './bridge.js'
import { DeadLetters } from './dead-letters.js'
import { reloads } from './development.js'
import { call, DuplicateSubscription, InvalidConfig, InvalidEvent } from './errors.js'
import { type Cut, Event, type MetaInput, uncut, uncutDelivered } from './event.js'
import {
  entries,
  type HistoryEntry,
  type HistoryOptions,
  queryText,
  type ReplayOptions,
  type ReplayResult,
  replayAll,
} from './history.js'
import { describe, describeValue, optionsText } from './json.js'
import {
  added,
  checkMiddleware,
  type HandleMiddleware,
  type PublishMiddleware,
  publishManyThrough,
  publishThrough,
  type UseOptions,
} from './middleware.js'
import { native } from './native.js'
import { type AnyEvents, type BusOptions, checkTimeout, type TypeOf } from './options.js'
import { type RequestOptions, request } from './request.js'
import {
  DRAIN_MS,
  Events,
  type EventsOptions,
  type SubscribeOptions,
  type Subscription,
  takesBatches,
  type WithBatch,
} from './subscription.js'
import { type Registration, Subscriptions } from './subscriptions.js'
import { handleNow, isSync } from './sync.js'
import type { BusStats, Guarantees, Receipt } from './views.js'

export type { AnyEvents, BusOptions, TypeOf } from './options.js'
export type { BusStats, Guarantees, Receipt } from './views.js'

/** A runtime that lacks the symbol cannot say `await using`, but what compilers make of it finds this one. */
const asyncDispose = Symbol.asyncDispose ?? Symbol.for('Symbol.asyncDispose')

/** The bound object of a bus, for the test kit. */
export let nativeOf: (bus: Bus<any>) => InstanceType<typeof native.NativeBus>

/**
 * An event bus. Nothing is opened until it is used.
 *
 * `E` may map event types to payloads (`new Bus<{ 'order.placed': OrderPlaced }>(…)`): `publish` then takes only these,
 * and `on` with an exact type knows the payload.
 */
export class Bus<E extends object = AnyEvents> {
  readonly #native: InstanceType<typeof native.NativeBus>
  readonly #sync: boolean
  readonly #logger: Logger | undefined
  readonly #replaces: boolean
  readonly #registered: Registration[] = []
  /** Subscriptions that {@link Bus.on} makes on a running bus; publish waits for them. */
  readonly #late = new Set<Promise<unknown>>()
  readonly #subscriptions: Subscriptions
  #publishing: readonly PublishMiddleware[] = []
  #running = false
  /** Dead letters: list, get, replay, purge, count. */
  readonly deadLetters: DeadLetters

  static {
    nativeOf = (bus) => bus.#native
    Object.defineProperty(Bus.prototype, asyncDispose, { value: dispose, writable: true, configurable: true })
  }

  /**
   * @param url `sqlite:///path`, `memory://` or `memory://name`; default `memory://`.
   * @throws InvalidConfig for a URL or option that can never work.
   */
  constructor(url?: string, options?: BusOptions) {
    const { logger, ...rest } = (options ?? {}) as BusOptions
    if (logger !== undefined && (typeof logger?.warn !== 'function' || typeof logger.error !== 'function')) {
      throw new InvalidConfig('logger needs the methods warn and error')
    }
    if (url !== undefined && url !== null && typeof url !== 'string') {
      throw new InvalidConfig(`the URL must be a string like sqlite:///events.db, not ${describeValue(url)}`)
    }
    const config = (options as { [CONFIG]?: string } | undefined)?.[CONFIG]
    const text = config ?? optionsText(rest, 'bus')
    this.#native = call(() => new native.NativeBus(bridge().native, url ?? 'memory://', text, config !== undefined))
    this.#logger = logger
    if (logger !== undefined) bridge().setLogger(this, logger)
    this.#sync = this.#native.isSync
    this.#replaces = this.#native.replaces ?? reloads()
    this.#subscriptions = new Subscriptions(this.#native, this.#replaces)
    this.deadLetters = new DeadLetters((what, query) => run((key) => this.#native[what](key, query)))
  }

  /** A bus from `POLYBUS_URL`, `POLYBUS_SERVICE` and `POLYBUS_<OPTION>`, such as `POLYBUS_LEASE_MS`. */
  static fromEnv(given: { logger?: Logger } = {}): Bus {
    return fromConfig(
      call(() => native.configFromEnv(environment())),
      given,
    )
  }

  /**
   * A bus from a JSON or YAML file, or from an object of the same shape: `url` and the options. `${VAR}` and
   * `${VAR:-default}` take environment variables. The same file serves Python: `lease: 30` is in seconds,
   * `leaseMs: 30000` in milliseconds.
   *
   * @throws InvalidConfig for a missing or malformed file, an unset variable, an unknown name.
   */
  static fromConfig(pathOrObject: string | object, given: { logger?: Logger } = {}): Bus {
    const text = call(() =>
      typeof pathOrObject === 'string'
        ? native.configFromFile(pathOrObject, environment())
        : native.configFromObject(optionsText(pathOrObject, 'bus'), environment()),
    )
    return fromConfig(text, given)
  }

  /**
   * The bus of this process for that URL, bus name and service: made by the first call, found by later ones, also by
   * those of a module that is evaluated again. The options of the first call hold.
   *
   * A second `new Bus` in such a module would leave the first one's handlers running.
   */
  static shared<E extends object = AnyEvents>(url?: string, options?: BusOptions): Bus<E> {
    const { shared } = bridge()
    const key = JSON.stringify([url, options?.bus, options?.service])
    let found = shared.get(key) as Bus<E> | undefined
    if (found === undefined) {
      found = new Bus<E>(url, options)
      shared.set(key, found)
    }
    return found
  }

  /** The URL without its password. */
  get url(): string {
    return this.#native.url
  }

  /** Name of the service. */
  get service(): string {
    return this.#native.service
  }

  /**
   * Opens the transport and starts the subscriptions made with {@link Bus.on}. Resolves to the bus, so that
   * `await using bus = await new Bus(…).start()` closes it at the end of the block. May be called again, also after
   * `close`. When it fails, the bus is closed.
   *
   * @throws ConnectionFailed, InvalidConfig, and what {@link Bus.subscribe} throws.
   */
  async start(): Promise<this> {
    await run((key) => this.#native.start(key))
    this.#running = true
    if (this.#logger !== undefined) bridge().setLogger(this, this.#logger)
    const started = this.#registered.map((registration) => this.#begin(registration))
    const failed = (await Promise.allSettled(started)).find((result) => result.status === 'rejected')
    if (failed !== undefined) {
      await this.close({ timeoutMs: 0 })
      throw failed.reason
    }
    return this
  }

  /**
   * Stops intake, waits up to `timeoutMs` (default 10 000) for running handlers, then aborts their signals and hands
   * their deliveries back without counting the attempt. Everything fails with `BusClosed` afterwards, until `start`.
   *
   * From inside one of its own handlers it begins to close and returns at once: the handler cannot wait for itself.
   */
  async close({ timeoutMs = DRAIN_MS }: { timeoutMs?: number } = {}): Promise<void> {
    checkTimeout(timeoutMs)
    this.#running = false
    const closing = run((key) => this.#native.close(key, timeoutMs)).then(() => {
      this.#subscriptions.end()
      bridge().setLogger(this, undefined)
    })
    if (this.#subscriptions.inHandler) return
    await closing
  }

  /** For `await using`: closes the bus. */
  declare readonly [Symbol.asyncDispose]: () => Promise<void>

  /**
   * Subscribes when the bus starts. On a running bus it subscribes at once in the background; later publishes of this
   * bus wait for that, {@link Bus.start} waits too and throws its error.
   *
   * @throws InvalidConfig, InvalidPattern, DuplicateSubscription at once.
   */
  on<K extends TypeOf<E>>(pattern: K, options: WithBatch, handler: BatchHandler<E[K]>): this
  on<T = any>(pattern: string, options: WithBatch, handler: BatchHandler<T>): this
  on<K extends TypeOf<E>>(pattern: K, handler: Handler<E[K]>): this
  on<K extends TypeOf<E>>(pattern: K, options: SubscribeOptions, handler: Handler<E[K]>): this
  on<T = any>(pattern: string, handler: Handler<T>): this
  on<T = any>(pattern: string, options: SubscribeOptions, handler: Handler<T>): this
  on(pattern: string, optionsOrHandler: SubscribeOptions | Handler, maybeHandler?: Handler | BatchHandler): this {
    const [options, handler] =
      typeof optionsOrHandler === 'function' ? [maybeHandler ?? {}, optionsOrHandler] : [optionsOrHandler, maybeHandler]
    const registration = { ...this.#check(pattern, handler, options as SubscribeOptions), subscribed: undefined }
    const { name } = registration
    const at = this.#registered.findIndex((other) => other.name === name)
    if (at >= 0 && !this.#replaces) {
      throw new DuplicateSubscription(
        `this bus has a handler named ${JSON.stringify(name)}; pass another name, or onDuplicate: 'replace' to the bus ` +
          'if a module is evaluated again',
      )
    }
    this.#registered.splice(at < 0 ? this.#registered.length : at, 1, registration)
    if (this.#running) {
      const late = this.#begin(registration)
        .catch((error) =>
          (this.#logger ?? console).error(`${name} is not subscribed to ${pattern}: ${describe(error)}`),
        )
        .finally(() => this.#late.delete(late))
      this.#late.add(late)
    }
    return this
  }

  #begin(registration: Registration): Promise<unknown> {
    const { pattern, handler, options } = registration
    registration.subscribed ??= this.#subscriptions
      .make(pattern, handler, options, () => {
        registration.subscribed = undefined
      })
      .catch((error) => {
        registration.subscribed = undefined
        throw error
      })
    return registration.subscribed
  }

  /**
   * Runs `middleware` around every handler, or with `{ on: 'publish' }` around every publish. The first that was added is
   * the outermost; added at any time, it concerns what comes later. What it stores with `AsyncLocalStorage` is seen by
   * the handler.
   *
   * @throws InvalidConfig for what is not a function.
   */
  use(middleware: HandleMiddleware, options?: { on?: 'handle' }): this
  use(middleware: PublishMiddleware, options: { on: 'publish' }): this
  use(middleware: HandleMiddleware | PublishMiddleware, options: UseOptions = {}): this {
    if (checkMiddleware(middleware, options) === 'publish') {
      this.#publishing = added(this.#publishing, middleware as PublishMiddleware, this.#replaces)
    } else {
      this.#subscriptions.use(middleware as HandleMiddleware)
    }
    return this
  }

  /** Joins a group. Once this resolves every later publish is seen, whoever makes it. */
  subscribe<K extends TypeOf<E>>(pattern: K, handler: BatchHandler<E[K]>, options: WithBatch): Promise<Subscription>
  subscribe<T = any>(pattern: string, handler: BatchHandler<T>, options: WithBatch): Promise<Subscription>
  subscribe<K extends TypeOf<E>>(pattern: K, handler: Handler<E[K]>, options?: SubscribeOptions): Promise<Subscription>
  subscribe<T = any>(pattern: string, handler: Handler<T>, options?: SubscribeOptions): Promise<Subscription>
  async subscribe(pattern: string, handler: Handler | BatchHandler, options?: SubscribeOptions): Promise<Subscription> {
    const checked = this.#check(pattern, handler, options)
    return await this.#subscriptions.make(checked.pattern, checked.handler, checked.options)
  }

  #check(
    pattern: unknown,
    handler: unknown,
    given: unknown,
  ): { pattern: string; handler: Handler; options: SubscribeOptions; name: string } {
    if (typeof handler !== 'function')
      throw new InvalidConfig(`the handler must be a function, not ${describeValue(handler)}`)
    if (typeof pattern !== 'string')
      throw new InvalidConfig(`the pattern must be a string, not ${describeValue(pattern)}`)
    if (given !== undefined && (typeof given !== 'object' || given === null)) {
      throw new InvalidConfig(`subscription options must be an object, not ${describeValue(given)}`)
    }
    const options = { ...(given as SubscribeOptions) }
    options.name ??= handler.name
    if (options.name === '') {
      throw new InvalidConfig('the handler has no name; pass one, like { name: "audit" }: it names the durable group')
    }
    if (options.start instanceof Date) options.start = options.start.getTime()
    if (typeof options.idempotent === 'string') {
      throw new InvalidConfig('idempotent is a string; give true, or a function that tells the key of an event')
    }
    call(() => bridge().native.checkSubscription(pattern, optionsText(options, 'subscription')))
    return { pattern, handler: handler as Handler, options, name: options.name }
  }

  /**
   * Stores an event and resolves when it is as safe as the transport makes it.
   *
   * A `Uint8Array` payload, such as {@link Event.raw}, is JSON text and is sent byte for byte.
   *
   * @throws InvalidEvent, PayloadTooLarge, BusClosed, PublishTimeout (nothing stored), PublishUnknown (perhaps stored),
   * ConnectionFailed, BufferFull; in `sync` mode HandlerError with the first failure as its cause.
   */
  publish(event: Event, options?: PublishOptions): Promise<Receipt>
  publish<K extends TypeOf<E>>(
    type: K,
    payload: E[K] | Uint8Array,
    meta?: MetaInput,
    options?: PublishOptions,
  ): Promise<Receipt>
  async publish(first: string | Event, second?: unknown, meta?: MetaInput, options?: PublishOptions): Promise<Receipt> {
    if (this.#late.size > 0) await Promise.all(this.#late)
    if (this.#publishing.length > 0) {
      const given = Event.isEvent(first)
      if (!given && typeof first !== 'string') {
        throw new InvalidEvent(`publish takes an event type or an Event, not ${describeValue(first)}`)
      }
      const event = given ? first : Event.create(first, second, meta)
      const schedule = given ? (second as PublishOptions | undefined) : options
      return await publishThrough(this.#publishing, event, (event) => this.#publish(event, schedule))
    }
    const batch = Batch.empty()
    let schedule = ''
    if (!Event.isEvent(first)) {
      if (options !== undefined) schedule = optionsText(options, 'publish')
      batch.add(first, second, meta, schedule)
    } else {
      if (second !== undefined) schedule = optionsText(second as object, 'publish')
      batch.addEvent(first, schedule)
    }
    const sync = isSync(schedule, this.#sync)
    if (sync) return await this.#handle(batch)
    const [receipt] = JSON.parse(await this.#send(batch))
    return receipt
  }

  /** What {@link Bus.publish} does with an event, after its middleware. */
  async #publish(event: Event, options?: PublishOptions): Promise<Receipt> {
    const schedule = options === undefined ? '' : optionsText(options, 'publish')
    const batch = Batch.empty()
    batch.addEvent(event, schedule)
    if (isSync(schedule, this.#sync)) return await this.#handle(batch)
    return JSON.parse(await this.#send(batch))[0]
  }

  /**
   * Stores all events, in order, or none: the error's `failures` say which were not accepted and why.
   *
   * Publish middleware runs for each of them, for all at the same time; then all are stored together.
   */
  async publishMany(events: readonly (Event | Draft)[]): Promise<Receipt[]> {
    if (!Array.isArray(events)) throw new InvalidEvent('publishMany takes an array of events')
    if (this.#late.size > 0) await Promise.all(this.#late)
    if (this.#sync) {
      const receipts = []
      for (const event of events) receipts.push(await this.#handleThrough(event))
      return receipts
    }
    if (this.#publishing.length > 0) return await this.#publishManyThrough(events)
    return events.length === 0 ? [] : JSON.parse(await this.#send(Batch.of(events)))
  }

  async #handleThrough(event: Event | Draft): Promise<Receipt> {
    if (this.#publishing.length === 0) return await this.#handle(Batch.of([event]))
    const [made] = eventsOf([event]).events as [Event]
    return await publishThrough(this.#publishing, made, (event) => this.#handle(Batch.of([event])))
  }

  async #publishManyThrough(given: readonly (Event | Draft)[]): Promise<Receipt[]> {
    const { events, schedules } = eventsOf(given)
    return await publishManyThrough(this.#publishing, events, async (going, indexes) => {
      const batch = Batch.empty()
      going.forEach((event, at) => {
        batch.addEvent(event, schedules[indexes[at] as number] as string)
      })
      return JSON.parse(await this.#send(batch))
    })
  }

  #send(batch: Batch): Promise<string> {
    const sent = run((key) => this.#native.publish(key, batch.bytes, batch.lengths, batch.count))
    batch.release() // the addon has read it
    return sent
  }

  /** A synchronous publish: runs the matching handlers of this process, one after the other. */
  async #handle(batch: Batch): Promise<Receipt> {
    if (!this.#running && this.#registered.length > 0 && !this.#native.isClosed) await this.start()
    const text = call(() => this.#native.matching(batch.bytes, batch.lengths))
    batch.release()
    const [cut, names]: [Cut, string[]] = JSON.parse(text)
    for (const name of names) {
      const runner = this.#subscriptions.runner(name)
      if (runner !== undefined) await handleNow(runner, uncutDelivered(cut, runner.group))
    }
    return { id: uncut(cut).meta.id }
  }

  /**
   * A subscription to read with `for await`. An event is acknowledged when the next one is asked for; `break` hands
   * the current one back and ends the subscription. It begins with the first step of the loop.
   *
   * The name, and so the durable group, is `events:<pattern>` unless given.
   */
  events<K extends TypeOf<E>>(pattern: K, options?: EventsOptions): Events<E[K]>
  events<T = any>(pattern: string, options?: EventsOptions): Events<T>
  events(pattern: string, given: EventsOptions = {}): Events {
    if (takesBatches(given)) {
      throw new InvalidConfig('events() gives one event at a time; leave out batch, or subscribe a handler')
    }
    const checked = this.#check(pattern, () => {}, { name: `events:${pattern}`, concurrency: 1, ...given })
    const events: Events = new Events((handler) =>
      this.#subscriptions.make(pattern, handler, checked.options, () => events.end(), false),
    )
    return events
  }

  /**
   * Publishes an event and resolves to the reply of a responder: an event with its payload, in the same chain. The
   * request expires with `timeoutMs` (default 5000), so that no responder begins with it afterwards. Inside a handler,
   * `bus.request(event.child(type, payload))` stays in the chain.
   *
   * @throws NoResponder at once, when nobody is there who answers; RequestTimeout; HandlerError when the responder failed,
   * with its class, message and code in `remote`; BusClosed, also when the bus is closed meanwhile; the reason of an
   * aborted `signal`; what {@link Bus.publish} throws; Unsupported on Pub/Sub.
   */
  request<T = any>(event: Event, options?: RequestOptions): Promise<Event<T>>
  request<T = any, K extends TypeOf<E> = TypeOf<E>>(
    type: K,
    payload?: E[K] | Uint8Array,
    meta?: MetaInput,
    options?: RequestOptions,
  ): Promise<Event<T>>
  async request(...args: any[]): Promise<Event> {
    if (this.#late.size > 0) await Promise.all(this.#late)
    return await request(this.#native, ...(args as [string]))
  }

  /**
   * Answers requests: what the handler returns is the payload of the reply, what it throws ends the request. Resolves, as
   * {@link Bus.subscribe} does, when requests reach it. The options are those of a subscription, with two defaults of
   * their own: no retries, because somebody waits (`retry` allows them, and the requester hears of the last failure
   * only), and `deadLetter: false`. One member of a group answers; of several groups the first reply counts.
   *
   * @throws What {@link Bus.subscribe} throws; InvalidConfig for `broadcast`; Unsupported on Pub/Sub.
   */
  respond<K extends TypeOf<E>>(pattern: K, handler: Handler<E[K]>): Promise<Subscription>
  respond<K extends TypeOf<E>>(pattern: K, options: SubscribeOptions, handler: Handler<E[K]>): Promise<Subscription>
  respond<T = any>(pattern: string, handler: Handler<T>): Promise<Subscription>
  respond<T = any>(pattern: string, options: SubscribeOptions, handler: Handler<T>): Promise<Subscription>
  async respond(pattern: string, first: SubscribeOptions | Handler, second?: Handler): Promise<Subscription> {
    const [options, handler] = typeof first === 'function' ? [second ?? {}, first] : [first, second]
    const checked = this.#check(pattern, handler, { ...options, respond: true })
    return await this.#subscriptions.make(checked.pattern, checked.handler, checked.options)
  }

  /** What holds on the live store. */
  async guarantees(): Promise<Guarantees> {
    return JSON.parse(await run((key) => this.#native.guarantees(key)))
  }

  /** The numbers of this bus. */
  async stats(): Promise<BusStats> {
    return JSON.parse(await run((key) => this.#native.stats(key)))
  }

  /**
   * What this process did and what its groups have to do, as Prometheus text (`text/plain; version=0.0.4`).
   *
   * Waits for nothing. What only the store knows (`polybus_group_…`) is counted in the background when somebody asks, and
   * shown the next time. `polybus/prometheus` hands all of it to prom-client.
   */
  metrics(): string {
    return this.#native.metrics()
  }

  /**
   * A page of the log in publish order: at most `limit` matching events (default 100), those after the position `after`.
   * With `records`, each entry tells what every group did with the event. The log goes back as far as the retention.
   *
   * @throws InvalidPattern; InvalidConfig for a text that is no position, a limit of 0, or since after until; BusClosed,
   * ConnectionFailed, and Unsupported where nothing is kept.
   */
  history<K extends TypeOf<E>>(pattern: K, options?: HistoryOptions): Promise<HistoryEntry<E[K]>[]>
  history<T = any>(pattern?: string, options?: HistoryOptions): Promise<HistoryEntry<T>[]>
  async history(pattern = '*', options?: HistoryOptions): Promise<HistoryEntry[]> {
    const query = queryText(pattern, options, 'history')
    return entries(await run((key) => this.#native.history(key, query)))
  }

  /**
   * Hands matching events of the log to one group again: the same events, attempts from 1. No other group sees them.
   *
   * Goes over what the group had been given when the call began, and leaves alone what it still has to do and what its own
   * pattern does not match. In batches, each atomic; `progress` is told after each, and what it throws ends the replay
   * there. To go on after an interruption or a `limit`, give the last result's position as `after`.
   *
   * @throws NotFound for an unknown group, and what {@link Bus.history} throws.
   */
  async replay(pattern: string, options: ReplayOptions): Promise<ReplayResult> {
    const { progress, ...rest } = (options ?? {}) as ReplayOptions
    if (progress !== undefined && typeof progress !== 'function')
      throw new InvalidConfig(`progress must be a function, not ${describeValue(progress)}`)
    const replay = call(() => this.#native.replay(queryText(pattern, rest, 'replay')))
    return await replayAll(() => run((key) => replay.next(key)), progress)
  }

  /** Forgets a durable group, what it had not finished and its dead letters. Resolves to whether there was one. */
  async deleteGroup(group: string): Promise<boolean> {
    return JSON.parse(await run((key) => this.#native.deleteGroup(key, String(group))))
  }

  /** Lets the process end while subscriptions are active. */
  unref(): this {
    this.#subscriptions.hold(false)
    return this
  }

  /** Subscriptions keep the process alive; this is the default. */
  ref(): this {
    this.#subscriptions.hold(true)
    return this
  }
}

function dispose(this: Bus): Promise<void> {
  return this.close()
}

const CONFIG = Symbol('config')

/** A bus of what the core read. */
function fromConfig(text: string, given: { logger?: Logger }): Bus {
  const { url, options } = JSON.parse(text)
  return new Bus(url ?? undefined, { ...given, [CONFIG]: options } as unknown as BusOptions)
}

function environment(): string {
  return JSON.stringify(process.env)
}
