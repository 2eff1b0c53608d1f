/**
 * Dead letters: what no handler could finish, kept until somebody replays or purges it.
 *
 * @module
 */
import { InvalidConfig, NotFound } from './errors.js'
import { type Cut, type Event, uncut } from './event.js'
import { optionsText } from './json.js'

/** Why a delivery became a dead letter. */
export type DeadReason = 'exhausted' | 'rejected' | 'undecodable' | 'schema' | 'poison' | 'expired'

/** One dead letter. */
export interface DeadLetter<T = any> {
  /** Names this record; opaque, ordered by age. */
  readonly id: string
  /** The event; `undefined` when its bytes could not be decoded. */
  readonly event: Event<T> | undefined
  /** The event's bytes as stored. */
  readonly raw: Buffer
  /** What went wrong last, each part cut to 4 KiB. */
  readonly error: { readonly type: string; readonly message: string; readonly stack: string }
  readonly attempts: number
  readonly firstFailedAt: Date
  readonly lastFailedAt: Date
  /** Name of the subscription. */
  readonly subscription: string
  readonly group: string
  readonly reason: DeadReason
  /** The dead letter that this event was replayed from. */
  readonly replayedFrom: string | undefined
}

/** Which dead letters. `{}` means all of them. */
export interface DeadLetterFilter {
  group?: string
  /** Of events whose type matches. */
  pattern?: string
  /** That failed last at this time or later: a date, or milliseconds since 1970. */
  since?: Date | number
  /** That failed last before this time. */
  before?: Date | number
  /** That failed last longer ago than this. */
  olderThanMs?: number
}

/** A page of dead letters. */
export interface DeadLetterPage extends DeadLetterFilter {
  /** Default 100. */
  limit?: number
  /** Only those after the record with this id: the last one of the page before. */
  after?: string
}

/** An operation on a bus; the core reads the query. */
export type DeadOperation = (
  what: 'deadList' | 'deadCount' | 'deadReplay' | 'deadPurge',
  query: string,
) => Promise<string>

/** The dead letters of a bus: `bus.deadLetters`. */
export class DeadLetters {
  readonly #run: DeadOperation

  /** @internal */
  constructor(run: DeadOperation) {
    this.#run = run
  }

  /** A page of them, oldest first. */
  async list(page: DeadLetterPage = {}): Promise<DeadLetter[]> {
    const letters: WireLetter[] = JSON.parse(await this.#run('deadList', text(page)))
    return letters.map(letter)
  }

  /** @throws NotFound if there is none with this id. */
  async get(id: string): Promise<DeadLetter> {
    const [found] = JSON.parse(await this.#run('deadList', text({ id: checkId(id), limit: 1 })))
    if (found === undefined)
      throw new NotFound(`there is no dead letter ${JSON.stringify(id)}; it was replayed or purged before`)
    return letter(found)
  }

  /**
   * Hands them to their groups again: same event id, attempts from 1, once. Resolves to how many.
   *
   * @throws NotFound if there is none with this id.
   */
  async replay(which: string | DeadLetterFilter): Promise<number> {
    return Number(await this.#run('deadReplay', selection(which)))
  }

  /**
   * Removes them. Resolves to how many.
   *
   * @throws NotFound if there is none with this id.
   */
  async purge(which: string | DeadLetterFilter): Promise<number> {
    return Number(await this.#run('deadPurge', selection(which)))
  }

  /** How many there are. */
  async count(filter: DeadLetterFilter = {}): Promise<number> {
    return Number(await this.#run('deadCount', text(filter)))
  }
}

function checkId(id: unknown): string {
  if (typeof id === 'string' && id !== '') return id
  throw new InvalidConfig('pass the id of a dead letter')
}

/** Nothing at all is a mistake, such as a misspelt member; all of them is `{}`. */
function selection(which: string | DeadLetterFilter): string {
  if (typeof which === 'object' && which !== null) return text(which)
  if (typeof which === 'string') return text({ id: checkId(which) })
  throw new InvalidConfig('pass the id of a dead letter, or a filter; {} means all')
}

function text(query: object): string {
  const dates = Object.entries(query).map(([name, value]) => [name, value instanceof Date ? value.getTime() : value])
  return optionsText(Object.fromEntries(dates), 'dead letter')
}

interface WireLetter {
  id: string
  event: Cut | null
  raw: string
  error: DeadLetter['error']
  attempts: number
  firstFailedAt: number
  lastFailedAt: number
  subscription: string
  group: string
  reason: DeadReason
  replayedFrom: string | null
}

function letter(wire: WireLetter): DeadLetter {
  return Object.freeze({
    ...wire,
    event: wire.event === null ? undefined : uncut(wire.event),
    raw: Buffer.from(wire.raw, 'hex'),
    error: Object.freeze(wire.error),
    firstFailedAt: new Date(wire.firstFailedAt),
    lastFailedAt: new Date(wire.lastFailedAt),
    replayedFrom: wire.replayedFrom ?? undefined,
  })
}
