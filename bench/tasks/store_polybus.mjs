// Transactions of one business row and one event: the event through `outbox.store` and with an INSERT by hand, in turn.
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { ask, payload, polybus, say } from './common.mjs'

const { Event } = await polybus()
const { Outbox } = await import('../../bindings-node/dist/outbox/index.js')
// The repository's drivers, not those of this folder's package.
const require = createRequire(new URL('../../package.json', import.meta.url))

const outbox = new Outbox({ service: 'bench' })
const ORDER = 'INSERT INTO orders (id, customer, total) VALUES ($1, $2, $3)'
const STORE =
  'INSERT INTO polybus_outbox (event_id, type, event, partition_key, dedupe_key) VALUES ($1, $2, $3, $4, $5)'

let count = 0
const order = () => [randomUUID(), `customer-${++count % 1000}`, count]
const made = (i) => Event.create('order.placed', payload(i), { partitionKey: `order-${i}` })

/** The same row, as one would write it without polybus. */
function byHand(i) {
  const id = randomUUID()
  const meta = { id, timestamp: new Date().toISOString(), source: 'bench', partitionKey: `order-${i}` }
  return [id, 'order.placed', JSON.stringify({ type: 'order.placed', payload: payload(i), meta }), `order-${i}`, null]
}

function stored(is) {
  if (is !== true) throw new Error('it was not stored')
}

/** A connection of each driver: the two ways, the server's process, and its end. */
const DRIVERS = {
  async pg() {
    const client = new (require('pg').Client)(ask.url)
    await client.connect()
    const transaction = async (store) => {
      await client.query('BEGIN')
      const row = order()
      await client.query(ORDER, row)
      await store(row[2])
      await client.query('COMMIT')
    }
    const ours = () => transaction(async (i) => stored(await outbox.store(made(i), client)))
    const hand = () => transaction((i) => client.query(STORE, byHand(i)))
    return { ways: [ours, hand], pid: client.processID, close: () => client.end() }
  },
  async 'postgres.js'() {
    const sql = require('postgres')(ask.url, { max: 1 })
    const transaction = (store) =>
      sql.begin(async (tx) => {
        const [id, customer, total] = order()
        await tx`INSERT INTO orders (id, customer, total) VALUES (${id}, ${customer}, ${total})`
        await store(total, tx)
      })
    const ours = () => transaction(async (i, tx) => stored(await outbox.store(made(i), tx)))
    const hand = () =>
      transaction((i, tx) => {
        const [id, type, event, key, dedupe] = byHand(i)
        return tx`INSERT INTO polybus_outbox (event_id, type, event, partition_key, dedupe_key)
          VALUES (${id}, ${type}, ${event}, ${key}, ${dedupe})`
      })
    const [{ pid }] = await sql`SELECT pg_backend_pid() AS pid`
    return { ways: [ours, hand], pid, close: () => sql.end() }
  },
}

const opened = []
for (let i = 0; i < ask.connections; i++) opened.push(await DRIVERS[ask.driver]())

/** Microseconds of CPU that the backends have used. */
const serverCpu = () =>
  opened.reduce((sum, { pid }) => sum + Number(readFileSync(`/proc/${pid}/schedstat`, 'ascii').split(' ')[0]) / 1000, 0)

async function slice(way, seconds) {
  const [server, client, started] = [serverCpu(), process.cpuUsage(), performance.now()]
  const until = started + 1000 * seconds
  let ran = 0
  const work = async ({ ways }) => {
    for (; performance.now() < until; ran++) await ways[way]()
  }
  await Promise.all(opened.map(work))
  const spent = performance.now() - started
  const used = process.cpuUsage(client)
  return {
    rate: (1000 * ran) / spent,
    client: (used.user + used.system) / ran,
    server: (serverCpu() - server) / ran,
  }
}

for (let round = 0; round <= ask.rounds; round++) {
  // Ours and by hand, each as often first as second; the first round pays for caches and the compiler.
  for (const how of [0, 1, 1, 0]) {
    const facts = await slice(how, round > 0 ? ask.seconds : 2)
    if (round > 0) say({ how, ...facts })
  }
}
await Promise.all(opened.map(({ close }) => close()))
say({ done: true })
