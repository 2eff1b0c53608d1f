// A process that does one of the acts of ../children/life.mjs, and tells about it.
import assert from 'node:assert/strict'
import { type ChildProcessByStdio, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import type { Readable, Writable } from 'node:stream'
import { fileURLToPath } from 'node:url'

/** Of the programs in ../children. */
export const script = (name: string) => fileURLToPath(new URL(`../children/${name}.mjs`, import.meta.url))
export const LIMIT = 15_000

export class Child {
  readonly process: ChildProcessByStdio<Writable, Readable, null>
  readonly told: AsyncIterator<string>
  readonly ended: Promise<[number | null, string | null]>

  constructor(what: string, url: string, program = 'life') {
    this.process = spawn(process.execPath, [script(program), what, url], { stdio: ['pipe', 'pipe', 'inherit'] })
    this.told = createInterface({ input: this.process.stdout })[Symbol.asyncIterator]()
    this.ended = once(this.process, 'close', { signal: AbortSignal.timeout(LIMIT) }) as never
    this.ended.catch(() => this.process.kill('SIGKILL'))
  }

  async tells(): Promise<unknown> {
    const { value } = await this.told.next()
    return value === undefined ? undefined : JSON.parse(value)
  }
}

/** Runs an act to its end; resolves to what it told. */
export async function runs(what: string, url: string): Promise<unknown[]> {
  const child = new Child(what, url)
  const told = []
  for (let next = await child.tells(); next !== undefined; next = await child.tells()) told.push(next)
  assert.deepEqual(await child.ended, [0, null], what)
  return told
}
