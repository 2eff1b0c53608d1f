/**
 * What a bus says about itself.
 *
 * @module
 */
import type { SubscriptionStats } from './subscription.js'

/** Says that an event was accepted. */
export interface Receipt {
  /** The event's id. */
  readonly id: string
  /** Position in the transport's log; absent while it is delayed, and for a synchronous publish. */
  readonly position?: string
  /**
   * True when nothing was stored, because an event with this idempotency key was published before: `id` and `position`
   * are that one's. Absent otherwise.
   */
  readonly duplicate?: boolean
}

/** What holds on the live store, as measured. */
export interface Guarantees {
  readonly transport: string
  readonly delivery: 'at-least-once' | 'at-most-once'
  /** What a confirmed publish survives: nothing, any process but the server, any killed process, power loss. */
  readonly durability: 'none' | 'memory' | 'process' | 'disk'
  readonly ordering: string
  readonly details: Readonly<Record<string, string>>
  /** Settings that weaken the promise, each with what to do. */
  readonly warnings: readonly string[]
  readonly capabilities: {
    readonly durable: boolean
    readonly crossProcess: boolean
    readonly ack: boolean
    readonly delayedRetry: boolean
    readonly delayedPublish: boolean
    readonly deadLetters: boolean
    readonly startPosition: boolean
    readonly broadcast: boolean
    readonly ordered: boolean
    readonly request: boolean
    /** Subscriptions can handle events of one key once. */
    readonly idempotent: boolean
    /** A publish with an idempotency key that was published before is absorbed. */
    readonly publishDedupe: boolean
    /** The log can be read and replayed. */
    readonly history: boolean
  }
}

/** The numbers of a bus in this process, and of its subscriptions' groups. */
export interface BusStats {
  readonly published: number
  readonly publishFailed: number
  readonly subscriptions: readonly SubscriptionStats[]
}
