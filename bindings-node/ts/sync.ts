/**
 * A publish that this process handles itself.
 *
 * @module
 */
import { clearTimeout, setTimeout } from 'node:timers'
import { abort, Context, type Runner } from './bridge.js'
import { call, HandlerError, HandlerTimeout, Unsupported } from './errors.js'
import type { Received } from './event.js'
import { describe } from './json.js'
import { native } from './native.js'

/** Runs one handler of a synchronous publish, for as long as its timeout allows. */
export async function handleNow(runner: Runner, event: Received): Promise<void> {
  const context = new Context(runner, 0)
  const { timeoutMs, name } = runner
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    if (timeoutMs === null) return
    timer = setTimeout(() => {
      abort(context, 0)
      reject(new HandlerTimeout(`handler ${name} ran longer than ${timeoutMs} ms; later handlers were not run`))
    }, timeoutMs)
  })
  const handled = (async () => {
    try {
      await runner.handler(runner.takesBatches ? [event] : event, context)
    } catch (cause) {
      throw new HandlerError(`handler ${name} failed on ${event.type}: ${describe(cause)}`, { cause })
    }
  })()
  try {
    await (timeoutMs === null ? handled : Promise.race([handled, late]))
  } finally {
    clearTimeout(timer)
  }
}

/** What the options of a publish say about its mode. */
export function isSync(schedule: string, otherwise: boolean): boolean {
  if (schedule === '') return otherwise
  const sync = call(() => native.checkPublishOptions(schedule)) ?? otherwise
  if (sync && /"(delay|expiresIn)Ms":/.test(schedule)) {
    throw new Unsupported('a synchronous publish runs the handlers now: leave out delayMs and expiresInMs')
  }
  return sync
}
