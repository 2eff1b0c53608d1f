/**
 * What an adapter makes of what the user handed in, and how it is told by its shape.
 *
 * @module
 */

/** A database, as `ddl` names it. MariaDB is `mysql`. */
export type Dialect = 'postgres' | 'sqlite' | 'mysql'

/** SQL text, and what its placeholders stand for in order of appearance. */
export interface Statement {
  readonly sql: string
  readonly params: (string | number | null)[]
}

/** A connection or transaction that the user handed in. */
export interface Driver {
  /** `undefined` where the driver does not say. */
  readonly dialect: Dialect | undefined
  readonly style: '$' | '?'
  /** Whether it blocks: then no method returns a promise. */
  readonly blocks?: boolean
  /** Whether what runs next belongs to a transaction that the user ends. */
  inTransaction(): boolean | Promise<boolean>
  /** Whether one is open, where {@link Driver.inTransaction} might ask the server; `undefined` if only that can tell. */
  isOpen?(): boolean | undefined
  /** Runs it in that transaction. Resolves to its rows if it has any, in the shape that the driver gives them. */
  run(sql: string, params: Statement['params'], returnsRows: boolean): unknown[] | Promise<unknown[]>
  /**
   * Runs a statement without rows in that transaction, and resolves to how many it changed: where a driver has it, that
   * spares one event the rows that {@link Driver.run} asks for. The text is always the same.
   */
  change?(sql: string, params: Statement['params']): Promise<number>
}

/** Makes a driver of an object of its family, and nothing of any other. */
export type Adapt = (tx: Shape) => Driver | undefined

/** Any object, looked at by its members. */
export type Shape = Record<string, any>

/** Whether PostgreSQL is in a transaction, for drivers that do not tell: a savepoint is refused outside of one. */
export async function asksPostgres(query: (sql: string) => Promise<unknown>): Promise<boolean> {
  try {
    await query('SAVEPOINT polybus')
  } catch (error) {
    // no_active_sql_transaction; in one that failed, what comes next says so itself.
    if ((error as Shape)?.code === '25P01') return false
    if ((error as Shape)?.code === '25P02') return true
    throw error
  }
  await query('RELEASE SAVEPOINT polybus')
  return true
}

/** Whether all of these members are functions. */
export function has(shape: Shape, ...names: string[]): boolean {
  return names.every((name) => typeof shape[name] === 'function')
}

/** Whether it is one itself; what it is stays, as TypeScript would not see its members any more. */
export function isFunction(shape: Shape): boolean {
  return typeof shape === 'function'
}
