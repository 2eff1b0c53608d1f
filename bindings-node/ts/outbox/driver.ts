/**
 * How a statement of the core runs on what the user handed in. Each family of drivers has a file that tells its objects
 * by their shape and makes a {@link Driver} of them.
 *
 * What is to be run comes as a generator that yields statements and is sent the first column of their rows, so that it is
 * written once for drivers that block and for those to be awaited.
 *
 * @module
 */
import { fromNative, InvalidConfig, type PolybusError } from '../errors.js'
import { drizzle } from './drizzle.js'
import { knex } from './knex.js'
import { kysely } from './kysely.js'
import { mysql2 } from './mysql2.js'
import { nodePostgres } from './node-postgres.js'
import { postgresJs } from './postgres-js.js'
import { prisma } from './prisma.js'
import type { Adapt, Dialect, Driver, Shape, Statement } from './shape.js'
import { sqlite } from './sqlite.js'
import { typeorm } from './typeorm.js'

/** A database whose driver blocks: better-sqlite3, node:sqlite, and Drizzle on the former. */
export type SyncTransaction =
  | { prepare(sql: string): any; readonly inTransaction: boolean }
  | { prepare(sql: string): any; readonly isTransaction: boolean }
  | { run(query: any): { changes: number | bigint }; all(query: any): unknown[] }

// From the more telling shape to the plainer one: some wrap others and look like them.
const FAMILIES: readonly Adapt[] = [prisma, drizzle, kysely, knex, typeorm, postgresJs, nodePostgres, sqlite, mysql2]
const FUNCTIONS: readonly Adapt[] = [knex, postgresJs]

const ACCEPTED =
  'a client of node-postgres or postgres.js, a transaction of Prisma, Drizzle, Knex, Kysely or TypeORM, a database of ' +
  'better-sqlite3 or node:sqlite, or a connection of mysql2; never a pool, where each statement is on its own; for any ' +
  'other driver run what outbox.statement(event, { style }) returns'

/** Which family the objects of a class are of, from its prototype. */
const KNOWN = new WeakMap<object, Adapt>()

/** The driver of what the user handed in. */
export function find(tx: unknown, call: string, dialect: Dialect | undefined): Driver & { dialect: Dialect } {
  if ((typeof tx === 'object' || typeof tx === 'function') && tx !== null) {
    const prototype = Object.getPrototypeOf(tx)
    const driver = (prototype && KNOWN.get(prototype)?.(tx as Shape)) ?? search(tx as Shape, prototype)
    if (driver !== undefined) return speaking(driver, call, dialect)
  }
  const kind = tx === null || tx === undefined ? String(tx) : ((tx as Shape).constructor?.name ?? typeof tx)
  throw new InvalidConfig(`${call} got ${kind}, which is no open connection that it knows; give ${ACCEPTED}`)
}

function search(tx: Shape, prototype: object | null): Driver | undefined {
  for (const family of typeof tx === 'function' ? FUNCTIONS : FAMILIES) {
    const driver = family(tx)
    if (driver === undefined) continue
    // Plain objects and functions have one prototype and are of any family.
    if (prototype !== null && prototype !== Object.prototype && prototype !== Function.prototype) {
      KNOWN.set(prototype, family)
    }
    return driver
  }
  return undefined
}

function speaking(driver: Driver, call: string, dialect: Dialect | undefined): Driver & { dialect: Dialect } {
  const spoken = dialect ?? driver.dialect
  if (spoken === undefined) {
    throw new InvalidConfig(
      `${call} cannot tell which database this transaction is of, or does not know it; give { dialect: 'postgres' }, ` +
        "'sqlite' or 'mysql' if it is one of these",
    )
  }
  return spoken === driver.dialect
    ? (driver as Driver & { dialect: Dialect })
    : Object.assign(driver, { dialect: spoken })
}

/** What is to be run: yields a statement, and is sent the first column of its rows. */
export type Steps<T> = Generator<Statement & { returnsRows: boolean }, T, unknown[]>

/** What the core knows of the table that the statements are for. */
export interface Table {
  missing(dialect: string): string
  denied(dialect: string, relaying: boolean): string
  readOnly(): string
}

/** How {@link drive} is to run its steps. */
export interface Drive {
  /** What would be committed alone without a transaction, for the message. */
  what: string
  allowAutocommit: boolean | undefined
}

/** Runs the statements of `steps` in the transaction that is open. A promise unless the driver blocks. */
export function drive<T>(
  driver: Driver & { dialect: Dialect },
  steps: Steps<T>,
  table: Table,
  how: Drive,
): T | Promise<T> {
  return driver.blocks ? driveNow(driver, steps, table, how) : driveLater(driver, steps, table, how)
}

function driveNow<T>(driver: Driver & { dialect: Dialect }, steps: Steps<T>, table: Table, how: Drive): T {
  if (!how.allowAutocommit && !driver.inTransaction()) throw alone(how.what)
  let step = steps.next()
  while (!step.done) {
    const { sql, params, returnsRows } = step.value
    try {
      step = steps.next(firstColumn(driver.run(sql, params, returnsRows) as unknown[]))
    } catch (error) {
      throw explained(error, table, driver.dialect) ?? error
    }
  }
  return step.value
}

async function driveLater<T>(
  driver: Driver & { dialect: Dialect },
  steps: Steps<T>,
  table: Table,
  how: Drive,
): Promise<T> {
  if (!how.allowAutocommit && !(await driver.inTransaction())) throw alone(how.what)
  let step = steps.next()
  while (!step.done) {
    const { sql, params, returnsRows } = step.value
    try {
      step = steps.next(firstColumn(await driver.run(sql, params, returnsRows)))
    } catch (error) {
      throw explained(error, table, driver.dialect) ?? error
    }
  }
  return step.value
}

/** Runs one statement in the transaction that is open, through a driver that counts; resolves to how many rows it changed. */
export async function change(
  driver: Driver & { dialect: Dialect },
  sql: string,
  params: Statement['params'],
  table: Table,
  how: Drive,
): Promise<number | undefined> {
  if (!how.allowAutocommit) {
    const open = driver.inTransaction()
    if (open !== true && !(await open)) throw alone(how.what)
  }
  try {
    return await driver.change?.(sql, params)
  } catch (error) {
    throw explained(error, table, driver.dialect) ?? error
  }
}

function alone(what: string): InvalidConfig {
  return new InvalidConfig(
    `there is no open transaction, so ${what} would be committed alone; begin one around it and the change that it ` +
      'belongs to, hand in what it gives you, or pass allowAutocommit: true',
  )
}

/** What to throw instead of what a driver threw; nothing if that says it well. */
export function explained(cause: unknown, table: Table, dialect: Dialect, relaying = false): PolybusError | undefined {
  let told: string | undefined
  if (says(cause, NO_TABLE)) told = table.missing(dialect)
  else if (says(cause, DENIED)) told = table.denied(dialect, relaying)
  else if (says(cause, READ_ONLY)) told = table.readOnly()
  if (told === undefined) return undefined
  const error = fromNative(new Error(told)) as PolybusError
  Object.defineProperty(error, 'cause', { value: cause, configurable: true, writable: true })
  return error
}

// Rows are objects or arrays, and their names may have been changed on the way.
function firstColumn(rows: unknown[]): unknown[] {
  return rows.map((row) => Object.values(row as object)[0])
}

/**
 * How drivers say one thing: by PostgreSQL's state, by MySQL's number, in SQLite's words. SQLite has one code for every
 * error in a statement's text: only the message tells them apart.
 */
interface Sign {
  states: readonly string[]
  numbers: readonly number[]
  words: RegExp
}

// PostgreSQL: undefined_table, undefined_column, invalid_schema_name. MySQL: the same three.
const NO_TABLE: Sign = {
  states: ['42P01', '42703', '3F000'],
  numbers: [1146, 1054, 1049],
  words: /no such table|no such column|has no column named|unknown database/,
}
// insufficient_privilege; the same for a database, a table and a column.
const DENIED: Sign = {
  states: ['42501'],
  numbers: [1044, 1142, 1143],
  words: /attempt to write a readonly database/,
}
// read_only_sql_transaction; a server, a transaction and an engine that only read.
const READ_ONLY: Sign = { states: ['25006'], numbers: [1290, 1792, 1836], words: /(?!)/ }
const SQLITE = /^(SQLITE_ERROR|SQLITE_READONLY\w*|ERR_SQLITE_ERROR)$/

function says(error: unknown, sign: Sign, depth = 6): boolean {
  if (typeof error !== 'object' || error === null || depth === 0) return false
  const { code, originalCode, errno, message, cause, driverError, meta, driverAdapterError } = error as Shape
  if (sign.states.includes(code) || sign.states.includes(originalCode) || sign.numbers.includes(errno)) return true
  if (SQLITE.test(code) && sign.words.test(message)) return true
  // How Drizzle, TypeORM and Prisma wrap what their driver threw.
  return [cause, driverError, meta, driverAdapterError].some((inner) => says(inner, sign, depth - 1))
}
