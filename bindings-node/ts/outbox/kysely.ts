/**
 * Kysely: a transaction, controlled or not.
 *
 * @module
 */
import { type Adapt, type Dialect, has } from './shape.js'

const DIALECTS: [RegExp, Dialect][] = [
  [/postgres/i, 'postgres'],
  [/mysql|maria/i, 'mysql'],
  [/sqlite/i, 'sqlite'],
]

/** A driver for a transaction, or for the database itself, which is none. */
export const kysely: Adapt = (trx) => {
  if (!has(trx, 'executeQuery', 'getExecutor')) return undefined
  const adapter: string = trx.getExecutor().adapter?.constructor.name ?? ''
  const dialect = DIALECTS.find(([pattern]) => pattern.test(adapter))?.[1]
  return {
    dialect,
    style: dialect === 'postgres' || dialect === undefined ? '$' : '?',
    inTransaction: () => trx.isTransaction === true,
    // As CompiledQuery.raw makes it, which would have to be imported, perhaps from another copy.
    run: async (sql, parameters) =>
      (
        await trx.executeQuery({
          sql,
          parameters,
          query: { kind: 'RawNode', sqlFragments: [sql], parameters: [] },
          queryId: { queryId: 'polybus' },
        })
      ).rows,
  }
}
