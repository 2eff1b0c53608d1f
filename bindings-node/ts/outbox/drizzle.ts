/**
 * Drizzle, on any of its drivers.
 *
 * @module
 */
import { type Adapt, type Dialect, has, type Shape } from './shape.js'

// Drizzle marks its classes with their kind, because there may be several copies of it.
const KIND = Symbol.for('drizzle:entityKind')
const FAMILIES: [RegExp, Dialect][] = [
  [/^Pg(Transaction|Database)$/, 'postgres'],
  [/^(SQLiteTransaction|BaseSQLiteDatabase)$/, 'sqlite'],
  [/^MySql(Transaction|Database)$/, 'mysql'],
]

/** A driver for a transaction, or for the database itself, which is none. */
export const drizzle: Adapt = (tx) => {
  const kinds = kindsOf(tx)
  const dialect = FAMILIES.find(([pattern]) => kinds.some((kind) => pattern.test(kind)))?.[1]
  if (dialect === undefined || !has(tx, dialect === 'sqlite' ? 'all' : 'execute')) return undefined
  const inTransaction = () => kinds.some((kind) => kind.endsWith('Transaction'))
  if (dialect !== 'sqlite') {
    return {
      dialect,
      style: dialect === 'postgres' ? '$' : '?',
      inTransaction,
      run: async (sql, params) => rowsOf(await tx.execute(raw(sql, params))),
    }
  }
  const run = (sql: string, params: unknown[]) => tx.all(raw(sql, params))
  return { dialect, style: '?', blocks: tx.resultKind === 'sync', inTransaction, run }
}

/** Kinds of an object's class and of those that it extends. */
function kindsOf(tx: Shape): string[] {
  const kinds: string[] = []
  for (let type = tx.constructor as Shape | null; typeof type === 'function'; type = Object.getPrototypeOf(type)) {
    if (Object.hasOwn(type, KIND)) kinds.push(type[KIND as never])
  }
  return kinds
}

/** A statement with its parameters, as what `sql` makes: to import that from `drizzle-orm` might find another copy. */
function raw(sql: string, params: unknown[]): object {
  const query = { sql, params }
  const statement = { getSQL: () => statement, toQuery: () => query }
  return statement
}

/** node-postgres gives an object with rows, postgres.js the rows, mysql2 the rows or a header, and the fields. */
function rowsOf(result: Shape): unknown[] {
  if (Array.isArray(result.rows)) return result.rows
  if (!Array.isArray(result)) return []
  if (Array.isArray(result[0]) && result.length === 2) return result[0]
  return 'count' in result || 'command' in result ? [...result] : []
}
