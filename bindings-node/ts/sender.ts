/**
 * Publishes on their way to the core: those of one turn of the event loop cross together, each for itself.
 *
 * @module
 */
import { Batch } from './batch.js'
import { bridge } from './bridge.js'
import { Failed, fromNative } from './errors.js'
import type { Event, MetaInput } from './event.js'
import type { native } from './native.js'
import type { Receipt } from './views.js'

/** So many do not wait for the end of the turn. */
const MOST = 256
/** Length of the ids in the short form of receipts; see bindings-node/src/receipts.rs. */
const ID = 36

interface Waiting {
  resolve(receipt: Receipt): void
  reject(failure: unknown): void
}

/** Collects the publishes of one bus. */
export class Sender {
  readonly #native: InstanceType<typeof native.NativeBus>
  #batch: Batch | undefined
  #waiting: Waiting[] = []

  constructor(bus: InstanceType<typeof native.NativeBus>) {
    this.#native = bus
  }

  /**
   * A publish of an event that the core makes. Rejects with what `fromNative` takes.
   *
   * @throws InvalidEvent
   */
  add(type: unknown, payload: unknown, meta: MetaInput | undefined, schedule: string): Promise<Receipt> {
    Batch.add(this.#open, type, payload, meta, schedule)
    return this.#receipt()
  }

  /** The same of an event that there is. */
  addEvent(event: Event, schedule: string): Promise<Receipt> {
    this.#open().addEvent(event, schedule)
    return this.#receipt()
  }

  /** Hands over what waits: called at the end of the turn, and before anything that comes after it. */
  readonly flush = (): void => {
    const batch = this.#batch
    if (batch === undefined) return
    const waiting = this.#waiting
    this.#batch = undefined
    this.#waiting = []
    bridge().leave(this.flush)
    const failed = (failure: unknown) => {
      for (const one of waiting) one.reject(failure)
    }
    try {
      const sent = bridge().operation((key) => this.#native.publishEach(key, batch.bytes, batch.lengths, batch.count))
      batch.release() // the addon has read it
      if (typeof sent === 'string') settle(waiting, sent)
      else sent.then((text) => settle(waiting, text), failed)
    } catch (failure) {
      failed(failure)
    }
  }

  readonly #open = (): Batch => {
    if (this.#batch === undefined) {
      this.#batch = new Batch()
      bridge().enter(this.flush)
      queueMicrotask(this.flush)
    }
    return this.#batch
  }

  #receipt(): Promise<Receipt> {
    const receipt = new Promise<Receipt>((resolve, reject) => this.#waiting.push({ resolve, reject }))
    if (this.#waiting.length === MOST) this.flush()
    return receipt
  }
}

function settle(waiting: readonly Waiting[], text: string): void {
  if (text.startsWith('=')) {
    const receipts = receiptsOf(text)
    for (let index = 0; index < waiting.length; index++) {
      ;(waiting[index] as Waiting).resolve(receipts[index] as Receipt)
    }
    return
  }
  const outcomes: (Receipt | { error: string })[] = JSON.parse(text)
  for (const [index, one] of waiting.entries()) {
    const outcome = outcomes[index] as Receipt | { error: string }
    if ('error' in outcome) one.reject(new Failed(outcome.error))
    else one.resolve(outcome)
  }
}

/** Awaits one; a failure becomes an error whose stack is the caller's. */
export async function receiptOf(sent: Promise<Receipt>): Promise<Receipt> {
  try {
    return await sent
  } catch (failure) {
    throw fromNative(failure)
  }
}

/** What the addon writes of receipts: `=` and lines of id and position, or JSON. */
export function receiptsOf(text: string): Receipt[] {
  if (!text.startsWith('=')) return JSON.parse(text)
  const receipts: Receipt[] = []
  for (let at = 1; at < text.length; ) {
    const end = text.indexOf('\n', at + ID)
    receipts.push({ id: text.substring(at, at + ID), position: text.substring(at + ID, end) })
    at = end + 1
  }
  return receipts
}
