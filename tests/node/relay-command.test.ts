// `polybus relay` as the npm package installs it.
import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { after, before, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { Event } from 'polybus'
import { Outbox } from 'polybus/outbox'
import { type Database, makeDatabase, stopServers } from './support/databases.ts'

const SECRET = 's3cr3t-p4ss'
const NOWHERE = `postgres://shop:${SECRET}@127.0.0.1:1/shop`
const folder = mkdtempSync(join(tmpdir(), 'polybus-command-'))
const bus = `sqlite:///${join(folder, 'bus.db')}`
const root = join(import.meta.dirname, '..', '..')
const command = join(root, JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).bin.polybus)
const env = { ...process.env, POLYBUS_RELAY_DB: '', POLYBUS_URL: '' }

let db: Database
before(async () => {
  db = await makeDatabase('postgres', folder)
})
after(async () => {
  await db?.close()
  await stopServers()
  rmSync(folder, { recursive: true, force: true })
})

/** Runs the program of the package's `bin` to its end; that npx finds it is tested in tests/dist. */
async function relay(args: string[], more: Record<string, string> = {}) {
  return new Promise<{ code: number; out: string; err: string }>((resolve) => {
    const options = { cwd: root, env: { ...env, ...more }, timeout: 60_000 }
    execFile(process.execPath, [command, 'relay', ...args], options, (error, out, err) =>
      resolve({ code: error === null ? 0 : Number(error.code), out, err }),
    )
  })
}

async function store(...payloads: unknown[]): Promise<void> {
  const client = new pg.Client(db.url)
  await client.connect()
  await client.query('BEGIN')
  await new Outbox().store(
    payloads.map((payload) => Event.create('order.placed', payload)),
    client,
  )
  await client.query('COMMIT')
  await client.end()
}

const states = async () =>
  (await db.query('SELECT DISTINCT status FROM polybus_outbox')).map((row) => row.status).join(' ')

test('relays what is there, once', async () => {
  await store(1, 2, 3)
  assert.deepEqual(await relay(['--db', db.url, '--bus', bus, '--once', '--workers', '2']), {
    code: 0,
    out: '3 events relayed, 0 dead letters\n',
    err: '',
  })
  await store(4)
  assert.deepEqual(await relay(['--once'], { POLYBUS_RELAY_DB: db.url, POLYBUS_URL: bus }), {
    code: 0,
    out: '1 events relayed, 0 dead letters\n',
    err: '',
  })
})

test('runs until SIGTERM, and serves its pages', async () => {
  const args = ['relay', '--db', db.url, '--bus', bus, '--workers', '3', '--http', '127.0.0.1:0']
  const running = spawn(process.execPath, [command, ...args], { env, stdio: 'pipe' })
  const ended = once(running, 'exit')
  try {
    const lines = createInterface({ input: running.stderr })
    let address = ''
    for await (const line of lines) {
      address = /served at (http:\/\/[\d.:]+)\/health/.exec(line)?.[1] ?? ''
      if (address) break
    }
    const deadline = Date.now() + 30_000
    for (;;) {
      const answer = await fetch(`${address}/health`)
      const health = (await answer.json()) as Record<string, unknown>
      assert.equal(answer.status, health.healthy ? 200 : 503)
      if (health.healthy && health.workers === 3) break
      assert.ok(Array.isArray(health.why) && Date.now() < deadline)
      await sleep(10)
    }
    assert.match(await (await fetch(`${address}/metrics`)).text(), /polybus_relay_workers\{table="polybus_outbox"\} 3/)
    assert.equal((await fetch(`${address}/nothing`)).status, 404)
    assert.equal((await fetch(`${address}/health`, { method: 'POST' })).status, 405)
    await store(5)
    while ((await states()) !== 'delivered') await sleep(10)
    running.kill('SIGTERM')
    assert.deepEqual(await ended, [0, null])
  } finally {
    running.kill('SIGKILL')
  }
})

test('bad arguments name what is right, and no secret', async () => {
  const given = ['--db', NOWHERE, '--bus', 'memory://']
  const cases: [string[], number, RegExp][] = [
    [[...given, '--workers', '0'], 2, /1\.\.=64/],
    [[...given, '--http', 'localhost:1'], 2, /such as 127\.0\.0\.1:9187/],
    [[...given, '--http', '127.0.0.1:0', '--once'], 2, /cannot be used with/],
    [['--bus', 'memory://'], 1, /POLYBUS_RELAY_DB/],
    [['--db', NOWHERE], 1, /POLYBUS_URL/],
    [['--db', `ftp://u:${SECRET}@h/d`, '--bus', 'memory://'], 1, /postgres:\/\/user:password@host\/database/],
    [['--db', `${NOWHERE}?sslmod=x`, '--bus', 'memory://'], 1, /did you mean sslmode/],
    [['--db', NOWHERE, '--bus', `kafka://u:${SECRET}@h`], 1, /kafka/],
    [['--db', NOWHERE, '--bus', `redis://u:${SECRET}@h:port`], 1, /redis/],
    [[...given, '--once'], 1, /cannot be reached/],
  ]
  for (const [args, code, words] of cases) {
    const said = await relay(args)
    assert.deepEqual([said.code, said.out], [code, ''], `${args}: ${said.err}`)
    assert.match(said.err, words)
    assert.ok(!said.err.includes(SECRET), said.err)
  }
  const taken = createServer().listen(0, '127.0.0.1')
  await once(taken, 'listening')
  const address = `127.0.0.1:${(taken.address() as { port: number }).port}`
  const said = await relay(['--db', db.url, '--bus', bus, '--http', address])
  taken.close()
  assert.equal(said.code, 1)
  assert.match(said.err, /cannot be used.*another process has this port/)
})
