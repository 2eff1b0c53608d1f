/**
 * What a bus is made with.
 *
 * @module
 */
import type { Logger } from './bridge.js'
import { InvalidConfig } from './errors.js'
import { describeValue } from './json.js'
import type { RetryPolicy } from './retry.js'

/** Options of a bus. Durations are in milliseconds. */
export interface BusOptions {
  /** Name of the service: `source` of its events and prefix of its groups. */
  service: string
  /** Buses inside one store do not see each other. Default `default`. */
  bus?: string
  /** `sync`: publish runs this process's matching handlers and returns when they ended. Default `async`. */
  mode?: 'async' | 'sync'
  /** Default concurrency of a subscription. Default 10. */
  workerCount?: number
  /** Most deliveries that one subscription holds in this process. Default 1000. */
  bufferSize?: number
  /** What a publish does when too many wait: for room, up to `publishTimeoutMs` (default), or fail with BufferFull. */
  whenFull?: 'wait' | 'error'
  /** Publishes that may wait: to be written, or in memory to be handled. Default 64 MiB, 512 MiB in memory. */
  publishBufferBytes?: number
  /** A publish that fails in the transport is logged and counted, not thrown. Default false. */
  failOpen?: boolean
  /** Largest payload, on publish and on consume. Default 1 MiB. */
  maxPayloadBytes?: number
  /** Where log records go: `console`, pino, winston and others fit. Default `console`, warnings and errors. */
  logger?: Logger
  /** Default policy of the subscriptions. */
  retry?: RetryPolicy
  /** What a confirmed publish must survive. Default `warn`: the transport's safest setting, and a warning if the store cannot keep it. */
  durability?: 'warn' | 'required' | 'off' | 'full' | 'normal'
  /** How long a delivery stays ours without a heartbeat, at least 1000. Default 30 000. */
  leaseMs?: number
  /** Longest wait of one publish. Default 10 000. */
  publishTimeoutMs?: number
  /** How long an event is kept after every group finished it. Default 1 h in a SQLite file, 1 min on Redis. */
  retentionMs?: number
  /** Events older than this are dropped even if a group has not finished them. Default none. */
  maxAgeMs?: number
  /** Most events kept, likewise. Default none. */
  maxEvents?: number
  /** Most bytes kept, likewise: of the events as stored, on Redis the memory of the log. Default none. */
  maxBytes?: number
  /** Where a publish to a server must have arrived before it returns. Default `memory`: in the server. */
  confirm?: 'memory' | 'disk' | 'replica'
  /**
   * How long the `idempotencyKey` of a published event is remembered: another publish with it is absorbed, and its receipt
   * says `duplicate`. 0 turns it off. Default 1 h; not on `redis+pubsub`.
   */
  idempotencyWindowMs?: number
  /** Parts that a bus on a server is split into, by partition key; fixed when the bus is made. Default 1. */
  partitions?: number
  /** Open a file on a network file system. Default false. */
  allowNetworkFs?: boolean
  /** What a second handler of the same name does. Default `error`; `replace` under `node --watch`, Next.js's and Vite's dev servers. */
  onDuplicate?: 'error' | 'replace'
}

/** Payload types by event type; by default any payload under any type. */
export type AnyEvents = Record<string, any>
/** The types of a map of events. */
export type TypeOf<E> = Extract<keyof E, string>

/** A duration in milliseconds, or an error that says so. */
export function checkTimeout(timeoutMs: unknown): void {
  if (!(typeof timeoutMs === 'number' && timeoutMs >= 0 && !Number.isNaN(timeoutMs))) {
    throw new InvalidConfig(`timeoutMs=${describeValue(timeoutMs)} is not valid; give milliseconds, at least 0`)
  }
}
