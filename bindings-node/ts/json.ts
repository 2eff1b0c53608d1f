/**
 * Payloads as JSON text, strictly: what JSON would silently change or lose is refused, by its path.
 *
 * @module
 */
import { InvalidConfig, InvalidEvent } from './errors.js'

/** Deepest nesting of a payload; the core has the same. */
const MAX_DEPTH = 64

const strictUtf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/**
 * The JSON text of a payload. A `Uint8Array` is JSON text already (`event.raw`) and is passed on byte for byte.
 *
 * @throws {@link InvalidEvent} for what JSON cannot say: NaN, bigint, functions, symbols, cycles, class instances
 * without `toJSON`, more than 64 levels.
 */
export function payloadText(payload: unknown): string {
  if (payload instanceof Uint8Array) {
    try {
      // The core drops white space around a payload, and lengths are counted here.
      return strictUtf8.decode(payload).replace(/^[ \t\n\r]+|[ \t\n\r]+$/g, '')
    } catch (cause) {
      throw new InvalidEvent('the payload is not UTF-8 text; a Uint8Array must hold JSON text', { cause })
    }
  }
  let text: string | undefined
  try {
    if (fine(payload, MAX_DEPTH)) text = JSON.stringify(payload)
  } catch (cause) {
    // A getter or toJSON of the user threw.
    throw new InvalidEvent(`the payload cannot be read: ${describe(cause)}`, { cause })
  }
  if (text === undefined) throw new InvalidEvent(fault(payload, 'payload', []) ?? 'the payload is not JSON')
  return text
}

/** One walk without allocation; on doubt, {@link fault} finds out what is wrong and where. */
function fine(value: unknown, depth: number): boolean {
  switch (typeof value) {
    case 'string':
    case 'boolean':
    case 'undefined':
      return true
    case 'number':
      return value - value === 0
    case 'object':
      return value === null || fineObject(value, depth, true)
    default:
      return false
  }
}

function fineObject(value: object, depth: number, convert: boolean): boolean {
  if (depth === 0) return false
  if (convert && typeof (value as Convertible).toJSON === 'function') {
    const converted = (value as Convertible).toJSON('')
    // JSON.stringify does not convert what toJSON returned.
    if (typeof converted === 'object' && converted !== null) return fineObject(converted, depth, false)
    return fine(converted, depth)
  }
  if (Array.isArray(value)) {
    for (let index = 0; index < value.length; index++) {
      if (!fine(value[index], depth - 1)) return false
    }
    return true
  }
  if (!isPlain(value)) return false
  for (const name in value) {
    if (!fine((value as Record<string, unknown>)[name], depth - 1)) return false
  }
  return true
}

interface Convertible {
  toJSON(key: string): unknown
}

/** An object literal, of this realm or of another (`vm`, jest). */
function isPlain(value: object): boolean {
  const prototype = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null || Object.getPrototypeOf(prototype) === null
}

/** The first thing that is wrong with `value`, or `undefined`. */
function fault(value: unknown, path: string, above: readonly object[]): string | undefined {
  switch (typeof value) {
    case 'string':
    case 'boolean':
      return undefined
    case 'number':
      return Number.isFinite(value) ? undefined : `${path} is ${value}; JSON has no such number`
    case 'undefined':
      return above.length > 0 ? undefined : `${path} is undefined; pass null if the event has no payload`
    case 'bigint':
      return `${path} is a bigint; pass it as a string, or as JSON text in a Uint8Array`
    case 'object':
      return value === null ? undefined : faultOfObject(value, path, above)
    default:
      return `${path} is a ${typeof value}; JSON has no such value`
  }
}

function faultOfObject(value: object, path: string, above: readonly object[]): string | undefined {
  if (above.includes(value)) return `${path} refers back to an object that contains it; JSON cannot say that`
  if (above.length >= MAX_DEPTH) return `${path} is nested deeper than ${MAX_DEPTH} levels`
  const inside = [...above, value]
  if (typeof (value as Convertible).toJSON === 'function') {
    const converted = (value as Convertible).toJSON('')
    return converted === value ? members(value, path, inside) : fault(converted, path, inside)
  }
  return members(value, path, inside)
}

function members(value: object, path: string, inside: readonly object[]): string | undefined {
  if (Array.isArray(value)) {
    for (let index = 0; index < value.length; index++) {
      const found = fault(value[index], `${path}[${index}]`, inside)
      if (found !== undefined) return found
    }
    return undefined
  }
  if (!isPlain(value)) {
    const name = value.constructor?.name || 'class'
    return `${path} is a ${name}; pass a plain object, or give it a toJSON method`
  }
  for (const [name, member] of Object.entries(value)) {
    const step = /^[A-Za-z_$][\w$]*$/.test(name) ? `.${name}` : `[${JSON.stringify(name)}]`
    const found = fault(member, path + step, inside)
    if (found !== undefined) return found
  }
  return undefined
}

/** The JSON text of `meta`, or nothing; the core checks its members. */
export function metaText(meta: object | undefined | null): string {
  if (meta === undefined || meta === null) return ''
  if (typeof meta !== 'object' || Array.isArray(meta)) throw new InvalidEvent('meta must be an object')
  const found = fault(meta, 'meta', [])
  if (found !== undefined) throw new InvalidEvent(found)
  return JSON.stringify(meta)
}

/** The JSON text of options. What JSON would turn into null is named, so that the core can refuse it. */
export function optionsText(options: object | undefined | null, what: string): string {
  if (options === undefined || options === null) return '{}'
  if (typeof options !== 'object' || Array.isArray(options))
    throw new InvalidConfig(`${what} options must be an object`)
  return JSON.stringify(options, (_, value) => {
    if (typeof value === 'number' && !Number.isFinite(value)) return String(value)
    return typeof value === 'function' || typeof value === 'bigint' || typeof value === 'symbol' ? typeof value : value
  })
}

/** What somebody passed where it does not belong, in a few words. */
export function describeValue(value: unknown): string {
  if (typeof value === 'object' && value !== null) return Array.isArray(value) ? 'an array' : 'an object'
  return typeof value === 'function' ? 'a function' : String(value)
}

/** What was thrown, in words. Never throws, whatever it was. */
export function describe(error: unknown): string {
  const { name, message } = failureOf(error)
  return message === '' ? name : `${name}: ${message}`
}

/** Name, message and stack of what a handler threw. Never throws: getters may. */
export function failureOf(error: unknown): { name: string; message: string; stack: string } {
  const read = (what: () => unknown): string => {
    try {
      const value = what()
      return value === undefined || value === null ? '' : String(value)
    } catch {
      return ''
    }
  }
  if (typeof error !== 'object' || error === null) {
    return { name: error === null ? 'null' : typeof error, message: read(() => String(error)), stack: '' }
  }
  const thrown = error as Partial<Error>
  const given = read(() => thrown.name)
  const name = given === '' || given === 'Error' ? read(() => thrown.constructor?.name) : given
  const message = read(() => thrown.message)
  return {
    name: name || 'Error',
    message: message || (thrown instanceof Error ? '' : read(() => JSON.stringify(error))),
    stack: read(() => thrown.stack),
  }
}
