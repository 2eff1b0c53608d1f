// What an outbox meets in operation: a pool of sessions, missing rights, servers that only read, events that are too large.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import Sqlite from 'better-sqlite3'
import pg from 'pg'
import { AuthFailed, Bus, ConnectionFailed, Event, type MetaInput } from 'polybus'
import { Inbox, Outbox, Relay } from 'polybus/outbox'
import postgres from 'postgres'
import { type Database, events, makeDatabase, startPool, stopServers } from './support/databases.ts'
import { DRIVERS, removePrisma } from './support/outbox-drivers.ts'
import { startRedis } from './support/redis.ts'

const placed = (payload: unknown = 0, meta: MetaInput = {}) => Event.create('order.placed', payload, meta)
const [outbox, inbox] = [new Outbox(), new Inbox()]

const folder = mkdtempSync(join(tmpdir(), 'polybus-operations-'))
after(async () => {
  await stopServers()
  removePrisma()
  rmSync(folder, { recursive: true, force: true })
})

describe('through PgBouncer in transaction mode', { timeout: 180_000 }, () => {
  const ROUNDS = 20
  let servers: Awaited<ReturnType<typeof startPool>>
  let look: pg.Client
  before(async () => {
    servers = await startPool()
    look = new pg.Client(`${servers.server}/postgres`)
    await look.connect()
    for (const sql of [...outbox.ddl('postgres'), ...inbox.ddl('postgres')]) await look.query(sql)
  })
  after(async () => {
    await look?.end()
    await servers?.close()
  })
  const count = async () => Number((await look.query('SELECT count(*) FROM polybus_outbox')).rows[0].count)

  it('node-postgres stores and marks', async () => {
    const before = await count()
    // Four connections on two sessions, at the same time, so that each is on one now and on the other then.
    const clients = Array.from({ length: 4 }, () => new pg.Client(`${servers.pool}/postgres`))
    for (const client of clients) await client.connect()
    const some = async (client: pg.Client) => {
      for (let round = 0; round < ROUNDS; round++) {
        await client.query('BEGIN')
        const event = placed(round)
        assert.equal(await outbox.store(event, client), true)
        assert.equal(await inbox.once(event, client, { consumer: 'c' }), true)
        await client.query('COMMIT')
      }
    }
    await Promise.all(clients.map(some))
    for (const client of clients) await client.end()
    assert.equal(await count(), before + 4 * ROUNDS)
  })

  it('postgres.js stores, without statements that it has prepared', async () => {
    const before = await count()
    const sql = postgres(`${servers.pool}/postgres`, { prepare: false, max: 4, fetch_types: false })
    await Promise.all(
      Array.from({ length: ROUNDS }, () =>
        sql.begin(async (tx) => assert.deepEqual(await outbox.store([placed(), placed()], tx), [true, true])),
      ),
    )
    await sql.end()
    assert.equal(await count(), before + 2 * ROUNDS)
  })

  it('a relay carries what was stored', async () => {
    await look.query('DELETE FROM polybus_outbox')
    await look.query('BEGIN')
    await outbox.store(
      Array.from({ length: 30 }, (_, number) => placed(number, { partitionKey: 'k' })),
      look,
    )
    await look.query('COMMIT')
    await using bus = new Bus(`sqlite:///${join(folder, 'pool.db')}`, { service: 'shop' })
    const relay = new Relay(`${servers.pool}/postgres`, bus, { batch: 7, listenUrl: `${servers.server}/postgres` })
    const running = relay.run()
    for (;;) {
      const left = await look.query("SELECT 1 FROM polybus_outbox WHERE status <> 'delivered'")
      if (left.rows.length === 0) break
    }
    relay.stop()
    await running
    const log = await bus.history('**')
    assert.deepEqual(
      log.map((entry) => entry.event?.payload),
      [...Array(30).keys()],
    )
  })
})

for (const { name, dialect, open } of DRIVERS.filter((driver) => driver.dialect === 'postgres')) {
  describe(`rights: PostgreSQL through ${name}`, { timeout: 180_000 }, () => {
    let db: Database
    const role = `limited_${Math.random().toString(36).slice(2)}`
    before(async () => {
      db = await makeDatabase(dialect, folder)
      await db.query(`CREATE ROLE ${role}`)
    })
    after(async () => {
      await db?.query(`DROP OWNED BY ${role}`)
      await db?.query(`DROP ROLE ${role}`)
      await db?.close()
    })
    /** Runs with this setting in every session. */
    const set = async (setting: string, value: string, body: (tx: object) => unknown) => {
      const database = new URL(db.url).pathname.slice(1)
      await db.query(`ALTER DATABASE ${database} SET ${setting} = ${value}`)
      const opened = await open(db)
      try {
        return await opened.transaction(async ({ tx }) => body(tx))
      } finally {
        await opened.close()
        await db.query(`ALTER DATABASE ${database} RESET ${setting}`)
      }
    }

    it('says which rights a user lacks, and what grants them', async () => {
      const grant = 'GRANT SELECT, INSERT ON "polybus_outbox" TO the_user'
      for (const given of ['SELECT', 'INSERT']) {
        await db.query(`REVOKE ALL ON polybus_outbox FROM ${role}`)
        await db.query(`GRANT ${given} ON polybus_outbox TO ${role}`)
        await assert.rejects(
          // Several, because one needs no SELECT with a driver that counts.
          set('role', role, (tx) => outbox.store([placed(), placed()], tx)),
          (error: Error) => {
            assert.ok(error instanceof AuthFailed, String(error))
            assert.ok(error.message.includes(grant), error.message)
            assert.ok(error.cause)
            return true
          },
        )
      }
      await assert.rejects(
        set('role', role, (tx) => inbox.once(placed(), tx, { consumer: 'c' })),
        { name: 'AuthFailed', message: /GRANT SELECT, INSERT, DELETE ON "polybus_inbox" TO the_user/ },
      )
      await db.query(grant.replace('the_user', role))
      assert.equal(await set('role', role, (tx) => outbox.store(placed(), tx)), true)
    })

    it('says that a database only reads', async () => {
      const stored = (await events(db)).length
      const refused = set('default_transaction_read_only', 'on', (tx) => outbox.store(placed(), tx))
      await assert.rejects(refused, (error: Error) => {
        assert.ok(error instanceof ConnectionFailed && error.retryable, String(error))
        assert.match(error.message, /takes no writes.*primary/)
        return true
      })
      assert.equal(await set('default_transaction_read_only', 'off', (tx) => outbox.store(placed(), tx)), true)
      assert.equal((await events(db)).length, stored + 1)
    })
  })
}

it('says that a SQLite file may not be written', () => {
  const path = join(folder, 'read.db')
  const made = new Sqlite(path)
  for (const sql of outbox.ddl('sqlite')) made.exec(sql)
  made.close()
  const reader = new Sqlite(path, { readonly: true })
  assert.throws(() => reader.transaction(() => outbox.store(placed(), reader))(), {
    name: 'AuthFailed',
    message: /takes no writes on this connection/,
  })
  reader.close()
})

it('what is too large for the transport is dead, says why, and blocks nobody', async () => {
  const db = await makeDatabase('postgres', folder)
  const redis = await startRedis({ more: { 'proto-max-bulk-len': '1048576' } })
  try {
    const client = new pg.Client(db.url)
    await client.connect()
    const store = async (...payloads: unknown[]) => {
      await client.query('BEGIN')
      for (const payload of payloads) await new Outbox({ maxPayloadBytes: 8 << 20 }).store(placed(payload), client)
      await client.query('COMMIT')
    }
    await store('x'.repeat(2 << 20), 1)
    await using small = new Bus('memory://too-large', { service: 'shop', maxPayloadBytes: 1000 })
    // Larger than this bus takes, and larger than this Redis does: two reasons, one fate.
    await using large = new Bus(redis.url, { service: 'shop', maxPayloadBytes: 8 << 20 })
    const first = await new Relay(db.url, small).relayBatch()
    assert.deepEqual([first.relayed, first.deadLettered], [1, 1])
    const relay = new Relay(db.url, large)
    const [dead] = await relay.deadLetters()
    assert.match(dead?.lastError ?? '', /^payload_too_large: .*max_payload_bytes|^payload_too_large: .*1000/)
    assert.equal(await relay.replay(), 1)
    await store(2)
    let relayed = 0
    let lost = 0
    while (relayed + lost < 2) {
      const batch = await relay.relayBatch()
      relayed += batch.relayed
      lost += batch.deadLettered
    }
    assert.deepEqual([relayed, lost], [1, 1])
    assert.match((await relay.deadLetters())[0]?.lastError ?? '', /^payload_too_large: .*proto-max-bulk-len/)
    await client.end()
  } finally {
    redis.dispose()
    await db.close()
  }
})
