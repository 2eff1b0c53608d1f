// The outbox and the inbox on real databases, through every driver that they know.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import Sqlite from 'better-sqlite3'
import mysql from 'mysql2/promise'
import pg from 'pg'
import { Event, InvalidConfig, InvalidEvent, type MetaInput, PayloadTooLarge } from 'polybus'
import { Inbox, inbox, Outbox } from 'polybus/outbox'
import { type Database, events, makeDatabase, marks, orders, stopServers } from './support/databases.ts'
import { DRIVERS, type Opened, removePrisma } from './support/outbox-drivers.ts'

const PAYLOAD =
  '{"nul":"\\u0000","huge":1180591620717411303424,"signs":"100 % %s ? $1 :p1 \' \\\\ `","words":"größer 🚌"}'
const placed = (meta: MetaInput = {}) => Event.create('order.placed', Buffer.from(PAYLOAD), meta)
const ids = (list: Event[]) => list.map((event) => event.meta.id)
const outbox = new Outbox({ service: 'shop' })

/** A promise that is settled from outside. */
function gate() {
  let open: () => void = () => undefined
  const opened = new Promise<void>((resolve) => {
    open = resolve
  })
  return { open, opened }
}

const folder = mkdtempSync(join(tmpdir(), 'polybus-outbox-'))
after(async () => {
  await stopServers()
  removePrisma()
  rmSync(folder, { recursive: true, force: true })
})

for (const { name, dialect, open } of DRIVERS) {
  describe(`outbox: ${dialect} through ${name}`, { timeout: 180_000 }, () => {
    let db: Database
    let one: Opened
    before(async () => {
      db = await makeDatabase(dialect, folder)
      one = await open(db)
    })
    after(async () => {
      await one?.close()
      await db?.close()
    })
    const clean = async () => {
      for (const table of ['polybus_outbox', 'polybus_inbox', 'orders']) await db.query(`DELETE FROM ${table}`)
    }

    it('commits the row and its event together', async () => {
      await clean()
      const event = placed({ partitionKey: 'o-1', idempotencyKey: 'order:o-1', headers: { h: 'ö' } })
      await one.transaction(async ({ tx, insert }) => {
        await insert('o-1')
        assert.equal(await outbox.store(event, tx), true)
        assert.deepEqual(await events(db), [], 'committed before its transaction')
      })
      const [stored] = await events(db)
      assert.equal(stored?.raw.toString(), PAYLOAD)
      assert.deepEqual(
        [stored?.meta.id, stored?.meta.source, stored?.meta.headers],
        [event.meta.id, 'shop', { h: 'ö' }],
      )
      const [row] = await db.query(
        'SELECT event_id, type, partition_key, dedupe_key, status, attempts FROM polybus_outbox',
      )
      const found = Object.values(row as object).map((value) => (typeof value === 'number' ? value : String(value)))
      assert.deepEqual(found, [event.meta.id, 'order.placed', 'o-1', 'order:o-1', 'pending', 0])
      assert.deepEqual(await orders(db), ['o-1'])
    })

    it('leaves nothing of what is rolled back', async () => {
      await clean()
      const event = placed({ idempotencyKey: 'k' })
      const failed = one.transaction(async ({ tx, insert }) => {
        await insert('o-1')
        assert.equal(await outbox.store(event, tx), true)
        throw new Error('roll back')
      })
      await assert.rejects(failed, /roll back/)
      assert.deepEqual([await events(db), await orders(db)], [[], []])
      assert.equal(await one.transaction(({ tx }) => Promise.resolve(outbox.store(event, tx))), true, 'its key is free')
    })

    it('rolls events back with their savepoint', async () => {
      await clean()
      const [kept, last] = [placed(), placed()]
      await one.transaction(async ({ tx, insert, savepoint }) => {
        await insert('o-1')
        await outbox.store(kept, tx)
        await savepoint(async (inner) => {
          await inner.insert('o-2')
          assert.equal(await outbox.store(placed(), inner.tx), true)
          throw new Error('roll back')
        })
        await outbox.store(last, tx)
      })
      assert.deepEqual([ids(await events(db)), await orders(db)], [ids([kept, last]), ['o-1']])
    })

    it('absorbs what is there', async () => {
      await clean()
      const [first, other, plain] = [placed({ idempotencyKey: 'k' }), placed({ idempotencyKey: 'k' }), placed()]
      await one.transaction(async ({ tx }) => {
        assert.equal(await outbox.store(first, tx), true)
        assert.equal(await outbox.store(other, tx), false, 'the same key')
        assert.equal(await outbox.store(first, tx), false, 'the same event')
        assert.equal(await outbox.store(placed(), tx, { dedupeKey: 'k' }), false)
        const list = [plain, other, plain, placed({ idempotencyKey: 'k2' }), placed({ idempotencyKey: 'k2' })]
        assert.deepEqual(await outbox.store(list, tx), [true, false, false, true, false])
        assert.deepEqual(await outbox.store([], tx), [])
      })
      assert.equal((await events(db)).length, 3)
    })

    it('stores many in one statement', async () => {
      await clean()
      const many = Array.from({ length: 300 }, (_, index) => placed({ partitionKey: `o-${index}` }))
      await one.transaction(async ({ tx }) => {
        assert.deepEqual(
          await outbox.store(many, tx),
          many.map(() => true),
        )
      })
      assert.deepEqual(ids(await events(db)), ids(many), 'in their order')
      if (dialect === 'postgres') {
        const [row] = await db.query("SELECT count(DISTINCT cmin::text || ' ' || xmin::text) AS n FROM polybus_outbox")
        assert.equal(row?.n, '1')
      }
    })

    for (const commits of [true, false]) {
      const end = commits ? 'commits' : 'rolls back'
      it(`absorbs one of two at once, when the first ${end}`, { skip: dialect === 'sqlite' }, async () => {
        await clean()
        const two = await open(db)
        const event = placed()
        const [stored, go] = [gate(), gate()]
        const first = one.transaction(async ({ tx }) => {
          assert.equal(await outbox.store(placed({ idempotencyKey: 'k' }), tx), true)
          assert.equal(await inbox.once(event, tx, { consumer: 'billing' }), true)
          stored.open()
          await go.opened
          if (!commits) throw new Error('roll back')
        })
        first.catch(() => undefined)
        await Promise.race([stored.opened, first])
        let done = false
        const second = two.transaction(async ({ tx }) => [
          await outbox.store(placed({ idempotencyKey: 'k' }), tx),
          await inbox.once(event, tx, { consumer: 'billing' }),
        ])
        second.then(
          () => {
            done = true
          },
          () => {
            done = true
          },
        )
        const deadline = Date.now() + 20_000
        while (!(await db.waits())) {
          assert.ok(!done && Date.now() < deadline, 'it did not wait')
          await sleep(5)
        }
        go.open()
        await first.catch((error) => assert.equal(error.message, 'roll back'))
        assert.deepEqual(await second, [!commits, !commits])
        await two.close()
        assert.deepEqual([(await events(db)).length, (await marks(db)).length], [1, 1])
      })
    }

    it('says so without a transaction', async () => {
      await clean()
      const says = { name: 'InvalidConfig', message: /no open transaction.*allowAutocommit: true/s }
      await assert.rejects(async () => outbox.store(placed(), one.outside), says)
      await assert.rejects(async () => inbox.once(placed(), one.outside, { consumer: 'billing' }), says)
      assert.deepEqual(await events(db), [])
      assert.deepEqual(await outbox.store([placed(), placed()], one.outside, { allowAutocommit: true }), [true, true])
      assert.equal((await events(db)).length, 2)
    })

    it('lets an event take effect once', async () => {
      await clean()
      const event = placed()
      const once = (consumer: string, given: Event | string = event) =>
        one.transaction(async ({ tx }) => [
          await inbox.once(given, tx, { consumer }),
          await inbox.once(given, tx, { consumer }),
        ])
      const failed = one.transaction(async ({ tx }) => {
        assert.equal(await inbox.once(event, tx, { consumer: 'billing' }), true)
        throw new Error('the effect failed')
      })
      await assert.rejects(failed, /the effect failed/)
      assert.deepEqual(await once('billing'), [true, false])
      assert.deepEqual(await once('billing'), [false, false])
      assert.deepEqual(await once('mail', event.meta.id), [true, false])
      assert.deepEqual((await marks(db)).sort(), [
        ['billing', event.meta.id],
        ['mail', event.meta.id],
      ])
    })

    it('purges old marks in parts', async () => {
      await clean()
      await one.transaction(async ({ tx }) => {
        for (const id of ['1', '2', '3', '4', '5']) await inbox.once(id, tx, { consumer: 'billing' })
      })
      const hour = { postgres: "- interval '1 hour'", sqlite: '- 3600000', mysql: '- interval 1 hour' }[dialect]
      await db.query(`UPDATE polybus_inbox SET processed_at = processed_at ${hour} WHERE event_id <> '4'`)
      const counts = []
      for (let turn = 0; turn < 3; turn++) {
        const purge = { olderThanMs: 30 * 60_000, limit: 3 }
        counts.push(await one.transaction(async ({ tx }) => inbox.purge(tx, purge)))
      }
      assert.deepEqual(counts, [3, 1, 0])
      assert.deepEqual(await marks(db), [['billing', '4']])
    })

    it('refuses what is too large before anything is sent', async () => {
      await clean()
      await one.transaction(async ({ tx }) => {
        const large = Event.create('order.placed', 'x'.repeat(1 << 20))
        await assert.rejects(async () => outbox.store([placed(), large], tx), PayloadTooLarge)
        assert.equal(await outbox.store(placed(), tx), true, 'the transaction goes on')
      })
      assert.equal((await events(db)).length, 1)
    })

    it('says how to make a table that is missing', async () => {
      const missing = new Outbox({ table: 'no_such_outbox' })
      const stored = one.transaction(async ({ tx }) => missing.store(placed(), tx))
      await assert.rejects(stored, (error: Error) => {
        assert.ok(error instanceof InvalidConfig, String(error))
        assert.match(error.message, new RegExp(`Outbox\\.ddl\\("${dialect}"\\)`))
        assert.ok(error.cause)
        return true
      })
    })
  })
}

describe('outbox', () => {
  it('blocks where the driver blocks', () => {
    const db = new Sqlite(':memory:')
    for (const sql of outbox.ddl('sqlite')) db.exec(sql)
    const event = placed()
    const stored: boolean = db.transaction(() => outbox.store(event, db))()
    assert.equal(stored, true)
    db.close()
  })

  it('refuses what is no transaction, and says what is', async () => {
    const pools = [new pg.Pool(), mysql.createPool('mysql://root@127.0.0.1:1/x')]
    for (const wrong of [null, undefined, 3, 'default', {}, () => undefined, new Map(), ...pools]) {
      const call = async () => outbox.store(placed(), wrong as never)
      await assert.rejects(call, {
        name: 'InvalidConfig',
        message: /give a client of node-postgres.*outbox\.statement/,
      })
    }
    for (const pool of pools) await pool.end()
  })

  it('renders the statement for any other driver', () => {
    const db = new Sqlite(':memory:')
    for (const sql of outbox.ddl('sqlite')) db.exec(sql)
    const [event, again] = [placed({ idempotencyKey: 'k' }), placed({ idempotencyKey: 'k' })]
    const { sql, params } = outbox.statement([event, again], { style: '?' })
    assert.deepEqual(db.prepare(sql).all(params), [{ event_id: event.meta.id }])
    db.close()
    const other = new Outbox({ table: 'app.outbox' }).statement(event, { style: '$' })
    assert.match(other.sql, /^INSERT INTO "app"\."outbox" .*\$5\) ON CONFLICT DO NOTHING RETURNING event_id$/)
    assert.match(outbox.statement(event, { style: '%s', dialect: 'mysql' }).sql, /^INSERT INTO `polybus_outbox`/)
    const many = Array.from({ length: 1001 }, () => placed())
    for (const list of [[], many]) assert.throws(() => outbox.statement(list, { style: '?' }), InvalidConfig)
  })

  it('names what is right for bad arguments', () => {
    for (const table of ['', 'a b', 'a"b', 'a.b.c', 'x'.repeat(49)]) {
      assert.throws(() => new Outbox({ table }), InvalidConfig)
      assert.throws(() => new Inbox({ table }), InvalidConfig)
    }
    assert.throws(() => new Outbox({ tabel: 'x' } as never), /did you mean table/)
    assert.throws(() => outbox.ddl('postgress' as never), /did you mean "postgres"/)
    assert.throws(() => outbox.statement(placed(), { style: '%d' as never }), /unknown style/)
    const db = new Sqlite(':memory:')
    assert.throws(() => outbox.store('order.placed' as never, db), InvalidEvent)
    assert.throws(() => outbox.store([placed()], db, { dedupeKey: 'k', allowAutocommit: true }), /belongs to one event/)
    assert.throws(() => inbox.once(placed(), db), /needs a consumer/)
    assert.throws(() => outbox.store(placed({ partitionKey: 'k'.repeat(600) }), db), InvalidEvent)
    assert.throws(() => inbox.purge(db, { olderThanMs: -1 }), /give milliseconds/)
    db.close()
  })
})
