/**
 * Events on their way to the core: their texts as bytes, one after the other, and the lengths of the parts.
 *
 * @module
 */
import { InvalidEvent } from './errors.js'
import { Event, type MetaInput, plainTypeOf, wireOf } from './event.js'
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
/** The core checks all of it. */
const UNCHECKED = 0
/** A whole wire form. */
const WHOLE = 1
/** The payload comes from JSON.stringify, and there is no meta. */
const WRITTEN = 2
/** A whole wire form without meta of the user; its type's length is added. */
const PLAIN = 3
/** A character of a JavaScript string is at most so many bytes of UTF-8. */
const WIDEST = 3
/** Buffers that have grown beyond this are not kept for the next publish. */
const KEPT_BYTES = 4 << 20

/** Where texts are written for the core, which reads them before the call returns. */
let shared = Buffer.allocUnsafeSlow(16 << 10)
/** The numbers that the next batch may use: making them anew would cost more than filling them. */
let spare: Float64Array | undefined

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
  lengths = spare ?? new Float64Array(NUMBERS * 64)
  count = 0
  /** Texts in their order; an empty one is left out. */
  #texts: string[] = []

  constructor() {
    // A payload's toJSON may publish in its turn.
    spare = undefined
  }

  /** @throws InvalidEvent, which lists those that are not valid. */
  static of(events: readonly (Event | Draft)[]): Batch {
    const batch = new Batch()
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

  /** All texts, valid until the next batch is asked; {@link Batch.lengths} fits them from now on. */
  get bytes(): Buffer {
    // Written in one go: a call for each text would cost more than the copy.
    const text = this.#texts.length === 1 ? (this.#texts[0] as string) : this.#texts.join('')
    if (WIDEST * text.length > shared.length) shared = Buffer.allocUnsafeSlow(2 * WIDEST * text.length)
    const bytes = shared
    if (bytes.length > KEPT_BYTES) shared = Buffer.allocUnsafeSlow(16 << 10)
    if (bytes.write(text) !== text.length) this.#measure()
    return bytes
  }

  /** Called when the core has read it. */
  release(): void {
    if (this.lengths.length <= KEPT_BYTES / 64) spare = this.lengths
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
    Batch.add(() => this, type, payload, meta, schedule)
  }

  /** Adds an event of these parts, to be made by the core, to the batch that `open` gives when they have been read. */
  static add(open: () => Batch, type: unknown, payload: unknown, meta: MetaInput | undefined, schedule: string): void {
    if (typeof type !== 'string') {
      throw new InvalidEvent(`publish takes an event type or an Event, not ${describeValue(type)}`)
    }
    const payloadJson = payloadText(payload)
    const metaJson = metaText(meta)
    const kind = metaJson === '' && !(payload instanceof Uint8Array) ? WRITTEN : UNCHECKED
    open().#number(kind, type, payloadJson, metaJson, schedule)
  }

  /** An event that there is: it goes as it is, its id and number texts included. */
  addEvent(event: Event, schedule: string): void {
    const type = plainTypeOf(event)
    this.#number(type < 0 ? WHOLE : PLAIN + type, '', wireOf(event), '', schedule)
  }

  #number(kind: number, type: string, payload: string, meta: string, schedule: string): void {
    let at = NUMBERS * this.count++
    if (at === this.lengths.length) {
      const larger = new Float64Array(2 * at)
      larger.set(this.lengths)
      this.lengths = larger
    }
    const { lengths } = this
    lengths[at++] = kind
    lengths[at++] = type.length
    lengths[at++] = payload.length
    lengths[at++] = meta.length
    lengths[at] = schedule.length
    if (type !== '') this.#texts.push(type)
    if (payload !== '') this.#texts.push(payload)
    if (meta !== '') this.#texts.push(meta)
    if (schedule !== '') this.#texts.push(schedule)
  }

  /** Not all is ASCII: counts bytes instead of characters. */
  #measure(): void {
    const { lengths } = this
    let text = 0
    for (let at = 0; at < NUMBERS * this.count; at++) {
      if (at % NUMBERS === 0 || lengths[at] === 0) continue
      lengths[at] = Buffer.byteLength(this.#texts[text++] as string)
    }
  }
}
