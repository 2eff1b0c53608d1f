// What wakes the relay after a commit, on a real PostgreSQL, through every driver.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import Sqlite from 'better-sqlite3'
import pg from 'pg'
import { Event, InvalidConfig } from 'polybus'
import { Outbox } from 'polybus/outbox'
import { type Database, makeDatabase, stopServers } from './support/databases.ts'
import { DRIVERS, type Opened, removePrisma } from './support/outbox-drivers.ts'

const folder = mkdtempSync(join(tmpdir(), 'polybus-notify-'))
after(async () => {
  await stopServers()
  removePrisma()
  rmSync(folder, { recursive: true, force: true })
})

/** How many notifications on the outbox's channel were committed up to now, since the last call. */
async function listen(db: Database) {
  const client = new pg.Client(db.url)
  await client.connect()
  await client.query('LISTEN polybus_outbox')
  let count = 0
  let ended: () => void = () => undefined
  client.on('notification', ({ payload }) => {
    if (payload === 'end') ended()
    else count++
  })
  return {
    // They come in the order of their commits, so what comes before this one is all there is.
    async heard() {
      const end = new Promise<void>((resolve) => {
        ended = resolve
      })
      await db.query("SELECT pg_notify('polybus_outbox', 'end')")
      await end
      const found = count
      count = 0
      return found
    },
    close: () => client.end(),
  }
}

for (const { name, open } of DRIVERS.filter(({ dialect }) => dialect === 'postgres')) {
  describe(`notify: through ${name}`, { timeout: 180_000 }, () => {
    let db: Database
    let one: Opened
    let listener: Awaited<ReturnType<typeof listen>>
    before(async () => {
      db = await makeDatabase('postgres', folder)
      one = await open(db)
      listener = await listen(db)
    })
    after(async () => {
      await listener?.close()
      await one?.close()
      await db?.close()
    })

    it('wakes relays after the commit, and not too often', async (t) => {
      const outbox = new Outbox()
      await one.transaction(async ({ tx }) => {
        assert.equal(await outbox.store(Event.create('order.placed', 1), tx), true)
        await assert.rejects(outbox.notify(tx), (error) => {
          assert.ok(error instanceof InvalidConfig)
          assert.match(error.message, /after the commit/)
          return true
        })
      })
      assert.equal(await listener.heard(), 0)
      let now = 1000
      const clock = t.mock.method(performance, 'now', () => now)
      for (const [later, heard] of [
        [0, 1],
        [9, 0],
        [1, 1],
      ] as const) {
        now += later
        for (let i = 0; i < 3; i++) await outbox.notify(one.outside)
        assert.equal(await listener.heard(), heard)
      }
      clock.mock.restore()
      const [row] = await db.query(
        `SELECT count(*)::int AS n FROM pg_stat_activity
         WHERE datname = current_database() AND state LIKE 'idle in transaction%'`,
      )
      assert.equal(row?.n, 0, 'it left a transaction open')
    })
  })
}

it('does nothing on another database', async () => {
  const db = new Sqlite(':memory:')
  await new Outbox().notify(db)
  db.close()
})

it('refuses what is no connection', async () => {
  await assert.rejects(new Outbox().notify({}), InvalidConfig)
})
