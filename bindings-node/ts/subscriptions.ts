/**
 * The subscriptions of one bus: making them, giving their names to others, and whether they keep the process alive.
 *
 * @module
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import { bridge, type Handler, type Runner, run } from './bridge.js'
import { optionsText } from './json.js'
import { added, around, type HandleMiddleware } from './middleware.js'
import type { native } from './native.js'
import { checkTimeout } from './options.js'
import { DRAIN_MS, type SubscribeOptions, Subscription, takesBatches } from './subscription.js'

/** What `Bus.on` was told. */
export interface Registration {
  pattern: string
  handler: Handler
  options: SubscribeOptions
  name: string
  subscribed: Promise<unknown> | undefined
}

/** A subscription that runs, or is being made. */
interface Live {
  readonly runner: Runner
  /** As given, without middleware. */
  handler: Handler
  readonly pattern: string
  readonly options: string
  /** Another handler of that name may take its place. */
  readonly replaceable: boolean
  made: Promise<Subscription>
  onEnd: (() => void) | undefined
  /** Whether it keeps the process alive. */
  holds: boolean
  ended(): void
}

/** Said by `Bus.respond` alone. */
interface Answering extends SubscribeOptions {
  respond?: boolean
}

/** The bus whose handler is running: for `close` and `drain` from inside one. */
const inside = new AsyncLocalStorage<Subscriptions>()

export class Subscriptions {
  readonly #native: InstanceType<typeof native.NativeBus>
  readonly #replaces: boolean
  readonly #live = new Set<Live>()
  /** By name, the last that wants it, where names may be taken over. */
  readonly #turns = new Map<string, Promise<unknown>>()
  #handling: readonly HandleMiddleware[] = []
  #held = true

  constructor(bus: InstanceType<typeof native.NativeBus>, replaces: boolean) {
    this.#native = bus
    this.#replaces = replaces
  }

  /** Whether one of their handlers is what runs now. */
  get inHandler(): boolean {
    return inside.getStore() === this
  }

  /** The one of that name, if it takes events. */
  runner(name: string): Runner | undefined {
    return [...this.#live].find(({ runner }) => runner.name === name && runner.group !== '')?.runner
  }

  /** Runs `middleware` around the handlers, of those that run as well. */
  use(middleware: HandleMiddleware): void {
    this.#handling = added(this.#handling, middleware, this.#replaces)
    for (const { runner, handler } of this.#live) runner.handler = this.#wired(handler, runner.takesBatches)
  }

  /** What the bridge calls for each event, or for each batch, which middleware does not see. */
  #wired(handler: Handler, batches: boolean): Runner['handler'] {
    const whole = batches || this.#handling.length === 0 ? handler : around(this.#handling, handler)
    return (given, context) => inside.run(this, whole, given, context)
  }

  /** Whether they keep the process alive. */
  hold(held: boolean): void {
    this.#held = held
    for (const live of this.#live) {
      if (live.holds === held) continue
      if (held) bridge().hold()
      else bridge().release()
      live.holds = held
    }
  }

  /** The bus is closed. */
  end(): void {
    for (const live of [...this.#live]) live.ended()
  }

  /**
   * Subscribes. Where names may be taken over, those that want the same one wait for each other, so that the last of them
   * gets it; one that is not `replaceable` keeps its name.
   */
  async make(
    pattern: string,
    handler: Handler,
    options: SubscribeOptions,
    onEnd?: () => void,
    replaceable = true,
  ): Promise<Subscription> {
    if (!this.#replaces || !replaceable) return await this.#begin(pattern, handler, options, onEnd, false)
    const name = options.name as string
    const take = () => this.#take(pattern, handler, options, onEnd)
    const turn = this.#turns.get(name)?.then(take, take) ?? take()
    this.#turns.set(name, turn)
    try {
      return await turn
    } finally {
      if (this.#turns.get(name) === turn) this.#turns.delete(name)
    }
  }

  /** Takes a name over: the handler alone changes, or the subscription that has it ends first. */
  async #take(
    pattern: string,
    handler: Handler,
    options: SubscribeOptions,
    onEnd: (() => void) | undefined,
  ): Promise<Subscription> {
    const old = [...this.#live].find(({ runner, replaceable }) => replaceable && runner.name === options.name)
    if (old !== undefined) {
      const { made, ended, runner } = old
      if (old.pattern === pattern && old.options === optionsText(options, 'subscription')) {
        old.handler = handler
        runner.handler = this.#wired(handler, runner.takesBatches)
        if (typeof options.idempotent === 'function') runner.key = options.idempotent
        old.onEnd = onEnd
        return await made
      }
      await run((key) => bridge().native.drain(key, runner.id, DRAIN_MS)).then(ended)
    }
    return await this.#begin(pattern, handler, options, onEnd, true)
  }

  async #begin(
    pattern: string,
    handler: Handler,
    options: SubscribeOptions,
    onEnd: (() => void) | undefined,
    replaceable: boolean,
  ): Promise<Subscription> {
    const home = bridge()
    const text = optionsText(options, 'subscription')
    const answers = (options as Answering).respond === true
    const batches = takesBatches(options)
    const runner = home.runner(options.name as string, this.#wired(handler, batches), answers, batches)
    if (typeof options.idempotent === 'function') runner.key = options.idempotent
    const live: Live = {
      runner,
      handler,
      pattern,
      options: text,
      replaceable,
      made: undefined as never,
      onEnd,
      holds: this.#held,
      ended: () => {
        if (!this.#live.delete(live)) return
        home.ended(runner)
        if (live.holds) home.release()
        live.onEnd?.()
      },
    }
    this.#live.add(live)
    if (live.holds) home.hold()
    live.made = this.#open(live)
    return await live.made
  }

  async #open(live: Live): Promise<Subscription> {
    const home = bridge()
    const { runner, pattern, options } = live
    try {
      const facts = JSON.parse(await run((key) => this.#native.subscribe(key, runner.id, pattern, options)))
      runner.group = facts.group
      runner.timeoutMs = facts.timeoutMs
      return new Subscription(facts, {
        pause: () => home.native.pause(runner.id),
        resume: () => home.native.resume(runner.id),
        drain: async (given) => {
          const timeoutMs = (typeof given === 'object' ? given.timeoutMs : given) ?? DRAIN_MS
          checkTimeout(timeoutMs)
          const drained = run((key) => home.native.drain(key, runner.id, timeoutMs)).then(live.ended)
          if (this.inHandler) return
          await drained
        },
        stats: async () => JSON.parse(await run((key) => this.#native.subscriptionStats(key, runner.id))),
      })
    } catch (error) {
      live.ended()
      throw error
    }
  }
}
