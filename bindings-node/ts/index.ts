/**
 * One event bus for Python and TypeScript services, with a Rust core.
 *
 * @packageDocumentation
 */
import { native } from './native.js'

export type { Draft, PublishOptions } from './batch.js'
export type { BatchHandler, Handler, HandlerContext, Logger } from './bridge.js'
export {
  type AnyEvents,
  Bus,
  type BusOptions,
  type BusStats,
  type Guarantees,
  type Receipt,
} from './bus.js'
export type { DeadLetter, DeadLetterFilter, DeadLetterPage, DeadLetters, DeadReason } from './dead-letters.js'
export {
  AuthFailed,
  BufferFull,
  BusClosed,
  ConnectionFailed,
  DuplicateSubscription,
  HandlerError,
  HandlerTimeout,
  InvalidConfig,
  InvalidEvent,
  InvalidPattern,
  type ItemFailure,
  LeaseLost,
  NoResponder,
  NotFound,
  PayloadTooLarge,
  PolybusError,
  type PolybusErrorOptions,
  PublishTimeout,
  PublishUnknown,
  type Remote,
  RequestTimeout,
  SchemaViolation,
  Unsupported,
} from './errors.js'
export { type Delivery, Event, type EventDict, type Meta, type MetaInput, type Received } from './event.js'
export type {
  HistoryEntry,
  HistoryFilter,
  HistoryOptions,
  ProcessingRecord,
  ReplayOptions,
  ReplayResult,
} from './history.js'
export type {
  HandleMiddleware,
  HandleNext,
  PublishMiddleware,
  PublishNext,
  UseOptions,
} from './middleware.js'
export type { RequestOptions } from './request.js'
export { BatchFailed, Reject, Retry, type RetryPolicy, type WithRetryOptions, withRetry } from './retry.js'
export { type CloseOnSignalsOptions, closeOnSignals } from './shutdown.js'
export type {
  BatchOptions,
  BreakerOptions,
  DrainTimeout,
  Events,
  EventsOptions,
  SubscribeOptions,
  Subscription,
  SubscriptionStats,
} from './subscription.js'

/** The version of the Rust core under this package. */
export function version(): string {
  return native.version()
}
