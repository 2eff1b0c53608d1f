/**
 * The log: pages of it, what became of its events, and replay into one group.
 *
 * @module
 */
import type { DeadReason } from './dead-letters.js'
import { InvalidConfig } from './errors.js'
import { type Cut, type Event, uncut } from './event.js'
import { describeValue, optionsText } from './json.js'

/** What one group did with one event, from what the store keeps anyway; `undefined` is what it does not keep. */
export interface ProcessingRecord {
  readonly group: string
  /**
   * `completed`: the group has gone past it and holds nothing of it any more. `failed`: it waits for its next attempt
   * (`retryAt`), or is a dead letter (`deadLetter`).
   */
  readonly status: 'pending' | 'processing' | 'completed' | 'failed'
  /** Attempts that were begun, this one included. */
  readonly attempts: number | undefined
  readonly firstFailedAt: Date | undefined
  readonly lastFailedAt: Date | undefined
  /** When the next attempt is due. */
  readonly retryAt: Date | undefined
  /** No store keeps that today. */
  readonly completedAt: Date | undefined
  /** What went wrong last. */
  readonly error: { readonly type: string; readonly message: string; readonly stack: string } | undefined
  /** The dead letter's id, for `bus.deadLetters`. */
  readonly deadLetter: string | undefined
  /** Why it is one. */
  readonly reason: DeadReason | undefined
}

/** One event of the log. */
export interface HistoryEntry<T = any> {
  /** `undefined` when the bytes cannot be decoded; they are in `raw`. */
  readonly event: Event<T> | undefined
  /** The bytes as stored, when they are no event. */
  readonly raw: Buffer | undefined
  /** Where it stands in the log, as in the receipt of its publish. */
  readonly position: string
  /** When it entered the log, by the store's clock. */
  readonly publishedAt: Date
  /** What each group did with it, by the groups' names; `undefined` unless asked for. */
  readonly records: readonly ProcessingRecord[] | undefined
}

/** Which events of the log. */
export interface HistoryFilter {
  /** That entered the log at this time or later: a date, or milliseconds since 1970. */
  since?: Date | number
  /** That entered the log before this time. */
  until?: Date | number
  /** Only those after this position: of the last entry of the page before, a receipt, or a replay. */
  after?: string | undefined
}

/** A page of the log. */
export interface HistoryOptions extends HistoryFilter {
  /** Default 100. */
  limit?: number
  /** With what each group did with each event. Default false. */
  records?: boolean
}

/** What to replay, and where to. */
export interface ReplayOptions extends HistoryFilter {
  /** The only group that gets the events, such as `shop/sendMail`. */
  group: string
  /** Stop after this many. Default none. */
  limit?: number
  /** Told after each batch; may be async. What it throws ends the replay after that batch. */
  progress?: (result: ReplayResult) => unknown
}

/** How far a replay is. */
export interface ReplayResult {
  /** Events handed to the group. */
  readonly count: number
  /** Events left alone because the group had them to do already. */
  readonly skipped: number
  /** Up to where the log was looked at: give it as `after` to go on from there. */
  readonly position: string | undefined
  /** Nothing is left; false while it goes on, and when the limit ended it. */
  readonly done: boolean
}

/** @internal */
export function queryText(pattern: unknown, options: object | undefined, what: string): string {
  if (typeof pattern !== 'string')
    throw new InvalidConfig(`the pattern must be a string, not ${describeValue(pattern)}`)
  if (options !== undefined && (typeof options !== 'object' || options === null))
    throw new InvalidConfig(`${what} options must be an object, not ${describeValue(options)}`)
  const dates = Object.entries(options ?? {}).map(([name, value]) => [
    name,
    value instanceof Date ? value.getTime() : value,
  ])
  return optionsText({ ...Object.fromEntries(dates), pattern }, what)
}

interface WireRecord extends Omit<ProcessingRecord, 'firstFailedAt' | 'lastFailedAt' | 'retryAt' | 'completedAt'> {
  firstFailedAt: number | null
  lastFailedAt: number | null
  retryAt: number | null
  completedAt: number | null
}

interface WireEntry {
  event: Cut | null
  raw: string | null
  position: string
  publishedAt: number
  records: WireRecord[] | null
}

/** @internal */
export function entries(text: string): HistoryEntry[] {
  return (JSON.parse(text) as WireEntry[]).map((wire) =>
    Object.freeze({
      event: wire.event === null ? undefined : uncut(wire.event),
      raw: wire.raw === null ? undefined : Buffer.from(wire.raw, 'hex'),
      position: wire.position,
      publishedAt: new Date(wire.publishedAt),
      records: wire.records === null ? undefined : Object.freeze(wire.records.map(record)),
    }),
  )
}

function record(wire: WireRecord): ProcessingRecord {
  const date = (millis: number | null) => (millis === null ? undefined : new Date(millis))
  return Object.freeze({
    group: wire.group,
    status: wire.status,
    attempts: wire.attempts ?? undefined,
    firstFailedAt: date(wire.firstFailedAt),
    lastFailedAt: date(wire.lastFailedAt),
    retryAt: date(wire.retryAt),
    completedAt: date(wire.completedAt),
    error: wire.error ?? undefined,
    deadLetter: wire.deadLetter ?? undefined,
    reason: wire.reason ?? undefined,
  })
}

/** @internal Takes all batches, and tells `progress` of each between two of them. */
export async function replayAll(
  next: () => Promise<string>,
  progress: ReplayOptions['progress'],
): Promise<ReplayResult> {
  let last: ReplayResult = { count: 0, skipped: 0, position: undefined, done: true }
  for (;;) {
    const found: (Omit<ReplayResult, 'position'> & { position: string | null }) | null = JSON.parse(await next())
    if (found === null) return last
    last = Object.freeze({ ...found, position: found.position ?? undefined })
    await progress?.(last)
  }
}
