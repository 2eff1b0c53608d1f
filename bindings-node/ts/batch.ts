/**
 * Events on their way to the core: their texts as bytes, one after the other, and the lengths of the parts.
 *
 * @module
 */
import { InvalidEvent } from './errors.js'
import { Event, type MetaInput, wireOf } from './event.js'
import { describeValue, metaText, optionsText, payloadText } from './json.js'

/** Options of one publish. */
export interface PublishOptions {
  /** Not delivered before this much time has passed. */
  delayMs?: number
  /** Not delivered after this much time has passed. */
  expiresInMs?: number
  /** Default the bus's mode. */
  mode?: 'async' | 'sync'
}

/** An event for {@link Bus.publishMany}. */
export interface Draft<T = any> extends Omit<PublishOptions, 'mode'> {
  type: string
  payload: T
  meta?: MetaInput
}

// As in bindings-node/src/event.rs: kind, and the lengths of type, payload, meta and options in bytes.
const NUMBERS = 5
/** A character of a JavaScript string is at most so many bytes of UTF-8. */
const WIDEST = 3
/** A batch that has grown beyond this is not kept for the next publish. */
const KEPT_BYTES = 4 << 20

/** The batch that the next publish may use: making its buffers anew would cost more than filling them. */
let spare: Batch | undefined

/**
 * Drafts as events, and what they say about time.
 *
 * @throws InvalidEvent, which lists those that are not valid.
 */
export function eventsOf(given: readonly (Event | Draft)[]): { events: Event[]; schedules: string[] } {
  Batch.of(given).release() // for its errors, all at once
  const events: Event[] = []
  const schedules: string[] = []
  for (const one of given) {
    if (Event.isEvent(one)) {
      events.push(one)
      schedules.push('')
      continue
    }
    const { type, payload, meta, ...options } = one
    events.push(Event.create(type, payload, meta))
    schedules.push(Object.keys(options).length > 0 ? optionsText(options, 'publish') : '')
  }
  return { events, schedules }
}

/** Events to publish. */
export class Batch {
  bytes = Buffer.allocUnsafeSlow(16 << 10)
  lengths = new Float64Array(NUMBERS * 64)
  count = 0
  #end = 0

  /** A batch for one publish; {@link Batch.release} gives it back. */
  static empty(): Batch {
    const batch = spare ?? new Batch()
    // A payload's toJSON may publish in its turn.
    spare = undefined
    batch.count = 0
    batch.#end = 0
    return batch
  }

  /** @throws InvalidEvent, which lists those that are not valid. */
  static of(events: readonly (Event | Draft)[]): Batch {
    const batch = Batch.empty()
    const failures: { index: number; error: InvalidEvent }[] = []
    for (let index = 0; index < events.length; index++) {
      try {
        batch.#addAny(events[index])
      } catch (error) {
        if (!(error instanceof InvalidEvent)) throw error
        failures.push({ index, error })
      }
    }
    const [first] = failures
    if (first === undefined) return batch
    const message = `event ${first.index} of ${events.length}: ${first.error.message}; nothing was published`
    throw new InvalidEvent(message, { failures })
  }

  /** Called when the core has read it. */
  release(): void {
    if (this.bytes.length <= KEPT_BYTES) spare = this
  }

  #addAny(event: Event | Draft | undefined): void {
    if (Event.isEvent(event)) {
      this.addEvent(event, '')
      return
    }
    if (typeof event !== 'object' || event === null) throw new InvalidEvent(`${describeValue(event)} is not an event`)
    const { type, payload, meta, ...options } = event
    let schedule = ''
    for (const _ in options) {
      schedule = optionsText(options, 'publish')
      break
    }
    this.add(type, payload, meta, schedule)
  }

  /** An event of these parts, to be made by the core. */
  add(type: unknown, payload: unknown, meta: MetaInput | undefined, schedule: string): void {
    if (typeof type !== 'string') {
      throw new InvalidEvent(`publish takes an event type or an Event, not ${describeValue(type)}`)
    }
    const payloadJson = payloadText(payload)
    const metaJson = metaText(meta)
    this.#number(0, this.#write(type), this.#write(payloadJson), this.#write(metaJson), this.#write(schedule))
  }

  /** An event that there is: it goes as it is, its id and number texts included. */
  addEvent(event: Event, schedule: string): void {
    this.#number(1, 0, this.#write(wireOf(event)), 0, this.#write(schedule))
  }

  #write(text: string): number {
    if (text === '') return 0
    const most = this.#end + WIDEST * text.length
    if (most > this.bytes.length) {
      const larger = Buffer.allocUnsafeSlow(Math.max(most, 2 * this.bytes.length))
      this.bytes.copy(larger, 0, 0, this.#end)
      this.bytes = larger
    }
    const written = this.bytes.write(text, this.#end)
    this.#end += written
    return written
  }

  #number(kind: number, type: number, payload: number, meta: number, schedule: number): void {
    let at = NUMBERS * this.count++
    if (at === this.lengths.length) {
      const larger = new Float64Array(2 * at)
      larger.set(this.lengths)
      this.lengths = larger
    }
    this.lengths[at++] = kind
    this.lengths[at++] = type
    this.lengths[at++] = payload
    this.lengths[at++] = meta
    this.lengths[at] = schedule
  }
}
