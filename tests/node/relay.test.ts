// The relay, from TypeScript: on a real PostgreSQL and MariaDB, and through drivers of the application.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, test } from 'node:test'
import mysql from 'mysql2/promise'
import pg from 'pg'
import { Bus, Event, InvalidConfig, NotFound, PayloadTooLarge, PolybusError } from 'polybus'
import { type Executor, Outbox, Relay } from 'polybus/outbox'
import { makeDatabase, stopServers } from './support/databases.ts'
import { until } from './support/until.ts'

after(stopServers)

for (const dialect of ['postgres', 'mysql'] as const) {
  describe(`a relay on ${dialect}`, () => {
    const outbox = new Outbox()

    /** A database with an outbox, and a bus whose handler notes what comes. */
    async function shop() {
      const db = await makeDatabase(dialect, '')
      const client = await connect(dialect, db.url)
      const bus = new Bus(`memory://${db.url.split('/').at(-1)}`, { service: 'shop' })
      const seen: Event[] = []
      bus.subscribe('**', (event) => void seen.push(event), { name: 'all' })
      await bus.start()
      const store = async (...payloads: unknown[]) => {
        await client.query('BEGIN')
        for (const payload of payloads) await outbox.store(Event.create('order.placed', payload), client)
        await client.query('COMMIT')
      }
      return {
        url: db.url,
        admin: db.url.replace(/[^/]+$/, dialect),
        bus,
        client,
        seen,
        store,
        async [Symbol.asyncDispose]() {
          await bus.close()
          await client.end()
          await db.close()
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
      const text = wire.replace('"h":"', `"h":"${'y'.repeat(300)}`)
      const sql = `INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'order.placed', '${text}')`
      await made.client.query(sql)
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
        [() => new Relay('mysql://u:secret@h/d?ssl-mod=x', made.bus), /did you mean ssl-mode/],
        [() => new Relay('mysql://u:secret@h/d', made.bus, { listenUrl: 'postgres://h/d' }), /PostgreSQL/],
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
        (error) => error instanceof InvalidConfig && error.message.includes(`polybus outbox ddl --dialect ${dialect}`),
      )
    })
  })
}

/** What both drivers have. */
interface Client {
  query(sql: string): Promise<unknown>
  end(): Promise<void>
}

async function connect(dialect: 'postgres' | 'mysql', url: string): Promise<Client> {
  if (dialect === 'mysql') return await mysql.createConnection(url)
  const client = new pg.Client(url)
  await client.connect()
  return client
}

test("an outbox in MariaDB goes through the application's driver", async () => {
  const db = await makeDatabase('mysql', '')
  const [writer, mine] = [await mysql.createConnection(db.url), await mysql.createConnection(db.url)]
  const execute: Executor = async (sql, params) => {
    const [answer] = await mine.query<mysql.RowDataPacket[][] | mysql.ResultSetHeader>(
      { sql, rowsAsArray: true },
      params,
    )
    return Array.isArray(answer) ? { rows: answer, affected: 0 } : { rows: [], affected: answer.affectedRows }
  }
  const outbox = new Outbox()
  await using bus = new Bus(`memory://${db.url.split('/').at(-1)}`, { service: 'shop' })
  const numbers: number[] = []
  bus.subscribe('**', (event) => void numbers.push(event.payload as number), { name: 'all', concurrency: 1 })
  await bus.start()
  await writer.beginTransaction()
  for (let number = 0; number < 30; number++)
    await outbox.store(Event.create('order.placed', number, { partitionKey: `k${number % 3}` }), writer)
  await writer.commit()
  await db.query("INSERT INTO polybus_outbox (event_id, type, event) VALUES ('x', 'a', 'no event')")
  const relay = new Relay(execute, bus, { dialect: 'mysql', batch: 7 })
  const running = relay.run()
  await until(async () => numbers.length === 30 && (await relay.stats()).pending === 0)
  relay.stop()
  await running
  assert.deepEqual(
    numbers.toSorted((a, b) => a - b),
    [...Array(30).keys()],
  )
  const [dead] = await relay.deadLetters()
  assert.deepEqual([dead?.eventId, dead?.raw, dead?.attempts], ['x', 'no event', 1])
  assert.equal(await relay.replay(), 1)
  assert.equal((await relay.relayBatch()).malformed, 1)
  assert.equal(await relay.purgeDead(), 1)
  await db.query("UPDATE polybus_outbox SET created_at = '2020-01-01', delivered_at = '2020-01-01'")
  assert.equal(await relay.purge({ olderThanMs: 86_400_000 }), 30)
  await db.query('DROP TABLE polybus_outbox')
  await assert.rejects(relay.relayBatch(), { code: 'invalid_config', message: /polybus outbox ddl --dialect mysql/ })
  for (const connection of [writer, mine]) await connection.end()
  await db.close()
})
