// The relay through a SQLite driver of the application.
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { Bus, Event, PolybusError } from 'polybus'
import { Outbox, Relay } from 'polybus/outbox'
import { openSqlite, SQLITE } from './support/databases.ts'
import { until } from './support/until.ts'

test(`an outbox in SQLite goes through the application's driver (${SQLITE})`, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'polybus-relay-'))
  try {
    const database = await openSqlite(join(folder, 'shop.db'))
    const outbox = new Outbox()
    for (const statement of outbox.ddl('sqlite')) database.exec(statement)
    database.exec('BEGIN')
    for (let number = 0; number < 30; number++)
      outbox.store(Event.create('order.placed', number, { partitionKey: `k${number % 3}` }), database)
    database.exec('COMMIT')
    await using bus = new Bus(`sqlite:///${join(folder, 'bus.db')}`, { service: 'shop' })
    const numbers: number[] = []
    bus.subscribe('**', (event) => void numbers.push(event.payload as number), { name: 'all', concurrency: 1 })
    await bus.start()
    assert.equal((await new Relay(database, bus, { batch: 10 }).relayBatch()).relayed, 10)
    const relay = new Relay(database, bus)
    const running = relay.run()
    await until(() => numbers.length === 30)
    relay.stop()
    await running
    assert.deepEqual(numbers, [...Array(30).keys()])
    assert.equal((await relay.stats()).pending, 0)
    database.exec('DROP TABLE polybus_outbox')
    await assert.rejects(relay.relayBatch(), { code: 'invalid_config', message: /polybus outbox ddl --dialect sqlite/ })
    database.close()
    await assert.rejects(relay.relayBatch(), PolybusError)
  } finally {
    rmSync(folder, { recursive: true })
  }
})
