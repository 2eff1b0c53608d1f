/**
 * Closing on signals.
 *
 * @module
 */
import { constants } from 'node:os'
import { clearTimeout, setTimeout } from 'node:timers'
import { bridge } from './bridge.js'
import type { Bus } from './bus.js'
import { describe } from './json.js'
import { DRAIN_MS } from './subscription.js'

/** Options of {@link closeOnSignals}. */
export interface CloseOnSignalsOptions {
  /** Default `SIGTERM` and `SIGINT`. */
  signals?: readonly NodeJS.Signals[]
  /** How long running handlers may take to end. Default 10 000. */
  timeoutMs?: number
  /** What must be done before the buses close, such as `() => server.close()`; waited for up to `timeoutMs`. */
  before?: () => unknown
  /** Exit when all is closed; otherwise the process ends when nothing holds it any more. Default true. */
  exit?: boolean
}

/**
 * Closes the buses at the first signal: intake stops, running handlers may end, the rest is handed back, so that another
 * process gets it at once and the attempt does not count. Then the process exits with 0. A second signal hands back at
 * once, and the process exits with 128 and the signal's number.
 *
 * A second call for the same bus replaces the first, so a module may be evaluated again. Returns a function that
 * stops listening. Signals reach only the main thread.
 */
export function closeOnSignals(buses: Bus<any> | readonly Bus<any>[], options: CloseOnSignalsOptions = {}): () => void {
  const { signals = ['SIGTERM', 'SIGINT'], timeoutMs = DRAIN_MS, before, exit = true } = options
  const all: readonly Bus<any>[] = Array.isArray(buses) ? buses : [buses as Bus<any>]
  const { closers } = bridge()
  let closing = false
  let code = 0

  const close = async (timeoutMs: number) => {
    const closed = await Promise.allSettled(all.map((bus) => bus.close({ timeoutMs })))
    for (const result of closed) if (result.status === 'rejected') complain(result.reason)
  }
  const end = () => {
    stop()
    if (exit) process.exit(code)
  }
  const first = async () => {
    if (before !== undefined) await atMost(timeoutMs, before).catch(complain)
    await close(timeoutMs)
    end()
  }
  const listener = (signal: NodeJS.Signals) => {
    if (!closing) {
      closing = true
      void first()
      return
    }
    code = 128 + constants.signals[signal]
    void close(0).then(end)
  }
  const stop = () => {
    for (const signal of signals) process.off(signal, listener)
    for (const bus of all) if (closers.get(bus) === stop) closers.delete(bus)
  }

  for (const bus of all) {
    closers.get(bus)?.()
    closers.set(bus, stop)
  }
  for (const signal of signals) process.on(signal, listener)
  return stop
}

function complain(error: unknown): void {
  console.error(`polybus: while closing on a signal: ${describe(error)}`)
}

async function atMost(ms: number, call: () => unknown): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms)
  })
  try {
    await Promise.race([call(), late])
  } finally {
    clearTimeout(timer)
  }
}
