/**
 * TypeORM: an `EntityManager` or a `QueryRunner`.
 *
 * @module
 */
import { type Adapt, type Dialect, has } from './shape.js'

const DIALECTS: Record<string, Dialect> = {
  postgres: 'postgres',
  'aurora-postgres': 'postgres',
  mysql: 'mysql',
  mariadb: 'mysql',
  'aurora-mysql': 'mysql',
  sqlite: 'sqlite',
  'better-sqlite3': 'sqlite',
}

/** A driver for a manager or a runner. */
export const typeorm: Adapt = (manager) => {
  const source = manager.dataSource ?? manager.connection // so it was called before 1.0
  if (!has(manager, 'query') || typeof source?.options?.type !== 'string') return undefined
  const runner = 'isTransactionActive' in manager ? manager : manager.queryRunner
  const dialect = DIALECTS[source.options.type]
  return {
    dialect,
    style: dialect === 'postgres' ? '$' : '?',
    inTransaction: () => runner?.isTransactionActive === true,
    run: async (sql, params) => {
      const result = await manager.query(sql, params)
      if (!Array.isArray(result)) return []
      // A DELETE on PostgreSQL gives its rows and their number.
      return Array.isArray(result[0]) && typeof result[1] === 'number' ? result[0] : result
    },
  }
}
