// The relay, from TypeScript: on a real PostgreSQL, and through a driver of the application.
import assert from 'node:assert/strict'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import pg from 'pg'
import { Bus, Event, InvalidConfig, NotFound, PayloadTooLarge, PolybusError } from 'polybus'
import { Outbox, Relay } from 'polybus/outbox'
import { until } from './support/until.ts'

const program = new URL('../support/database_server.py', import.meta.url).pathname
const venv = new URL('../../.venv/bin/python', import.meta.url).pathname

describe('a relay on PostgreSQL', () => {
  const server = spawn(existsSync(venv) ? venv : 'python3', [program, 'postgres'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const outbox = new Outbox()
  let port = 0
  before(async () => {
    port = Number(String((await once(server.stdout, 'data'))[0]))
  })
  after(async () => {
    server.stdin.end()
    await once(server, 'exit')
  })

  /** A database with an outbox, and a bus whose handler notes what comes. */
  async function shop() {
    const name = `relay_${Math.random().toString(36).slice(2)}`
    const url = (database: string) => `postgres://postgres@127.0.0.1:${port}/${database}`
    const admin = new pg.Client(url('postgres'))
    await admin.connect()
    await admin.query(`CREATE DATABASE ${name}`)
    await admin.end()
    const client = new pg.Client(url(name))
    await client.connect()
    for (const statement of outbox.ddl('postgres')) await client.query(statement)
    const bus = new Bus(`memory://${name}`, { service: 'shop' })
    const seen: Event[] = []
    bus.subscribe('**', (event) => void seen.push(event), { name: 'all' })
    await bus.start()
    const store = async (...payloads: unknown[]) => {
      await client.query('BEGIN')
      for (const payload of payloads) await outbox.store(Event.create('order.placed', payload), client)
      await client.query('COMMIT')
    }
    return {
      url: url(name),
      admin: url('postgres'),
      bus,
      client,
      seen,
      store,
      async [Symbol.asyncDispose]() {
        await bus.close()
        await client.end()
      },
    }
  }

  test('what was committed is published', async () => {
    await using made = await shop()
    await made.store(1, 'größer')
    const relay = new Relay(made.url, made.bus)
    const batch = await relay.relayBatch()
    assert.deepEqual([batch.attempted, batch.relayed, batch.deadLettered, batch.outage], [2, 2, 0, null])
    await until(() => made.seen.length === 2)
    assert.deepEqual(new Set(made.seen.map((event) => event.payload)), new Set([1, 'größer']))
    assert.equal((await relay.stats()).pending, 0)
    assert.equal(await relay.purge({ olderThanMs: 86_400_000 }), 0)
    assert.match(await relay.metrics(), /polybus_relay_relayed_total\{table="polybus_outbox"\} 2/)
  })

  test('it runs until it is stopped or its signal is aborted', async () => {
    await using made = await shop()
    const relay = new Relay(made.url, made.bus, { pollIntervalMs: 10 })
    const controller = new AbortController()
    for (const [number, stop] of [() => relay.stop(), () => controller.abort()].entries()) {
      const running = relay.run({ signal: controller.signal })
      await made.store(number)
      await until(() => made.seen.length === number + 1)
      assert.ok(relay.health().healthy)
      stop()
      await running
      assert.equal(relay.health().workers, 0)
    }
  })

  test('a row that holds no event is dead, and can be replayed or purged', async () => {
    await using made = await shop()
    await made.client.query("INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'a', 'no event')")
    const relay = new Relay(made.url, made.bus, { failurePolicy: () => null })
    assert.equal((await relay.relayBatch()).malformed, 1)
    const [dead] = await relay.deadLetters()
    assert.ok(dead !== undefined && dead.deadAt >= dead.createdAt && dead.lastError.startsWith('invalid_event: '))
    assert.deepEqual(await relay.deadLetters({ after: dead.seq }), [])
    await assert.rejects(relay.replay('nobody'), NotFound)
    assert.equal(await relay.replay('x'), 1)
    assert.equal((await relay.relayBatch()).deadLettered, 1)
    assert.equal(await relay.purgeDead(), 1)
  })

  test('a policy decides about what the bus refuses', async () => {
    await using made = await shop()
    // Too much around its payload: it can be read, and no bus takes it.
    const wire = JSON.stringify(Event.create('order.placed', 1, { headers: { h: 'x'.repeat(65_300) } }))
    const sql = "INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'order.placed', $1)"
    await made.client.query(sql, [wire.replace('"h":"', `"h":"${'y'.repeat(300)}`)])
    const folder = mkdtempSync(join(tmpdir(), 'polybus-relay-'))
    try {
      await using bus = new Bus(`sqlite:///${join(folder, 'bus.db')}`, { service: 'shop' })
      const asked: [number, boolean][] = []
      const answers = [0, new Date(), null]
      const relay = new Relay(made.url, bus, {
        async failurePolicy(attempts, error) {
          asked.push([attempts, error instanceof PayloadTooLarge])
          return answers[attempts - 1] ?? null
        },
      })
      for (const dead of [0, 0, 1]) {
        const batch = await relay.relayBatch()
        assert.deepEqual([batch.publishFailed, batch.deadLettered], [1, dead])
      }
      assert.deepEqual(asked, [
        [1, true],
        [2, true],
        [3, true],
      ])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  test('bad input', async () => {
    await using made = await shop()
    const wrong: [() => unknown, RegExp][] = [
      [() => new Relay('mysql://h/d', made.bus), /MySQL/],
      [() => new Relay('postgres://u:secret@h/d?sslmod=x', made.bus), /did you mean sslmode/],
      [() => new Relay(7 as never, made.bus), /7/],
      [() => new Relay(made.url, made.bus, { worker: 2 } as never), /workers/],
      [() => new Relay(made.url, made.bus, { batch: 0 }), /batch=0/],
    ]
    for (const [make, words] of wrong)
      assert.throws(
        make,
        (error) => error instanceof PolybusError && words.test(error.message) && !/secret/.test(error.message),
      )
    await assert.rejects(
      new Relay(made.admin, made.bus).run(),
      (error) => error instanceof InvalidConfig && /polybus outbox ddl --dialect postgres/.test(error.message),
    )
  })
})
