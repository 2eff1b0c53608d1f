/**
 * What runs around handlers and around publish.
 *
 * Around handlers a chain is made when middleware is added, not for each event; without middleware there is none.
 *
 * @module
 */
import type { Handler, HandlerContext } from './bridge.js'
import { InvalidConfig } from './errors.js'
import type { Event, Received } from './event.js'
import { describeValue } from './json.js'
import type { Receipt } from './views.js'

/** Runs the rest, and resolves to what it returns; with an argument, the rest gets that event instead. */
export type HandleNext = (event?: Received) => Promise<unknown>

/** Runs around every handler of a bus. What it throws, the handler threw; not calling `next` means: done without it. */
export type HandleMiddleware = (event: Received, next: HandleNext, context: HandlerContext) => unknown

/** Publishes, and resolves to the receipt; with an argument, publishes that event instead. */
export type PublishNext = (event?: Event) => Promise<Receipt>

/** Runs around every publish of a bus. What it throws, `publish` throws; not calling `next` means: not published. */
export type PublishMiddleware = (
  event: Event,
  next: PublishNext,
) => Receipt | undefined | Promise<Receipt | undefined | Nothing>

// biome-ignore lint/suspicious/noConfusingVoidType: of an async function that does not return
type Nothing = void

/** Options of {@link Bus.use}. */
export interface UseOptions {
  /** Around handlers, which is the default, or around publish. */
  on?: 'handle' | 'publish'
}

/** Refuses what cannot be middleware. */
export function checkMiddleware(middleware: unknown, options: UseOptions): 'handle' | 'publish' {
  if (typeof middleware !== 'function') {
    throw new InvalidConfig(`the middleware must be a function, not ${describeValue(middleware)}`)
  }
  const { on = 'handle' } = options ?? {}
  if (on !== 'handle' && on !== 'publish') {
    throw new InvalidConfig(`on=${describeValue(on)} is not valid; known: handle, publish`)
  }
  return on
}

/** Adds to the end, or in the place of the one of that name. */
export function added<M extends (...args: any[]) => unknown>(list: readonly M[], one: M, replace: boolean): M[] {
  const at = replace && one.name !== '' ? list.findIndex((other) => other.name === one.name) : -1
  return at < 0 ? [...list, one] : list.with(at, one)
}

/** One handler that runs all: the first is the outermost. */
export function around(list: readonly HandleMiddleware[], handler: Handler): Handler {
  return list.reduceRight<Handler>(
    (inner, middleware) => (event, context) =>
      // The rest of the chain is async, so that what a handler throws is a rejection.
      middleware(event, async (other = event) => await inner(other, context), context),
    handler,
  )
}

/** One event through the chain. What the middleware return is the receipt; if they return nothing, the real one. */
export async function publishThrough(
  list: readonly PublishMiddleware[],
  event: Event,
  send: (event: Event) => Promise<Receipt>,
): Promise<Receipt> {
  let sent: Receipt | undefined
  const step = async (at: number, event: Event): Promise<Receipt> => {
    const middleware = list[at]
    if (middleware === undefined) {
      sent = await send(event)
      return sent
    }
    const said = await middleware(event, (other = event) => step(at + 1, other))
    return (said as Receipt | undefined) ?? sent ?? { id: event.meta.id }
  }
  return await step(0, event)
}

/** Each event through a chain of its own, at the same time; when all have called on, all are sent together. */
export async function publishManyThrough(
  list: readonly PublishMiddleware[],
  events: readonly Event[],
  sendAll: (events: readonly Event[], indexes: readonly number[]) => Promise<Receipt[]>,
): Promise<Receipt[]> {
  const arrived: ({ event: Event; resolve(receipt: Receipt): void; reject(error: unknown): void } | undefined)[] = []
  let undecided = events.length
  let ready = () => {}
  const allDecided = new Promise<void>((resolve) => {
    ready = resolve
  })
  const failed: unknown[] = []
  const decided = () => {
    if (--undecided === 0) ready()
  }
  let sent = false
  const ends = events.map(async (event, index) => {
    const send = async (event: Event): Promise<Receipt> => {
      // A middleware that tries again.
      if (sent || arrived[index] !== undefined) return (await sendAll([event], [index]))[0] as Receipt
      const receipt = new Promise<Receipt>((resolve, reject) => {
        arrived[index] = { event, resolve, reject }
      })
      decided()
      return await receipt
    }
    try {
      return await publishThrough(list, event, send)
    } catch (error) {
      failed.push(error)
      throw error
    } finally {
      if (arrived[index] === undefined) decided()
    }
  })
  const settled = Promise.allSettled(ends)
  if (events.length > 0) await allDecided
  sent = true
  const order = [...arrived.keys()].filter((index) => arrived[index] !== undefined)
  const going = order.map((index) => arrived[index]) as {
    event: Event
    resolve(r: Receipt): void
    reject(e: unknown): void
  }[]
  if (failed.length > 0) {
    for (const one of going) one.reject(failed[0])
    await settled
    throw failed[0]
  }
  try {
    const receipts =
      going.length === 0
        ? []
        : await sendAll(
            going.map(({ event }) => event),
            order,
          )
    going.forEach((one, at) => {
      one.resolve(receipts[at] as Receipt)
    })
  } catch (error) {
    renumber(error, order)
    for (const one of going) one.reject(error)
  }
  await settled
  return await Promise.all(ends)
}

/** Failures say where in the caller's list they are. */
function renumber(error: unknown, order: readonly number[]): void {
  const { failures } = error as { failures?: { index: number }[] }
  for (const failure of failures ?? []) failure.index = order[failure.index] ?? failure.index
}
