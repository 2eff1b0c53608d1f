/**
 * The event: its wire form in one string, cut on demand.
 *
 * @module
 */
import { call } from './errors.js'
import { metaText, payloadText } from './json.js'
import { native } from './native.js'

/** The facts around an event. Members that are absent on the wire are absent here. */
export interface Meta {
  /** UUID v7; kept by retries, replays and relays. */
  readonly id: string
  /** RFC 3339, UTC, milliseconds. */
  readonly timestamp: string
  /** The service that published it. */
  readonly source?: string
  readonly schemaVersion?: number
  /** Id of the first event of the chain. */
  readonly correlationId?: string
  /** Id of the parent event. */
  readonly causationId?: string
  readonly partitionKey?: string
  readonly idempotencyKey?: string
  readonly resource?: string
  readonly resourceId?: string
  readonly userId?: string
  readonly organizationId?: string
  readonly sessionId?: string
  /** The process that published it. */
  readonly instanceId?: string
  readonly aggregate?: { readonly type: string; readonly id: string }
  readonly traceparent?: string
  readonly tracestate?: string
  /** Free values; empty if there are none. */
  readonly headers: Readonly<Record<string, string>>
}

/** Meta that a publisher may set; the rest is filled in. */
export type MetaInput = { readonly [K in keyof Meta]?: Meta[K] | undefined }

/** Facts of one attempt to deliver an event. */
export interface Delivery {
  /** From 1. */
  readonly attempt: number
  /** Whether somebody took this delivery before. */
  readonly redelivered: boolean
  /** The group that it was delivered to. */
  readonly group: string
  /** When this process took it. */
  readonly receivedAt: Date
}

/** An event as a plain object in the wire's shape. */
export interface EventDict {
  type: string
  payload: unknown
  meta: Partial<Meta>
  [unknown: string]: unknown
}

/** An event that was delivered: {@link Event.delivery} is there. */
export type Received<T = any> = Event<T> & { readonly delivery: Delivery }

// The wire form is {"type":"T","payload":P,"meta":M…}: with the lengths of T, P and M everything can be found.
const TYPE_AT = '{"type":"'.length
const PAYLOAD_AFTER = '","payload":'.length
const META_AFTER = ',"meta":'.length

const EVENT = Symbol.for('polybus.event')

/** Makes the event of a wire form and the lengths of its parts, in UTF-16 units. */
export let seal: (wire: string, typeLength: number, payloadLength: number, metaLength: number) => Event
/** The same, delivered. */
export let deliver: (
  wire: string,
  typeLength: number,
  payloadLength: number,
  metaLength: number,
  attempt: number,
  redelivered: boolean,
  group: string,
  receivedAt: number,
) => Received
/** The wire form of an event. */
export let wireOf: (event: Event) => string
/** The length of the type of an event whose wire form is as {@link plainWire} writes it; another: -1. */
export let plainTypeOf: (event: Event) => number
let sealPlain: (wire: string, typeLength: number, payloadLength: number) => Event

/**
 * An immutable event. `T` types the payload; nothing checks it at run time.
 *
 * Payload and meta are parsed on first touch. Treat the payload as read-only: a change is not seen by whoever the
 * event is passed on to, because its text is.
 */
export class Event<T = any> {
  readonly #wire: string
  readonly #typeLength: number
  readonly #payloadLength: number
  readonly #metaLength: number
  #plain = false
  #attempt = 0
  #redelivered = false
  #group = ''
  #receivedAt = 0
  #type: string | undefined
  #payload: T | undefined
  #meta: Meta | undefined
  #delivery: Delivery | undefined

  static {
    seal = (wire, typeLength, payloadLength, metaLength) => new Event(wire, typeLength, payloadLength, metaLength)
    deliver = (wire, typeLength, payloadLength, metaLength, attempt, redelivered, group, receivedAt) => {
      const event = new Event(wire, typeLength, payloadLength, metaLength)
      event.#attempt = attempt
      event.#redelivered = redelivered
      event.#group = group
      event.#receivedAt = receivedAt
      return event as Received
    }
    sealPlain = (wire, typeLength, payloadLength) => {
      const event = new Event(wire, typeLength, payloadLength, metaLengthOf(wire, typeLength, payloadLength))
      event.#plain = true
      return event
    }
    plainTypeOf = (event) => (#wire in event && event.#plain ? event.#typeLength : -1)
    // An event of another copy of this package keeps its text to itself.
    wireOf = (event) => (#wire in event ? event.#wire : (event as Event).encode().toString())
    Object.defineProperty(Event.prototype, EVENT, { value: true })
  }

  private constructor(wire: string, typeLength: number, payloadLength: number, metaLength: number) {
    this.#wire = wire
    this.#typeLength = typeLength
    this.#payloadLength = payloadLength
    this.#metaLength = metaLength
  }

  /**
   * A new event with a fresh id. {@link Bus.publish} sends it.
   *
   * @throws InvalidEvent for a type, payload or meta that is not valid.
   */
  static create<T = any>(type: string, payload: T, meta?: MetaInput): Event<T> {
    const text = payloadText(payload)
    if (meta === undefined && VALID_TYPES.has(type) && !(payload instanceof Uint8Array)) {
      return sealPlain(plainWire(type, text), type.length, text.length)
    }
    const wire = call(() => native.createEvent(String(type), text, metaText(meta)))
    if (VALID_TYPES.size < MOST_TYPES) VALID_TYPES.add(type)
    return fresh(wire, type, text)
  }

  /** The event of a plain object in the wire's shape. Members this version does not know are kept. */
  static fromDict<T = any>(dict: EventDict): Event<T> {
    return decoded(call(() => native.decodeEvent(payloadText(dict))))
  }

  /** The event of a wire form, number texts and unknown members included. */
  static decode<T = any>(wire: string | Uint8Array): Event<T> {
    const text = typeof wire === 'string' ? wire : payloadText(wire)
    return decoded(call(() => native.decodeEvent(text)))
  }

  /** Whether `value` is an event, of this copy of the package or another. */
  static isEvent(value: unknown): value is Event {
    return typeof value === 'object' && value !== null && EVENT in value
  }

  /** What happened, like `order.created`. */
  get type(): string {
    this.#type ??= this.#wire.substring(TYPE_AT, TYPE_AT + this.#typeLength)
    return this.#type
  }

  /** The payload, decoded on first touch. */
  get payload(): T {
    if (this.#payload === undefined) this.#payload = JSON.parse(this.#payloadText()) as T
    return this.#payload
  }

  /** The payload's bytes, exactly as they were published. Publishing them sends the same bytes. */
  get raw(): Buffer {
    return Buffer.from(this.#payloadText())
  }

  /** The facts around it, decoded on first touch. */
  get meta(): Meta {
    if (this.#meta === undefined) {
      const start = this.#payloadAt() + this.#payloadLength + META_AFTER
      const meta = JSON.parse(this.#wire.substring(start, start + this.#metaLength))
      meta.headers = Object.freeze(meta.headers ?? {})
      if (meta.aggregate) Object.freeze(meta.aggregate)
      this.#meta = Object.freeze(meta) as Meta
    }
    return this.#meta
  }

  /** Facts of this attempt; `undefined` for an event that was made here. */
  get delivery(): Delivery | undefined {
    if (this.#attempt > 0) {
      this.#delivery ??= Object.freeze({
        attempt: this.#attempt,
        redelivered: this.#redelivered,
        group: this.#group,
        receivedAt: new Date(this.#receivedAt),
      })
    }
    return this.#delivery
  }

  #payloadAt(): number {
    return TYPE_AT + this.#typeLength + PAYLOAD_AFTER
  }

  #payloadText(): string {
    const start = this.#payloadAt()
    return this.#wire.substring(start, start + this.#payloadLength)
  }

  /**
   * An event caused by this one: it joins the chain and keeps user, organisation, session and trace, not aggregate,
   * resource, idempotency key and partition key.
   */
  child<U = any>(type: string, payload: U, meta?: MetaInput): Event<U> {
    const text = payloadText(payload)
    const wire = call(() => native.createChild(this.#wire, String(type), text, metaText(meta)))
    return fresh(wire, type, text)
  }

  /**
   * The same event with other members of meta: same id unless given, same payload, same delivery. For middleware around
   * publish, before the event is stored.
   *
   * @throws InvalidEvent for meta that is not valid.
   */
  withMeta(meta: MetaInput): this {
    const [wire, payloadLength, metaLength]: Cut = JSON.parse(
      call(() => native.withMeta(this.#wire, metaText(meta) || '{}')),
    )
    const event = new Event<T>(wire, typeLengthOf(wire), payloadLength, metaLength)
    event.#attempt = this.#attempt
    event.#redelivered = this.#redelivered
    event.#group = this.#group
    event.#receivedAt = this.#receivedAt
    return event as this
  }

  /** A plain object in the wire's shape, made anew at each call. */
  toDict(): EventDict {
    return JSON.parse(this.#wire)
  }

  /** For `JSON.stringify`: as {@link Event.toDict}. Numbers that JavaScript cannot hold are rounded; {@link Event.encode} keeps them. */
  toJSON(): EventDict {
    return this.toDict()
  }

  /** The wire form, byte for byte. */
  encode(): Buffer {
    return Buffer.from(this.#wire)
  }

  /** `order.created 0193…`: never the payload, so that it can be logged. */
  toString(): string {
    return `${this.type} ${this.meta.id}`
  }

  /** @internal */
  [Symbol.for('nodejs.util.inspect.custom')](
    _: number,
    options: object,
    inspect: (value: unknown, options: object) => string,
  ): string {
    const { type, payload, meta, delivery } = this
    return `Event ${inspect({ type, payload, meta, ...(delivery ? { delivery } : {}) }, options)}`
  }
}

/** Types that the core has found valid: most programs have few. */
const VALID_TYPES = new Set<string>()
const MOST_TYPES = 1000

/**
 * What the core makes of a valid type, JSON text and no meta; writing it here saves a crossing, which costs more than
 * all the rest. Ids come from the core, many at once while they are used up within the millisecond that they name.
 */
function plainWire(type: string, payload: string): string {
  const now = Date.now()
  if (now !== ids.made) {
    // Those left over name a millisecond that has passed.
    ids.made = now
    ids.timestamp = new Date(now).toISOString()
    ids.count = Math.max(ids.used >> 2, 1)
    ids.used = 0
    ids.left = 0
  }
  if (ids.left === 0) {
    if (ids.used > 0) ids.count *= 2
    ids.count = Math.min(ids.count, 256)
    ids.texts = native.newIds(ids.count)
    ids.left = ids.count
  }
  const id = ids.texts.substring(36 * --ids.left, 36 * ids.left + 36)
  ids.used++
  return `{"type":"${type}","payload":${payload},"meta":{"id":"${id}","timestamp":"${ids.timestamp}","correlationId":"${id}"}}`
}

const ids = { made: 0, timestamp: '', texts: '', count: 1, left: 0, used: 0 }

function fresh<T>(wire: string, type: string, payload: string): Event<T> {
  return seal(wire, type.length, payload.length, metaLengthOf(wire, type.length, payload.length))
}

/** Of a wire form that ends with its meta. */
function metaLengthOf(wire: string, typeLength: number, payloadLength: number): number {
  return wire.length - (TYPE_AT + typeLength + PAYLOAD_AFTER + payloadLength + META_AFTER) - 1
}

/** `[wire, payload length, meta length]`, as the addon writes it. */
export type Cut = readonly [wire: string, payloadLength: number, metaLength: number]

/** The event of what the addon cut. */
export function uncut([wire, payloadLength, metaLength]: Cut): Event {
  return seal(wire, typeLengthOf(wire), payloadLength, metaLength)
}

/** The same, as delivered to `group` in this process just now. */
export function uncutDelivered([wire, payloadLength, metaLength]: Cut, group: string): Received {
  return deliver(wire, typeLengthOf(wire), payloadLength, metaLength, 1, false, group, Date.now())
}

// An event type has no character that JSON escapes.
function typeLengthOf(wire: string): number {
  return wire.indexOf('"', TYPE_AT) - TYPE_AT
}

function decoded(text: string): Event {
  return uncut(JSON.parse(text))
}
