/**
 * The outbox and the inbox, inside the application's own transaction: the row of the order and the row of the event
 * commit together, or neither does. A relay publishes what was committed.
 *
 * No driver is imported here: whoever hands in a transaction has imported its driver.
 *
 * @module
 */
export type { SyncTransaction } from './driver.js'
export { Inbox, type InboxOptions, inbox, type OnceOptions, type PurgeOptions } from './inbox.js'
export {
  type DeadRow,
  type Decision,
  type Executor,
  type ExecutorResult,
  type FailurePolicy,
  Relay,
  type RelayBatch,
  type RelayHealth,
  type RelayOptions,
  type RelayStats,
} from './relay.js'
export type { Dialect, Statement } from './shape.js'
export { Outbox, type OutboxOptions, type StatementOptions, type StoreOptions, type Style } from './store.js'
