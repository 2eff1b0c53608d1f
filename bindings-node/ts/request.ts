/**
 * Requests: an event that is published, and the reply that is waited for.
 *
 * @module
 */
import { Batch } from './batch.js'
import { bridge, run } from './bridge.js'
import { InvalidConfig } from './errors.js'
import { Event, type MetaInput, uncut } from './event.js'
import { describeValue, optionsText } from './json.js'
import type { native } from './native.js'

/** Options of one request. */
export interface RequestOptions {
  /** How long to wait for the reply. Default 5000. */
  timeoutMs?: number
  /** Ends the wait when it is aborted; the request rejects with its reason. */
  signal?: AbortSignal
}

/** Makes one request over a bound bus. The arguments are those of `Bus.request`. */
export async function request(
  bus: InstanceType<typeof native.NativeBus>,
  first: string | Event,
  second?: unknown,
  meta?: MetaInput,
  third?: RequestOptions,
): Promise<Event> {
  const isEvent = Event.isEvent(first)
  const { signal, ...options } = ((isEvent ? second : third) ?? {}) as RequestOptions
  if (signal !== undefined && !(signal instanceof AbortSignal)) {
    throw new InvalidConfig(`signal must be an AbortSignal, not ${describeValue(signal)}`)
  }
  signal?.throwIfAborted()
  const batch = new Batch()
  if (isEvent) batch.addEvent(first, '')
  else Batch.add(() => batch, first, second ?? null, meta, '')
  let key = 0
  const asked = run((given) => {
    key = given
    return bus.request(given, batch.bytes, batch.lengths, optionsText(options, 'request'))
  })
  batch.release() // the addon has read it
  return uncut(JSON.parse(signal === undefined ? await asked : await orAborted(asked, signal, () => key)))
}

/** Drops the operation when the signal is aborted first. */
async function orAborted(asked: Promise<string>, signal: AbortSignal, key: () => number): Promise<string> {
  let stop = () => {}
  const aborted = new Promise<never>((_, reject) => {
    stop = () => {
      bridge().forget(key())
      reject(signal.reason)
    }
    signal.addEventListener('abort', stop, { once: true })
  })
  try {
    return await Promise.race([asked, aborted])
  } finally {
    signal.removeEventListener('abort', stop)
  }
}
