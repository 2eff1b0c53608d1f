/**
 * mysql2: a connection, with promises or with callbacks, alone or from a pool.
 *
 * @module
 */
import { type Adapt, has, type Shape } from './shape.js'

const IN_TRANSACTION = 1
const AUTOCOMMIT = 2

/** A driver for a connection. A pool cannot begin a transaction, and is none. */
export const mysql2: Adapt = (given) => {
  if (!has(given, 'beginTransaction', 'query', 'execute')) return undefined
  const connection = has(given, 'promise') ? given.promise() : given
  return {
    dialect: 'mysql',
    style: '?',
    inTransaction: async () => {
      // The connection does not keep what the server says of itself with each answer.
      const [{ serverStatus }] = (await connection.query('DO 0')) as [Shape]
      return (serverStatus & IN_TRANSACTION) !== 0 || (serverStatus & AUTOCOMMIT) === 0
    },
    run: async (sql, params) => {
      const [rows] = await connection.query(sql, params)
      return Array.isArray(rows) ? rows : []
    },
  }
}
