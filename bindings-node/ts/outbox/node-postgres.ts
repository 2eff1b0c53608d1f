/**
 * node-postgres: a `Client`, or what a pool hands out.
 *
 * @module
 */
import { type Adapt, asksPostgres, type Driver, has, type Shape, type Statement } from './shape.js'

class NodePostgres implements Driver {
  readonly dialect = 'postgres'
  readonly style = '$'
  readonly #client: Shape

  constructor(client: Shape) {
    this.#client = client
  }

  inTransaction(): true | Promise<boolean> {
    // Clients before 8.18 do not tell, and none knows of a BEGIN that is not answered yet.
    return this.#client.getTransactionStatus?.() === 'T' || asksPostgres((sql) => this.#client.query(sql))
  }

  isOpen(): boolean | undefined {
    const status = this.#client.getTransactionStatus?.()
    return status ? status !== 'I' : undefined
  }

  async run(text: string, values: Statement['params']): Promise<unknown[]> {
    return (await this.#client.query({ text, values })).rows
  }

  async change(text: string, values: Statement['params']): Promise<number> {
    return (await this.#client.query({ text, values })).rowCount
  }
}

/** A driver for a client. A pool, which lacks `connectionParameters`, is none. */
export const nodePostgres: Adapt = (client) =>
  has(client, 'query') && 'connectionParameters' in client ? new NodePostgres(client) : undefined
