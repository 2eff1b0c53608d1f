// Four writers through node-postgres, until the input ends: see `test_outbox_storm.py`. `writers.py` has four more.
import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { Event } from 'polybus'
import { Outbox } from 'polybus/outbox'

const pool = new pg.Pool({ connectionString: process.argv[2], max: 4 })
pool.on('error', () => undefined) // an idle session was ended
const outbox = new Outbox({ service: 'node' })
let done = false

/** Transactions, one after the other. What becomes of one whose connection is lost, the database knows. */
async function write(key: string): Promise<void> {
  let number = 0
  const fact = async (client: pg.PoolClient) => {
    const made = Event.create('fact.placed', { number: number++ }, { partitionKey: key })
    await client.query('INSERT INTO facts VALUES ($1, $2)', [made.meta.id, key])
    await outbox.store(made, client)
  }
  while (!done) {
    let client: pg.PoolClient | undefined
    try {
      client = await pool.connect()
      client.on('error', () => undefined) // the query that runs rejects, too
      await client.query('BEGIN')
      await fact(client)
      await sleep(Math.random() * 20) // they commit in any order
      await client.query('SAVEPOINT part')
      await fact(client)
      await client.query(Math.random() < 0.5 ? 'ROLLBACK TO part' : 'RELEASE part')
      await client.query(Math.random() < 0.1 ? 'ROLLBACK' : 'COMMIT')
      client.release()
    } catch {
      client?.release(true)
      await sleep(20) // the database is away
    }
  }
}

process.stdin.on('end', () => {
  done = true
})
process.stdin.resume()
await Promise.all([0, 1, 2, 3].map((number) => write(`node-${number}`)))
await pool.end()
