/**
 * Carrying events from the outbox to a bus.
 *
 * @module
 */
import { run } from '../bridge.js'
import { type Bus, nativeOf } from '../bus.js'
import { call, fromNative, InvalidConfig, type PolybusError } from '../errors.js'
import { describe, describeValue, optionsText } from '../json.js'
import { native } from '../native.js'
import type { RetryPolicy } from '../retry.js'
import { explained } from './driver.js'

/** What a statement gave. */
export interface ExecutorResult {
  /** Rows as lists, in the order of the columns. */
  rows: unknown[][]
  /** How many rows were changed. */
  affected: number
}

/** Runs one statement in a transaction of its own, and commits it. */
export type Executor = (sql: string, params: (string | number | null)[]) => ExecutorResult | Promise<ExecutorResult>

/** Milliseconds until the next attempt, the time of it, or `null` for a dead letter. */
export type Decision = number | Date | null

/** Decides about a row that the bus refused. `attempts` counts those that failed, this one included. */
export type FailurePolicy = (attempts: number, error: PolybusError) => Decision | Promise<Decision>

/** Options of a relay. */
export interface RelayOptions {
  /**
   * Unless given, an error that no retry mends makes a dead letter at once, any other one when `retry` is used up. Not
   * asked when the bus is away: then nothing is published, and no attempt counts.
   */
  failurePolicy?: FailurePolicy
  /** For rows that the bus refuses. Default: three retries. */
  retry?: RetryPolicy
  /** `table` or `schema.table`. Default `polybus_outbox`. */
  table?: string
  /** Most rows in one claim, and so in memory for each worker. Default 500. */
  batch?: number
  /** Claims under way at the same time in this process. With one, rows without a key go in order, too. Default 1. */
  workers?: number
  /** What a relay had that died is published after this. Default 30 000. */
  leaseMs?: number
  /** Longest pause between looks at the table; after rows were found pauses are shorter. Default 250. */
  pollIntervalMs?: number
  /** Wake up by NOTIFY, which PostgreSQL has. Default true. */
  listen?: boolean
  /** Where to listen, when the database's URL leads to a pool that passes no notifications on. */
  listenUrl?: string
  /** What an executor speaks. Default `sqlite`. */
  dialect?: 'postgres' | 'sqlite' | 'mysql'
  /** How its placeholders are written. Default `?`, and `$` for `postgres`. */
  style?: '$' | '?'
}

/** What became of the rows of one claim. */
export interface RelayBatch {
  /** Rows that were claimed. */
  attempted: number
  /** Published, and marked so. */
  relayed: number
  /** Not taken by the bus. */
  publishFailed: number
  /** Published and not marked, because the database did not answer: they will be published again, with the same ids. */
  ackFailed: number
  /** Another relay had claimed them meanwhile, because our lease was over: nothing of theirs was changed. */
  ownershipMismatches: number
  /** They hold no event, and are dead. */
  malformed: number
  /** They will not be tried again; the malformed ones included. */
  deadLettered: number
  /** Given back without an attempt counted: the bus was away, or they wait for an earlier one of their key. */
  returned: number
  /** Why the bus takes nothing, if it is away. */
  outage: string | null
}

/** The rows of an outbox by state, counted on the live table. */
export interface RelayStats {
  /** Not finished, whatever they wait for. */
  pending: number
  /** Of those, claimed by a relay. */
  claimed: number
  /** Of those, waiting for another attempt. */
  retrying: number
  /** Dead letters. */
  dead: number
  /** Age of the oldest that is not finished. */
  oldestMs: number | null
}

/** How a relay is in this process. */
export interface RelayHealth {
  /** It runs, reaches the database, and the bus takes events. */
  healthy: boolean
  /** Workers that run. */
  workers: number
  /** Why the database cannot be used, if so. */
  database: string | null
  /** Why the bus takes nothing, if so. */
  bus: string | null
  /** Time since a worker looked at the table with success. */
  lastLookMs: number | null
}

/** A row that is not tried again, unless somebody replays it. */
export interface DeadRow {
  /** Its place: the next page of `deadLetters` continues after it. */
  seq: number
  eventId: string
  type: string
  /** What the row holds: an event's wire form, if all is well. */
  raw: string
  partitionKey: string | null
  attempts: number
  /** Code and message. */
  lastError: string
  /** When the row was written, by the database's clock. */
  createdAt: Date
  /** When it died. */
  deadAt: Date
}

/** What better-sqlite3 and node:sqlite have in common. */
interface SyncDatabase {
  prepare(sql: string): {
    all(...params: unknown[]): unknown[]
    run(...params: unknown[]): { changes: number | bigint }
  }
}

/**
 * Carries events from an outbox to a bus, at least once, in the order of each partition key. Any number of relays work on
 * one table. Opens nothing until it is used.
 *
 * ```ts fragment
 * const relay = new Relay('postgres://shop@db/shop', bus)
 * await relay.run()
 * ```
 */
export class Relay {
  readonly #native: InstanceType<typeof native.NativeRelay>
  readonly #table: InstanceType<typeof native.NativeOutbox>
  readonly #dialect: 'postgres' | 'sqlite' | 'mysql'
  readonly #execute: Executor
  readonly #policy: FailurePolicy
  readonly #asks: boolean
  #using = 0
  #clerk: Promise<void> = Promise.resolve()

  /**
   * @param database - The URL of a PostgreSQL, MySQL or MariaDB database, to which the relay makes connections of its
   * own; a database of better-sqlite3 or node:sqlite; or a function that runs the statements on whatever connection.
   * @param bus - Where the events go. Not one with `failOpen`, which would lose them.
   * @throws InvalidConfig for what can never work.
   */
  constructor(database: string | Executor | SyncDatabase, bus: Bus<any>, options: RelayOptions = {}) {
    const { failurePolicy, dialect, style, ...rest } = options
    if (failurePolicy !== undefined && typeof failurePolicy !== 'function')
      throw new InvalidConfig(`failurePolicy is ${describeValue(failurePolicy)}; give a function`)
    const execute = executorOf(database)
    this.#policy = failurePolicy ?? unasked
    this.#execute = execute ?? unasked
    this.#asks = failurePolicy !== undefined || execute !== undefined
    const url = typeof database === 'string' ? database : ''
    if (url === '' && execute === undefined)
      throw new InvalidConfig(
        `the database of a relay is a URL, a database of better-sqlite3 or node:sqlite, or a function that runs ` +
          `statements, and not ${describeValue(database)}`,
      )
    this.#table = call(() => new native.NativeOutbox(JSON.stringify({ table: rest.table })))
    this.#dialect = dialect ?? (style === '$' ? 'postgres' : 'sqlite')
    this.#native = call(
      () =>
        new native.NativeRelay(
          url,
          this.#dialect,
          style ?? (this.#dialect === 'postgres' ? '$' : '?'),
          nativeOf(bus),
          failurePolicy !== undefined,
          optionsText(rest, 'relay'),
        ),
    )
  }

  /** Where it connects, without a password; `null` if it has no connection of its own. */
  get database(): string | null {
    return this.#native.database
  }

  /** @throws InvalidConfig if the table is missing or of another version. */
  async check(): Promise<void> {
    await this.#run((key) => this.#native.check(key))
  }

  /** Relays what one claim gives, and tells what became of it. */
  async relayBatch(): Promise<RelayBatch> {
    return JSON.parse(await this.#run((key) => this.#native.relayBatch(key)))
  }

  /**
   * Works until `stop`, or until `signal` is aborted; rows that are under way then are finished first. Database and bus
   * may be away for any time: it waits, longer and longer up to 10 s, and goes on.
   *
   * @throws InvalidConfig if the table is missing or of another version, AuthFailed if the database refuses the user.
   */
  async run({ signal }: { signal?: AbortSignal } = {}): Promise<void> {
    if (signal?.aborted) return
    const running = this.#run((key) => this.#native.run(key))
    const stop = () => this.stop()
    signal?.addEventListener('abort', stop, { once: true })
    try {
      await running
    } finally {
      signal?.removeEventListener('abort', stop)
    }
  }

  /** Ends `run` when the rows that are under way are finished. */
  stop(): void {
    this.#native.stop()
  }

  /** Lets the workers of this process look at the table now: for after a commit. */
  wake(): void {
    this.#native.wake()
  }

  /** Counts the rows by state. */
  async stats(): Promise<RelayStats> {
    return JSON.parse(await this.#run((key) => this.#native.stats(key)))
  }

  /** How it is; asks nobody. */
  health(): RelayHealth {
    return JSON.parse(this.#native.health())
  }

  /** Totals of this process, and what there is to do, as Prometheus reads it. */
  async metrics(): Promise<string> {
    return await this.#run((key) => this.#native.metrics(key))
  }

  /** Oldest first, at most `limit` (100), those after the row `after`. */
  async deadLetters({ limit = 100, after = 0 }: { limit?: number; after?: number } = {}): Promise<DeadRow[]> {
    const rows: (DeadRow & { createdAt: number; deadAt: number })[] = JSON.parse(
      await this.#run((key) => this.#native.deadLetters(key, after, limit)),
    )
    return rows.map((row) => ({ ...row, createdAt: new Date(row.createdAt), deadAt: new Date(row.deadAt) }))
  }

  /**
   * Makes one dead letter, or all of them, pending again; attempts from 1. Resolves to how many.
   *
   * @throws NotFound for an event without one.
   */
  async replay(eventId = ''): Promise<number> {
    return Number(await this.#run((key) => this.#native.replay(key, eventId)))
  }

  /**
   * Removes rows that were delivered longer ago, in small steps. Resolves to how many. What is removed absorbs no second
   * event of its id or dedupe key any more.
   */
  async purge({ olderThanMs }: { olderThanMs: number }): Promise<number> {
    if (!(olderThanMs >= 0)) throw new InvalidConfig('purge wants olderThanMs, at least 0')
    return Number(await this.#run((key) => this.#native.purge(key, olderThanMs)))
  }

  /** Removes one dead letter, or all of them. Resolves to how many. */
  async purgeDead(eventId = ''): Promise<number> {
    return Number(await this.#run((key) => this.#native.purgeDead(key, eventId)))
  }

  // While anybody uses the relay, one loop answers its questions.
  async #run(start: (key: number) => string | null): Promise<string> {
    if (!this.#asks) return await run(start)
    this.#using += 1
    if (this.#using === 1) this.#clerk = this.#clerk.then(() => this.#answer())
    try {
      return await run(start)
    } finally {
      this.#using -= 1
      if (this.#using === 0) this.#native.dismiss()
    }
  }

  async #answer(): Promise<void> {
    for (;;) {
      const asked = JSON.parse(await run((key) => this.#native.nextQuestion(key)))
      if (asked === null) return
      try {
        if (asked.sql !== undefined) {
          const { rows, affected } = await this.#execute(asked.sql, asked.params)
          this.#native.answerRows(asked.id, rowsText(rows), Number(affected))
        } else {
          const error = fromNative(new Error(asked.error)) as PolybusError
          this.#native.answerDecision(asked.id, milliseconds(await this.#policy(asked.attempts, error)))
        }
      } catch (error) {
        const told = explained(error, this.#table, this.#dialect, true)
        if (told !== undefined) this.#native.answerError(asked.id, told.retryable, told.message)
        else this.#native.answerError(asked.id, !(error instanceof TypeError), describe(error))
      }
    }
  }
}

function unasked(): never {
  throw new TypeError('the core asked what it was not told to ask')
}

function milliseconds(decision: unknown): number {
  if (decision === null || decision === undefined) return -1
  if (decision instanceof Date) return Math.max(0, decision.getTime() - Date.now())
  if (typeof decision === 'number' && decision >= 0) return decision
  throw new TypeError(`a failure policy returned ${describeValue(decision)}; return milliseconds, a Date or null`)
}

function rowsText(rows: unknown[][]): string {
  return JSON.stringify(rows, (_, value) => (typeof value === 'bigint' ? Number(value) : value))
}

function executorOf(database: unknown): Executor | undefined {
  if (typeof database === 'function') return database as Executor
  const given = database as SyncDatabase | null
  if (typeof given !== 'object' || typeof given?.prepare !== 'function') return undefined
  return (sql, params) => {
    const statement = given.prepare(sql)
    // better-sqlite3 has no rows for a statement that returns none; both drivers run an UPDATE … RETURNING by `all`.
    if (/^SELECT|RETURNING/.test(sql)) {
      const rows = statement.all(...params).map((row) => Object.values(row as object))
      return { rows, affected: rows.length }
    }
    return { rows: [], affected: Number(statement.run(...params).changes) }
  }
}
