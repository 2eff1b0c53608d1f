/**
 * node-postgres: a `Client`, or what a pool hands out.
 *
 * @module
 */
import { type Adapt, asksPostgres, has } from './shape.js'

/** A driver for a client. A pool, which lacks `connectionParameters`, is none. */
export const nodePostgres: Adapt = (client) => {
  if (!has(client, 'query') || !('connectionParameters' in client)) return undefined
  return {
    dialect: 'postgres',
    style: '$',
    inTransaction: () =>
      // Clients before 8.18 do not tell, and none knows of a BEGIN that is not answered yet.
      client.getTransactionStatus?.() === 'T' || asksPostgres((sql) => client.query(sql)),
    run: async (text, values) => (await client.query({ text, values })).rows,
  }
}
