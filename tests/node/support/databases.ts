// A database of each test's own, with the outbox, the inbox and a table of orders: on a real PostgreSQL or MariaDB that
// tests/support/database_server.py runs, or in a SQLite file.
import { type ChildProcess, spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import Sqlite from 'better-sqlite3'
import mysql from 'mysql2/promise'
import pg from 'pg'
import { Event } from 'polybus'
import { type Dialect, Inbox, Outbox } from 'polybus/outbox'

/** `make test-node-sqlite`: tests run under a newer Node, for which better-sqlite3 is not compiled. */
export const ONLY_NODE_SQLITE = process.env.POLYBUS_TEST_DRIVER === 'node:sqlite'

export const SQLITE = ONLY_NODE_SQLITE ? 'node:sqlite' : 'better-sqlite3'

/** A database of better-sqlite3, or of node:sqlite, which Node 20 lacks. */
export async function openSqlite(path: string): Promise<SqliteDatabase> {
  if (!ONLY_NODE_SQLITE) return new Sqlite(path)
  const name: string = 'node:sqlite' // Node 20 lacks its types, too
  const { DatabaseSync } = await import(name)
  return new DatabaseSync(path)
}

/** What both have, and what the tests use. */
export interface SqliteDatabase {
  prepare(sql: string): {
    all(...params: unknown[]): unknown[]
    run(...params: unknown[]): { changes: number | bigint }
  }
  /** In node:sqlite it is `isTransaction`. */
  readonly inTransaction: boolean
  exec(sql: string): unknown
  close(): unknown
}

const PROGRAM = fileURLToPath(new URL('../../support/database_server.py', import.meta.url))
const running = new Map<Dialect, Promise<{ port: number; process: ChildProcess }>>()

/** A PgBouncer in transaction mode, in front of a PostgreSQL of its own; ends with this process or by `close`. */
export async function startPool(): Promise<{ server: string; pool: string; close(): Promise<void> }> {
  const { line, process } = await launch('postgres', 'pgbouncer')
  const [server, pool] = line.split(' ').map((port) => `postgresql://postgres@127.0.0.1:${port}`)
  const close = async () => {
    const ended = once(process, 'exit')
    process.ref()
    process.stdin?.end()
    await ended
  }
  return { server: server as string, pool: pool as string, close }
}

async function start(dialect: Dialect) {
  const { line, process } = await launch(dialect)
  return { port: Number(line), process }
}

async function launch(...servers: string[]): Promise<{ line: string; process: ChildProcess }> {
  const child = spawn('python3', [PROGRAM, ...servers], { stdio: ['pipe', 'pipe', 'inherit'] })
  const [line] = await once(createInterface({ input: child.stdout }), 'line', { signal: AbortSignal.timeout(60_000) })
  child.unref()
  return { line: String(line), process: child }
}

/** The port of the server that the tests of this process share. It ends with this process, or by {@link stopServers}. */
async function portOf(dialect: Dialect): Promise<number> {
  if (!running.has(dialect)) running.set(dialect, start(dialect))
  return (await running.get(dialect))?.port as number
}

export async function stopServers(): Promise<void> {
  for (const server of running.values()) {
    const { process } = await server
    const ended = once(process, 'exit')
    process.ref()
    process.stdin?.end()
    await ended
  }
}

export interface Database {
  dialect: Dialect
  /** For PostgreSQL and MySQL. */
  url: string
  /** For SQLite. */
  path: string
  query(sql: string): Promise<Record<string, unknown>[]>
  /** Whether somebody waits for a lock. */
  waits(): Promise<boolean>
  close(): Promise<void>
}

export async function makeDatabase(dialect: Dialect, folder: string): Promise<Database> {
  const db = await { postgres, sqlite, mysql: mariadb }[dialect](`test_${randomUUID().replaceAll('-', '')}`, folder)
  for (const sql of [...new Outbox().ddl(dialect), ...new Inbox().ddl(dialect)]) await db.query(sql)
  await db.query('CREATE TABLE orders (id VARCHAR(100) PRIMARY KEY)')
  return db
}

async function postgres(name: string): Promise<Database> {
  const url = `postgresql://postgres@127.0.0.1:${await portOf('postgres')}`
  const admin = new pg.Client(`${url}/postgres`)
  await admin.connect()
  await admin.query(`CREATE DATABASE ${name} TEMPLATE template0`)
  await admin.end()
  const client = new pg.Client(`${url}/${name}`)
  await client.connect()
  const waiting = `SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = '${name}'`
  return {
    dialect: 'postgres',
    url: `${url}/${name}`,
    path: '',
    query: async (sql) => (await client.query(sql)).rows,
    waits: async () => (await client.query(waiting)).rows.length > 0,
    close: () => client.end(),
  }
}

async function mariadb(name: string): Promise<Database> {
  const url = `mysql://root@127.0.0.1:${await portOf('mysql')}`
  const connection = await mysql.createConnection(url)
  await connection.query(`CREATE DATABASE ${name}`)
  await connection.query(`USE ${name}`)
  const query = async (sql: string) => {
    const [rows] = await connection.query(sql)
    return (Array.isArray(rows) ? rows : []) as Record<string, unknown>[]
  }
  return {
    dialect: 'mysql',
    url: `${url}/${name}`,
    path: '',
    query,
    waits: async () => {
      const [row] = await query("SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'")
      return row?.Value !== '0'
    },
    close: () => connection.end(),
  }
}

async function sqlite(name: string, folder: string): Promise<Database> {
  const path = `${folder}/${name}.db`
  const db = await openSqlite(path)
  db.exec('PRAGMA journal_mode = WAL') // so that the test may look while a driver writes
  return {
    dialect: 'sqlite',
    url: '',
    path,
    query: async (sql) => {
      if (sql.startsWith('SELECT')) return db.prepare(sql).all() as Record<string, unknown>[]
      db.exec(sql)
      return []
    },
    waits: async () => true, // nobody can tell
    close: async () => void db.close(),
  }
}

export async function events(db: Database): Promise<Event[]> {
  const rows = await db.query('SELECT event FROM polybus_outbox ORDER BY seq')
  return rows.map((row) => Event.decode(row.event as string))
}

export async function orders(db: Database): Promise<unknown[]> {
  return (await db.query('SELECT id FROM orders ORDER BY id')).map((row) => row.id)
}

export async function marks(db: Database): Promise<unknown[]> {
  return (await db.query('SELECT consumer, event_id FROM polybus_inbox')).map((row) => [row.consumer, row.event_id])
}
