/**
 * postgres.js: the `sql` that `sql.begin` hands to its function.
 *
 * @module
 */
import { type Adapt, asksPostgres, has, isFunction } from './shape.js'

/** A driver for a `sql`, which is a function itself. */
export const postgresJs: Adapt = (sql) => {
  if (!isFunction(sql) || !has(sql, 'unsafe')) return undefined
  return {
    dialect: 'postgres',
    style: '$',
    inTransaction: () => {
      if (has(sql, 'savepoint')) return true
      // A reserved connection, where the user may have begun one; the pool has none.
      return has(sql, 'release') && asksPostgres((text) => sql.unsafe(text))
    },
    isOpen: () => has(sql, 'savepoint') || (has(sql, 'release') ? undefined : false),
    run: async (text, params) => [...(await sql.unsafe(text, params))],
    // Prepared as its own queries are, unless it is told not to: otherwise it asks the server for the types each time.
    change: async (text, params) => (await sql.unsafe(text, params, { prepare: true })).count,
  }
}
