// `service.py` in JavaScript, so that nothing is compiled at each of its many starts; see there.
import { appendFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import pg from 'pg'
import { Bus, Event } from 'polybus'
import { inbox, Outbox, Relay } from 'polybus/outbox'

const { PASSED, DIE_AT, STOP } = process.env
const [role, database, url, ...rest] = process.argv.slice(2)
const outbox = new Outbox({ service: 'node' })

let armed = false
let passed = 0
function point(name) {
  if (!armed) return
  const numbered = `${++passed} ${name}`
  appendFileSync(PASSED, `${numbered}\n`)
  if (numbered === DIE_AT) process.kill(process.pid, STOP === undefined ? 'SIGKILL' : 'SIGSTOP')
}

function short(sql) {
  const [, verb, table] = /^\s*(\w+)(?:.*?\b(?:INTO|FROM|UPDATE)\s+"?(\w+))?/s.exec(sql)
  return table === undefined ? `${verb}` : `${verb} ${table}`
}

async function connect() {
  const client = new pg.Client(database)
  await client.connect()
  const query = client.query.bind(client)
  client.query = async (first, ...more) => {
    const name = short(typeof first === 'string' ? first : first.text)
    point(`before ${name}`)
    const result = await query(first, ...more)
    point(`after ${name}`)
    return result
  }
  return client
}

async function fact(client, order, number) {
  const made = Event.create('fact.placed', { order, number }, { partitionKey: order })
  await client.query('INSERT INTO facts VALUES ($1, $2)', [made.meta.id, order])
  return made
}

async function write(orders) {
  const client = await connect()
  for (const order of orders) {
    if ((await client.query('SELECT 1 FROM facts WHERE of = $1', [order])).rowCount) continue
    armed = order === orders.at(-1)
    point('begins')
    await client.query('BEGIN')
    await outbox.store([await fact(client, order, 0), await fact(client, order, 1)], client)
    await client.query('SAVEPOINT s')
    await outbox.store(await fact(client, order, 2), client)
    await client.query('RELEASE s')
    await client.query('SAVEPOINT s')
    await outbox.store(await fact(client, order, 3), client)
    await client.query('ROLLBACK TO s')
    await client.query('COMMIT')
    point('ends')
  }
  await client.end()
}

async function handle([number]) {
  const client = await connect()
  const bus = new Bus(url, { service: 'node', leaseMs: 1000 })
  await bus.start()
  let done
  const handled = new Promise((resolve) => {
    done = resolve
  })
  const book = async (given) => {
    const mine = given.payload.number === Number(number)
    armed = mine
    point('arrived')
    await client.query('BEGIN')
    if (await inbox.once(given, client)) {
      const child = given.child('fact.booked', { of: given.meta.id }, { partitionKey: given.payload.order })
      await client.query("INSERT INTO effects VALUES ('node', $1)", [given.meta.id])
      await outbox.store(child, client)
    } else await client.query("INSERT INTO suppressed VALUES ('node', $1)", [given.meta.id])
    await client.query('COMMIT')
    point('handled, and not acknowledged')
    if (mine) done()
  }
  const options = { name: 'book', group: 'node', concurrency: 1 }
  const subscription = await bus.subscribe('fact.placed', book, options)
  console.log('ready')
  if (number === '-1') for await (const _ of process.stdin);
  else {
    await handled
    await subscription.unsubscribe() // waits until the verdict is stored
    point('acknowledged')
  }
  await bus.close()
  await client.end()
}

async function relay() {
  const client = await connect()
  const bus = new Bus(url, { service: 'node' })
  const execute = async (text, values) => {
    const { rows, rowCount } = await client.query({ text, values, rowMode: 'array' })
    return { rows, affected: rowCount ?? 0 }
  }
  const carrier = new Relay(execute, bus, { dialect: 'postgres' })
  console.log('ready')
  for await (const _ of createInterface({ input: process.stdin })) {
    armed = true
    const { attempted, relayed, ownershipMismatches } = await carrier.relayBatch()
    point('relayed')
    armed = false
    console.log(attempted, relayed, ownershipMismatches)
  }
  await bus.close()
  await client.end()
}

await { write, handle, relay }[role](rest)
