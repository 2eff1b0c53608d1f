/**
 * Prisma: what an interactive transaction hands to its function.
 *
 * @module
 */
import { type Adapt, type Dialect, has } from './shape.js'

const DIALECTS: Record<string, Dialect> = {
  postgresql: 'postgres',
  postgres: 'postgres',
  mysql: 'mysql',
  sqlite: 'sqlite',
}

/** A driver for a transaction, or for the client itself, which is none. */
export const prisma: Adapt = (tx) => {
  if (!has(tx, '$queryRawUnsafe', '$executeRawUnsafe')) return undefined
  const dialect = DIALECTS[tx._activeProvider]
  return {
    dialect,
    style: dialect === 'mysql' || dialect === 'sqlite' ? '?' : '$',
    // Only the client can connect.
    inTransaction: () => !has(tx, '$connect'),
    run: async (sql, params, returnsRows) => {
      if (returnsRows) return tx.$queryRawUnsafe(sql, ...params)
      await tx.$executeRawUnsafe(sql, ...params)
      return []
    },
  }
}
