// What the measured Node programs share: one payload, one clock, and lines of JSON to and from the runner.
import { readSync } from 'node:fs'

// By path: a package of this folder has its own package.json, so 'polybus' would not resolve to the repository.
export const polybus = () => import('../../bindings-node/dist/index.js')
export const polybusOutbox = () => import('../../bindings-node/dist/outbox/index.js')

/** What the runner asks for: one JSON object, the first argument. */
export const ask = JSON.parse(process.argv[2] ?? '{}')

export const TYPE = 'order.created'
export const BATCH = 100
export const IN_FLIGHT = 1024

/** CLOCK_MONOTONIC on Linux, the clock of Python's `time.monotonic_ns` too: comparable between processes. */
export const now = () => Number(process.hrtime.bigint())

const id = (i) => `order-${String(i).padStart(8, '0')}`
const NOTE = 'x'.repeat(200 - JSON.stringify({ orderId: id(0), sent: 0, note: '' }).length)

/** 200 bytes as JSON; a `sent` time makes it a few more. */
export const payload = (i, sent = 0) => ({ orderId: id(i), sent, note: NOTE })

/** [start, end) of each batch. */
export function* batches(count, size) {
  for (let start = 0; start < count; start += size) yield [start, Math.min(start + size, count)]
}

export const range = (start, end, make) => Array.from({ length: end - start }, (_, i) => make(start + i))

export const say = (facts) => console.log(JSON.stringify(facts))

/** Tells the runner that all is open, and blocks until it says go. */
export function waitForGo() {
  say({ ready: true })
  readSync(0, Buffer.alloc(64))
}

export const rate = (count, started) => (count * 1e9) / (now() - started)

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))

/** In milliseconds. The first 20 are left out: they pay for compilation and caches. */
export function percentiles(nanoseconds) {
  const rest = nanoseconds.slice(20).sort((a, b) => a - b)
  const at = (part) => rest[Math.floor(rest.length * part)] / 1e6
  return { p50: at(0.5), p99: at(0.99), max: rest[rest.length - 1] / 1e6 }
}

/** 0, 1, 2 … at that rate; one that comes late does not delay the next one. */
export async function* pace(count, perSecond) {
  const started = now()
  for (let i = 0; i < count; i++) {
    const wait = (started + (i * 1e9) / perSecond - now()) / 1e6
    if (wait > 0) await sleep(wait)
    yield i
  }
}

/** So many loops, each awaits one publish at a time; how many there were in all. */
export async function spread(count, publishers, publish) {
  const each = Math.floor(count / publishers)
  const publisher = async (first) => {
    for (let i = first; i < first + each; i++) await publish(i)
  }
  await Promise.all(range(0, publishers, (n) => publisher(n * each)))
  return each * publishers
}
