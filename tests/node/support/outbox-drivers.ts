// Each driver that the outbox knows, behind one shape: a transaction that runs a function, and savepoints inside it.
import { execFile } from 'node:child_process'
import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { PrismaPg } from '@prisma/adapter-pg'
import Sqlite from 'better-sqlite3'
import { sql } from 'drizzle-orm'
import { drizzle as drizzleSqlite } from 'drizzle-orm/better-sqlite3'
import { drizzle as drizzleMysql } from 'drizzle-orm/mysql2'
import { drizzle as drizzlePg } from 'drizzle-orm/node-postgres'
import { drizzle as drizzlePostgresJs } from 'drizzle-orm/postgres-js'
import knex, { type Knex } from 'knex'
import { CamelCasePlugin, Kysely, sql as kyselySql, MysqlDialect, PostgresDialect, SqliteDialect } from 'kysely'
import mysql from 'mysql2'
import mysqlPromise from 'mysql2/promise'
import pg from 'pg'
import type { Dialect } from 'polybus/outbox'
import postgres from 'postgres'
import { DataSource } from 'typeorm'
import { type Database, ONLY_NODE_SQLITE, openSqlite } from './databases.ts'

/** What a transaction's function gets. */
export interface Session {
  /** What is handed to the outbox. */
  tx: object
  insert(id: string): Promise<unknown>
  /** Runs `body`; when it throws, what it did is rolled back, and the rest is not. */
  savepoint(body: (inner: Session) => Promise<unknown>): Promise<unknown>
}

export interface Opened {
  /** Runs `body` and commits; when it throws, rolls back and rejects. */
  transaction<T>(body: (session: Session) => Promise<T>): Promise<T>
  /** What is no transaction, but could be taken for one. */
  outside: object
  close(): Promise<unknown>
}

export interface Driver {
  name: string
  dialect: Dialect
  open(db: Database): Promise<Opened>
}

const INSERT = (id: string) => `INSERT INTO orders (id) VALUES ('${id}')`

/** A driver where a transaction is what is said on one connection. */
function plain(tx: object, run: (text: string) => Promise<unknown>, close: () => Promise<unknown>): Opened {
  const session: Session = {
    tx,
    insert: (id) => run(INSERT(id)),
    savepoint: async (body) => {
      await run('SAVEPOINT s')
      await body(session).catch(() => run('ROLLBACK TO SAVEPOINT s'))
    },
  }
  return {
    outside: tx,
    close,
    transaction: async (body) => {
      await run('BEGIN')
      const result = await body(session).catch(async (error) => {
        await run('ROLLBACK')
        throw error
      })
      await run('COMMIT')
      return result
    },
  }
}

/** A driver whose transactions run a function, and whose savepoints are such transactions inside. */
function nested<T>(options: {
  outside: object
  close: () => Promise<unknown>
  // biome-ignore lint/suspicious/noExplicitAny: as above
  transaction: (body: (tx: any) => Promise<T>) => Promise<T>
  // biome-ignore lint/suspicious/noExplicitAny: as above
  run: (tx: any, text: string) => Promise<unknown>
  // biome-ignore lint/suspicious/noExplicitAny: as above
  inner?: (tx: any, body: (tx: any) => Promise<unknown>) => Promise<unknown>
}): Opened {
  const { outside, close, transaction, run, inner } = options
  const session = (tx: object): Session => ({
    tx,
    insert: (id) => run(tx, INSERT(id)),
    savepoint: async (body) => {
      if (inner) return inner(tx, (deeper) => body(session(deeper))).catch(() => undefined)
      await run(tx, 'SAVEPOINT s')
      return body(session(tx)).catch(() => run(tx, 'ROLLBACK TO SAVEPOINT s'))
    },
  })
  const within = (body: (session: Session) => Promise<T>) => transaction((tx) => body(session(tx)))
  return { outside, close, transaction: within as unknown as Opened['transaction'] }
}

function drizzled(
  // biome-ignore lint/suspicious/noExplicitAny: three databases, each with types of its own
  db: { transaction(body: (tx: any) => Promise<unknown>): Promise<unknown> },
  close: () => Promise<unknown>,
) {
  return nested({
    outside: db,
    close,
    transaction: (body) => db.transaction(body as never) as never,
    run: (tx, text) => tx.execute(sql.raw(text)),
    inner: (tx, body) => tx.transaction(body),
  })
}

function knexed(db: Knex) {
  return nested({
    outside: db,
    close: () => db.destroy(),
    transaction: (body) => db.transaction(body),
    run: async (tx, text) => tx.raw(text),
    inner: (tx, body) => tx.transaction(body),
  })
}

function kyselied(db: Kysely<unknown>) {
  return nested({
    outside: db,
    close: () => db.destroy(),
    transaction: (body) => db.transaction().execute(body),
    run: (tx, text) => kyselySql.raw(text).execute(tx),
  })
}

async function sourced(options: ConstructorParameters<typeof DataSource>[0]) {
  const source = await new DataSource(options).initialize()
  return nested({
    outside: source.manager,
    close: () => source.destroy(),
    transaction: (body) => source.transaction(body),
    run: (tx, text) => tx.query(text),
    inner: (tx, body) => tx.transaction(body),
  })
}

/** SQLite's drivers block, so this begins and ends their transactions itself. */
function blocking(tx: object, exec: (text: string) => unknown, close: () => unknown): Opened {
  return plain(
    tx,
    async (text) => exec(text === 'BEGIN' ? 'BEGIN IMMEDIATE' : text),
    async () => close(),
  )
}

// Its client is generated where it finds @prisma/client, once for each run.
const PRISMA = fileURLToPath(new URL(`../.prisma/${process.pid}`, import.meta.url))
const SCHEMA = `generator client {
  provider     = "prisma-client"
  output       = "./client"
  moduleFormat = "esm"
}
datasource db {
  provider = "postgresql"
}
model Order {
  id String @id
  @@map("orders")
}
`
// biome-ignore lint/suspicious/noExplicitAny: its types are generated, too
let prismaClient: Promise<any> | undefined

async function generatePrisma() {
  mkdirSync(PRISMA, { recursive: true })
  writeFileSync(`${PRISMA}/schema.prisma`, SCHEMA)
  const command = [fileURLToPath(new URL('../../../node_modules/prisma/build/index.js', import.meta.url)), 'generate']
  await promisify(execFile)(process.execPath, [...command, '--schema', `${PRISMA}/schema.prisma`], {
    // It would download an engine that generating does not use.
    env: { ...process.env, PRISMA_SCHEMA_ENGINE_BINARY: '/bin/true', CHECKPOINT_DISABLE: '1' },
  })
  return import(`${PRISMA}/client/client.ts`)
}

export function removePrisma(): void {
  rmSync(PRISMA, { recursive: true, force: true })
}

export const DRIVERS: Driver[] = [
  {
    name: 'node-postgres client',
    dialect: 'postgres',
    open: async ({ url }) => {
      const client = new pg.Client(url)
      await client.connect()
      return plain(
        client,
        (text) => client.query(text),
        () => client.end(),
      )
    },
  },
  {
    name: 'node-postgres from a pool, of a version that does not tell its status',
    dialect: 'postgres',
    open: async ({ url }) => {
      const pool = new pg.Pool({ connectionString: url, max: 1 })
      const client = await pool.connect()
      Object.defineProperty(client, 'getTransactionStatus', { value: undefined })
      const close = async () => {
        client.release()
        await pool.end()
      }
      return plain(client, (text) => client.query(text), close)
    },
  },
  {
    name: 'postgres.js',
    dialect: 'postgres',
    open: async ({ url }) => {
      // What it does with names must not matter.
      const db = postgres(url, { transform: postgres.camel, max: 2, onnotice: () => undefined })
      return nested({
        outside: db,
        close: () => db.end(),
        transaction: (body) => db.begin(body) as never,
        run: (tx, text) => tx.unsafe(text),
        inner: (tx, body) => tx.savepoint(body),
      })
    },
  },
  {
    name: 'postgres.js reserved',
    dialect: 'postgres',
    open: async ({ url }) => {
      const db = postgres(url, { max: 1, onnotice: () => undefined })
      const reserved = await db.reserve()
      const close = async () => {
        reserved.release()
        await db.end()
      }
      return plain(reserved, (text) => reserved.unsafe(text), close)
    },
  },
  {
    name: 'Prisma',
    dialect: 'postgres',
    open: async ({ url }) => {
      prismaClient ??= generatePrisma()
      const { PrismaClient } = await prismaClient
      const client = new PrismaClient({ adapter: new PrismaPg({ connectionString: url }) })
      return nested({
        outside: client,
        close: () => client.$disconnect(),
        transaction: (body) => client.$transaction(body, { timeout: 60_000 }),
        run: (tx, text) => tx.$executeRawUnsafe(text),
      })
    },
  },
  {
    name: 'Drizzle on node-postgres',
    dialect: 'postgres',
    open: async ({ url }) => {
      const pool = new pg.Pool({ connectionString: url })
      return drizzled(drizzlePg(pool), () => pool.end())
    },
  },
  {
    name: 'Drizzle on postgres.js',
    dialect: 'postgres',
    open: async ({ url }) => {
      const client = postgres(url, { onnotice: () => undefined })
      return drizzled(drizzlePostgresJs(client), () => client.end())
    },
  },
  {
    name: 'Knex on pg',
    dialect: 'postgres',
    open: async ({ url }) => knexed(knex({ client: 'pg', connection: url })),
  },
  {
    name: 'Kysely on pg',
    dialect: 'postgres',
    open: async ({ url }) => {
      const dialect = new PostgresDialect({ pool: new pg.Pool({ connectionString: url }) })
      return kyselied(new Kysely({ dialect, plugins: [new CamelCasePlugin()] }))
    },
  },
  {
    name: 'TypeORM on pg',
    dialect: 'postgres',
    open: ({ url }) => sourced({ type: 'postgres', url }),
  },
  {
    name: "TypeORM's query runner",
    dialect: 'postgres',
    open: async ({ url }) => {
      const source = await new DataSource({ type: 'postgres', url }).initialize()
      const runner = source.createQueryRunner()
      const close = async () => {
        await runner.release()
        await source.destroy()
      }
      const verbs: Record<string, () => Promise<unknown>> = {
        BEGIN: () => runner.startTransaction(),
        COMMIT: () => runner.commitTransaction(),
        ROLLBACK: () => runner.rollbackTransaction(),
      }
      return plain(runner, (text) => verbs[text]?.() ?? runner.query(text), close)
    },
  },
  {
    name: 'better-sqlite3',
    dialect: 'sqlite',
    open: async ({ path }) => {
      const db = new Sqlite(path)
      return blocking(
        db,
        (text) => db.exec(text),
        () => db.close(),
      )
    },
  },
  {
    name: 'Drizzle on better-sqlite3',
    dialect: 'sqlite',
    open: async ({ path }) => {
      const client = new Sqlite(path)
      const db = drizzleSqlite(client)
      // Its transactions take functions that return no promise, as better-sqlite3's do; its database is in one, too.
      const opened = blocking(
        db,
        (text) => client.exec(text),
        () => client.close(),
      )
      return { ...opened, transaction: (body) => opened.transaction((session) => body({ ...session, tx: inside(db) })) }
    },
  },
  {
    name: 'Knex on better-sqlite3',
    dialect: 'sqlite',
    open: async ({ path }) =>
      knexed(knex({ client: 'better-sqlite3', connection: { filename: path }, useNullAsDefault: true })),
  },
  {
    name: 'Kysely on better-sqlite3',
    dialect: 'sqlite',
    open: async ({ path }) => kyselied(new Kysely({ dialect: new SqliteDialect({ database: new Sqlite(path) }) })),
  },
  {
    name: 'TypeORM on better-sqlite3',
    dialect: 'sqlite',
    open: ({ path }) => sourced({ type: 'better-sqlite3', database: path }),
  },
  {
    name: 'mysql2 with promises',
    dialect: 'mysql',
    open: async ({ url }) => {
      const connection = await mysqlPromise.createConnection(url)
      return plain(
        connection,
        (text) => connection.query(text),
        () => connection.end(),
      )
    },
  },
  {
    name: 'mysql2 with callbacks, from a pool',
    dialect: 'mysql',
    open: async ({ url }) => {
      const pool = mysql.createPool(url)
      const connection = await promisify(pool.getConnection.bind(pool))()
      const close = async () => {
        connection.release()
        await pool.promise().end()
      }
      return plain(connection, (text) => connection.promise().query(text), close)
    },
  },
  {
    name: 'Drizzle on mysql2',
    dialect: 'mysql',
    open: async ({ url }) => {
      const pool = mysqlPromise.createPool(url)
      return drizzled(drizzleMysql(pool), () => pool.end())
    },
  },
  {
    name: 'Knex on mysql2',
    dialect: 'mysql',
    open: async ({ url }) => knexed(knex({ client: 'mysql2', connection: url })),
  },
  {
    name: 'Kysely on mysql2',
    dialect: 'mysql',
    open: async ({ url }) => kyselied(new Kysely({ dialect: new MysqlDialect({ pool: mysql.createPool(url) }) })),
  },
  {
    name: 'TypeORM on mysql2',
    dialect: 'mysql',
    open: ({ url }) => sourced({ type: 'mysql', url }),
  },
]

if (ONLY_NODE_SQLITE) {
  DRIVERS.splice(0, DRIVERS.length, {
    name: 'node:sqlite',
    dialect: 'sqlite',
    open: async ({ path }) => {
      const db = await openSqlite(path)
      return blocking(
        db,
        (text) => db.exec(text),
        () => db.close(),
      )
    },
  })
}

/** What Drizzle hands to a transaction's function. */
// biome-ignore lint/suspicious/noExplicitAny: any database will do
function inside(db: any): object {
  let found: object = db
  try {
    db.transaction((tx: object) => {
      found = tx
      throw new Error('only to see it')
    })
  } catch {}
  return found
}
