/**
 * Knex: a `trx`.
 *
 * @module
 */
import { type Adapt, type Dialect, has, isFunction, type Shape } from './shape.js'

const DIALECTS: Record<string, Dialect> = {
  postgresql: 'postgres',
  postgres: 'postgres',
  pgnative: 'postgres',
  mysql: 'mysql',
  sqlite3: 'sqlite',
  'better-sqlite3': 'sqlite',
}

/** A driver for a transaction, or for Knex itself, which is none. */
export const knex: Adapt = (trx) => {
  if (!isFunction(trx) || !has(trx, 'raw') || trx.client === undefined) return undefined
  return {
    dialect: DIALECTS[trx.client.dialect],
    style: '?',
    inTransaction: () => trx.isTransaction === true && !trx.isCompleted?.(),
    run: async (sql, params) => rowsOf(await trx.raw(sql, params as never)),
  }
}

/** PostgreSQL gives an object with rows, mysql2 a pair of rows and fields or of a header and nothing, SQLite the rows. */
function rowsOf(result: Shape): unknown[] {
  if (Array.isArray(result?.rows)) return result.rows
  if (!Array.isArray(result)) return []
  const header = result.length === 2 && (result[1] === undefined || Array.isArray(result[1]))
  if (header) return Array.isArray(result[0]) ? result[0] : []
  return result
}
