/**
 * Storing events in the outbox.
 *
 * @module
 */
import { call, InvalidConfig, InvalidEvent } from '../errors.js'
import { Event, wireOf } from '../event.js'
import { native } from '../native.js'
import { change, drive, find, type Steps, type SyncTransaction } from './driver.js'
import type { Dialect, Statement } from './shape.js'

/** How a driver writes placeholders: `$1`, `?` or `%s`. */
export type Style = '$' | '?' | '%s'

/** Options of an {@link Outbox}. */
export interface OutboxOptions {
  /** `table` or `schema.table`, of letters, digits and `_`. Default `polybus_outbox`. */
  table?: string | undefined
  /** The `source` of events that have none. Default none: the relay's service becomes their source. */
  service?: string | undefined
  /** Default 1 MiB, as on a bus. */
  maxPayloadBytes?: number | undefined
}

/** Options of {@link Outbox.store}. */
export interface StoreOptions {
  /** What makes another event the same one, for one event. Default its idempotency key. */
  dedupeKey?: string | undefined
  /** Store without an open transaction, too: then the event is committed alone. Default false. */
  allowAutocommit?: boolean | undefined
  /** The database, where the driver does not say. */
  dialect?: Dialect | undefined
}

/** Options of {@link Outbox.statement}. */
export interface StatementOptions {
  /** How the driver writes placeholders. */
  style: Style
  /** The database. Default `sqlite` for `?`, `postgres` for the others. */
  dialect?: Dialect | undefined
  /** As in {@link StoreOptions}. */
  dedupeKey?: string | undefined
}

interface Insert {
  statement: Statement
  confirm: Statement | null
  ids: string[]
}

/**
 * The outbox in one table: stores events in a transaction that you hand in. It holds nothing open.
 */
export class Outbox {
  readonly #native: InstanceType<typeof native.NativeOutbox>
  /** What stores one event through a driver that counts, by dialect: kept, so that only its values are asked for. */
  readonly #texts = new Map<Dialect, string>()

  /** @throws InvalidConfig for a name, an option or a value that is not valid. */
  constructor(options: OutboxOptions = {}) {
    this.#native = call(() => new native.NativeOutbox(JSON.stringify(options)))
  }

  /**
   * Stores an event, or many in one statement, in the transaction `tx`. Nothing is committed here.
   *
   * `tx` is a client of node-postgres, the `sql` of postgres.js's `begin`, a transaction of Prisma, Drizzle, Knex, Kysely
   * or TypeORM, a connection of mysql2, or a database of better-sqlite3 or node:sqlite. On the last two, and on Drizzle
   * over better-sqlite3, it returns at once what it resolves to elsewhere.
   *
   * @returns whether the event was stored: `false` if one with the same id or the same `dedupeKey` is in the table
   * already, also when a transaction at the same time is about to put it there. An array for many.
   * @throws InvalidConfig when no transaction is open, when `tx` is something else, or when the table is missing;
   * PayloadTooLarge and InvalidEvent before anything is sent. What the database refuses is the driver's own error.
   */
  store(event: Event, tx: SyncTransaction, options?: StoreOptions): boolean
  store(events: readonly Event[], tx: SyncTransaction, options?: StoreOptions): boolean[]
  store(event: Event, tx: object, options?: StoreOptions): Promise<boolean>
  store(events: readonly Event[], tx: object, options?: StoreOptions): Promise<boolean[]>
  store(
    event: Event | readonly Event[],
    tx: object,
    { dedupeKey, allowAutocommit, dialect }: StoreOptions = {},
  ): boolean | boolean[] | Promise<boolean | boolean[]> {
    const driver = find(tx, 'store()', dialect)
    if (driver.change !== undefined && driver.dialect !== 'mysql' && !Array.isArray(event)) {
      return this.#storeOne(event as Event, driver, dedupeKey, allowAutocommit)
    }
    const render = () => stores(this.#inserts(driver.dialect, driver.style, event, dedupeKey), Array.isArray(event))
    const how = { what: 'the event', allowAutocommit }
    if (driver.blocks) return drive(driver, render(), this.#native, how)
    // What is wrong with the event rejects, as everything else that is wrong.
    return (async () => drive(driver, render(), this.#native, how))()
  }

  /**
   * Tells relays that listen, on whatever machine, that there is something to do. Call it after the commit: then they
   * need not wait for their next look. PostgreSQL only; on other databases it does nothing, because relays cannot listen.
   *
   * At most a hundred times a second: in between it sends nothing, as a relay that was woken looks again soon. For a relay
   * in the same process call its {@link Relay.wake}.
   *
   * @param connection What {@link Outbox.store} takes, but with no transaction open: the client after its `COMMIT`, or the
   * `sql` of postgres.js, the client of Prisma, the database of Drizzle, Kysely, TypeORM or Knex.
   * @throws InvalidConfig in an open transaction: all that commit a NOTIFY wait for each other.
   */
  async notify(connection: object, { dialect }: { dialect?: Dialect | undefined } = {}): Promise<void> {
    const driver = find(connection, 'notify()', dialect)
    if (driver.dialect !== 'postgres') return
    if (driver.isOpen?.() ?? (await driver.inTransaction())) throw inside()
    const text = call(() => this.#native.wake(driver.style, performance.now()))
    if (text === null) return
    const { sql, params }: Statement = JSON.parse(text)
    await driver.run(sql, params, false) // Prisma cannot read what it returns
  }

  /**
   * What stores the event, to be run on any other driver.
   *
   * On PostgreSQL and SQLite it returns the ids of the events that were stored, and not of those that were absorbed; on
   * MySQL nothing. One statement takes at most 1,000 events of together 8 MiB.
   *
   * @throws InvalidConfig for more, and for a style that is not known.
   */
  statement(event: Event | readonly Event[], { style, dialect, dedupeKey }: StatementOptions): Statement {
    const [insert, ...more] = this.#inserts(dialect ?? '', String(style), event, dedupeKey)
    if (insert === undefined || more.length > 0) {
      throw new InvalidConfig(
        'statement() takes from 1 to 1,000 events of together 8 MiB; call it once for each part of them',
      )
    }
    return insert.statement
  }

  /** Statements that make the table and its indexes where they are missing, to be run in order. */
  ddl(dialect: Dialect): string[] {
    return call(() => this.#native.ddl(String(dialect)))
  }

  async #storeOne(
    event: Event,
    driver: ReturnType<typeof find>,
    dedupeKey: string | undefined,
    allowAutocommit: boolean | undefined,
  ): Promise<boolean> {
    const wire = wireOf(isEvent(event))
    const row = call(() => this.#native.row(wire, dedupeKey ?? '')) as Statement['params']
    let text = this.#texts.get(driver.dialect)
    if (text === undefined) {
      text = call(() => this.#native.one(driver.dialect, driver.style))
      this.#texts.set(driver.dialect, text)
    }
    return (await change(driver, text, row, this.#native, { what: 'the event', allowAutocommit })) === 1
  }

  #inserts(dialect: string, style: string, event: Event | readonly Event[], dedupeKey: string | undefined): Insert[] {
    const events = Array.isArray(event) ? (event as readonly Event[]) : [event as Event]
    for (const given of events) isEvent(given)
    if (dedupeKey !== undefined && Array.isArray(event)) {
      throw new InvalidConfig('dedupeKey belongs to one event; give each of many an idempotencyKey')
    }
    return JSON.parse(call(() => this.#native.insert(dialect, style, events.map(wireOf), dedupeKey ?? '')))
  }
}

function inside(): InvalidConfig {
  return new InvalidConfig(
    'notify() got an open transaction: committing writers that notify wait for each other, and a relay that is woken now ' +
      'finds nothing yet; call it after the commit',
  )
}

function isEvent(given: unknown): Event {
  if (Event.isEvent(given)) return given
  throw new InvalidEvent(`the outbox stores events, not ${typeof given}: make one with Event.create(…)`)
}

function* stores(inserts: Insert[], many: boolean): Steps<boolean | boolean[]> {
  const stored: boolean[] = []
  for (const { statement, confirm, ids } of inserts) {
    let returned = yield { ...statement, returnsRows: confirm === null }
    if (confirm !== null) returned = yield { ...confirm, returnsRows: true }
    // An event that was given twice is returned once.
    const left = new Set(returned)
    for (const id of ids) stored.push(left.delete(id))
  }
  return many ? stored : (stored[0] as boolean)
}
