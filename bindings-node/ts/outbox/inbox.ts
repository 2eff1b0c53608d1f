/**
 * The inbox: an event takes effect once for each consumer.
 *
 * @module
 */
import { call, InvalidConfig } from '../errors.js'
import { Event } from '../event.js'
import { native } from '../native.js'
import { drive, find, type Steps, type SyncTransaction } from './driver.js'
import type { Dialect, Statement } from './shape.js'

/** Options of an {@link Inbox}. */
export interface InboxOptions {
  /** `table` or `schema.table`, of letters, digits and `_`. Default `polybus_inbox`. */
  table?: string | undefined
}

/** Options of {@link Inbox.once}. */
export interface OnceOptions {
  /** Who handles the event. Default the group that it was delivered to. */
  consumer?: string | undefined
  /** Mark without an open transaction, too: then the mark is committed alone, before its effects. Default false. */
  allowAutocommit?: boolean | undefined
  /** The database, where the driver does not say. */
  dialect?: Dialect | undefined
}

/** Options of {@link Inbox.purge}. */
export interface PurgeOptions {
  /** Only marks that are older, in milliseconds. */
  olderThanMs: number
  /** Most marks to delete. Default 1000. */
  limit?: number | undefined
  /** The database, where the driver does not say. */
  dialect?: Dialect | undefined
}

interface Change {
  statement: Statement
  confirm: Statement | null
}

/** The inbox in one table. It holds nothing open. */
export class Inbox {
  readonly #native: InstanceType<typeof native.NativeInbox>

  /** @throws InvalidConfig for a name, an option or a value that is not valid. */
  constructor(options: InboxOptions = {}) {
    this.#native = call(() => new native.NativeInbox(JSON.stringify(options)))
  }

  /**
   * Marks the event, or that of this id, as handled by `consumer`, in the transaction `tx`, which is what
   * {@link Outbox.store} takes.
   *
   * ```ts
   * if (await inbox.once(event, tx, { consumer: 'billing' })) { … }
   * ```
   *
   * The mark commits with the effects, because both are in your transaction: let an error of the effects leave it, so that
   * the mark is rolled back, too.
   *
   * @returns `false` when it was marked before, also when a transaction at the same time marks it and commits: the later
   * one waits for the earlier.
   * @throws InvalidConfig when no transaction is open, when `tx` is something else, or when the table is missing.
   */
  once(event: Event | string, tx: SyncTransaction, options?: OnceOptions): boolean
  once(event: Event | string, tx: object, options?: OnceOptions): Promise<boolean>
  once(
    event: Event | string,
    tx: object,
    { consumer, allowAutocommit, dialect }: OnceOptions = {},
  ): boolean | Promise<boolean> {
    const driver = find(tx, 'once()', dialect)
    const render = () => {
      const delivered = Event.isEvent(event)
      const name = consumer ?? (delivered ? event.delivery?.group : undefined)
      if (name === undefined) {
        throw new InvalidConfig(
          "once() needs a consumer for an event that was not delivered, like { consumer: 'billing' }",
        )
      }
      const id = delivered ? event.meta.id : String(event)
      return isFirst(JSON.parse(call(() => this.#native.mark(driver.dialect, driver.style, name, id))))
    }
    const how = { what: 'the mark', allowAutocommit }
    if (driver.blocks) return drive(driver, render(), this.#native, how)
    return (async () => drive(driver, render(), this.#native, how))()
  }

  /**
   * Deletes up to `limit` marks that are older than `olderThanMs`, in your transaction or in none.
   *
   * Call it until it deletes less than `limit`, with a commit after each call: short transactions disturb nobody. Keep
   * marks for longer than an event can come again, replays included.
   *
   * @returns how many.
   */
  purge(tx: SyncTransaction, options: PurgeOptions): number
  purge(tx: object, options: PurgeOptions): Promise<number>
  purge(tx: object, { olderThanMs, limit = 1000, dialect }: PurgeOptions): number | Promise<number> {
    if (!(olderThanMs >= 0)) throw new InvalidConfig(`olderThanMs=${olderThanMs} is not valid; give milliseconds`)
    const driver = find(tx, 'purge()', dialect)
    const change = call(() => this.#native.purge(driver.dialect, driver.style, olderThanMs, limit))
    return drive(driver, counts(JSON.parse(change)), this.#native, { what: '', allowAutocommit: true })
  }

  /** Statements that make the table and its index where they are missing, to be run in order. */
  ddl(dialect: Dialect): string[] {
    return call(() => this.#native.ddl(String(dialect)))
  }
}

/** The inbox in the table `polybus_inbox`. */
export const inbox = new Inbox()

function* counts({ statement, confirm }: Change): Steps<number> {
  const rows = yield { ...statement, returnsRows: confirm === null }
  if (confirm === null) return rows.length
  return Number((yield { ...confirm, returnsRows: true })[0])
}

function* isFirst(change: Change): Steps<boolean> {
  return (yield* counts(change)) === 1
}
