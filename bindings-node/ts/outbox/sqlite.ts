/**
 * better-sqlite3 and node:sqlite, which block.
 *
 * @module
 */
import { type Adapt, has } from './shape.js'

/** A driver for a database. */
export const sqlite: Adapt = (db) => {
  const name = 'inTransaction' in db ? 'inTransaction' : 'isTransaction'
  if (!has(db, 'prepare', 'exec') || typeof db[name] !== 'boolean') return undefined
  return {
    dialect: 'sqlite',
    style: '?',
    blocks: true,
    inTransaction: () => db[name],
    run: (sql, params) => db.prepare(sql).all(...params),
  }
}
