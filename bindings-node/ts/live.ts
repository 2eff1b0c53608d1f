/**
 * What a bus knows of its handlers.
 *
 * @module
 */
import type { Handler, Runner } from './bridge.js'
import type { SubscribeOptions, Subscription } from './subscription.js'

/** What {@link Bus.on} was told. */
export interface Registration {
  pattern: string
  handler: Handler
  options: SubscribeOptions
  name: string
  subscribed: Promise<unknown> | undefined
}

/** A subscription that runs, or is being made. */
export interface Live {
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
export interface Answering extends SubscribeOptions {
  respond?: boolean
}
