// A real redis-server of the tests' own: on a free port of the loopback, with its data in a temporary folder.
import assert from 'node:assert/strict'
import { type ChildProcess, execFile, spawn } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

const DEADLINE = 30_000
// Below what systems give to outgoing connections, which would take the port of a server that is down.
const PORTS = [10_000, 22_000] as const

const running = new Set<RedisServer>()
process.once('exit', () => {
  for (const server of running) server.dispose() // left by a test that was cut short
})

export interface RedisOptions {
  /** Switches the append-only file on; without it nothing is kept. */
  appendfsync?: 'always' | 'everysec' | 'no'
  password?: string
  /** Any other directives, as in redis.conf. */
  more?: Record<string, string>
}

/** Starts a server, and returns when it answers. Use it with `await using`. */
export async function startRedis(options: RedisOptions = {}): Promise<RedisServer> {
  const server = new RedisServer(options)
  running.add(server)
  await server.start(() => randomInt(...PORTS))
  return server
}

export class RedisServer {
  readonly password: string | undefined
  port = 0
  #folder = mkdtempSync(join(tmpdir(), 'polybus-redis-'))
  #config: Record<string, string>
  #process: ChildProcess | undefined

  constructor({ appendfsync, password, more }: RedisOptions) {
    this.password = password
    this.#config = { bind: '127.0.0.1', dir: this.#folder, save: '""', ...more }
    if (appendfsync) Object.assign(this.#config, { appendonly: 'yes', appendfsync })
    if (password) this.#config.requirepass = password
  }

  get address(): string {
    return `127.0.0.1:${this.port}`
  }

  get url(): string {
    return this.password ? `redis://:${this.password}@${this.address}` : `redis://${this.address}`
  }

  get pubsubUrl(): string {
    return this.url.replace('redis://', 'redis+pubsub://')
  }

  async start(port: () => number): Promise<void> {
    const deadline = Date.now() + DEADLINE
    do {
      this.port = port()
      this.#spawn()
    } while (!(await this.#comesUp(deadline)))
  }

  #spawn(): void {
    const lines = Object.entries({ ...this.#config, port: this.port }).map(([name, value]) => `${name} ${value}\n`)
    writeFileSync(join(this.#folder, 'config'), lines.join(''))
    const log = openSync(join(this.#folder, 'log'), 'a')
    this.#process = spawn('redis-server', [join(this.#folder, 'config')], { stdio: ['ignore', log, log] })
    closeSync(log)
    this.#process.unref() // a test that fails to end it does not hang on it
  }

  /** False when it ended by itself, as it does when its port is taken. */
  async #comesUp(deadline: number): Promise<boolean> {
    while (Date.now() < deadline) {
      if (this.#ended) return false
      // Another server may have the port, and answer: this must be ours, and done with loading.
      const info = await this.#ask('INFO', 'server')
      if (info.includes(`process_id:${this.#process?.pid}\r\n`) && (await this.#ask('PING')) === 'PONG\n') return true
      await sleep(5)
    }
    throw new Error(`redis-server does not answer:\n${readFileSync(join(this.#folder, 'log'), 'utf8')}`)
  }

  get #ended(): boolean {
    return this.#process?.exitCode !== null || this.#process.signalCode !== null
  }

  /** Runs a command with redis-cli. An answer that is an error is one here, too. */
  async cli(...command: string[]): Promise<string> {
    const answer = await this.#ask('-e', ...command)
    assert.ok(answer.endsWith('\n'), `redis-cli ${command}: ${answer}`)
    return answer.trimEnd()
  }

  /** What a command answers; when it fails, the error, without an end of line. */
  #ask(...command: string[]): Promise<string> {
    const env = this.password ? { ...process.env, REDISCLI_AUTH: this.password } : process.env
    return new Promise((resolve) => {
      execFile('redis-cli', ['-h', '127.0.0.1', '-p', `${this.port}`, ...command], { env }, (error, told, wrong) =>
        resolve(error ? `${told}${wrong}${error.message}`.trimEnd() : told),
      ).stdin?.end()
    })
  }

  /** Redis's version, like `[7, 0, 15]`. */
  async version(): Promise<[number, number, number]> {
    const [, version] = (await this.cli('INFO', 'server')).match(/redis_version:(\d+\.\d+\.\d+)/) ?? []
    return version?.split('.').map(Number) as [number, number, number]
  }

  /** `kill -9`: nothing is flushed. */
  kill(): Promise<void> {
    return this.#end('SIGKILL')
  }

  /** An orderly end. */
  stop(): Promise<void> {
    return this.#end('SIGTERM')
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    if (this.#ended || !this.#process) return
    const exit = once(this.#process, 'exit', { signal: AbortSignal.timeout(DEADLINE) })
    this.#process.ref()
    this.#process.kill(signal)
    await exit
  }

  /** Starts again on the same port, with what it kept. */
  async restart(): Promise<void> {
    await this.stop()
    await this.start(() => this.port)
  }

  dispose(): void {
    this.#process?.kill('SIGKILL')
    rmSync(this.#folder, { recursive: true, force: true })
    running.delete(this)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.kill()
    this.dispose()
  }
}
