// As `public_api.ts`: the outbox, the inbox and the relay.
import type Database from 'better-sqlite3'
import { drizzle } from 'drizzle-orm/better-sqlite3'
import type { Knex } from 'knex'
import type { Client } from 'pg'
import { type Bus, Event, type PolybusError } from 'polybus'
import {
  type DeadRow,
  type Executor,
  type FailurePolicy,
  Inbox,
  inbox,
  Outbox,
  Relay,
  type RelayBatch,
  type RelayHealth,
  type RelayStats,
} from 'polybus/outbox'

// What blocks returns at once, everything else a promise.
export async function outbox(blocking: Database.Database, client: Client, trx: Knex.Transaction): Promise<void> {
  const box = new Outbox({ table: 'app.outbox', service: 'shop' })
  const event = Event.create('order.paid', { cents: 1 })
  const one: boolean = box.store(event, blocking)
  const many: boolean[] = box.store([event], blocking)
  const drizzled: boolean = box.store(event, drizzle(blocking))
  const later: boolean = await box.store(event, client, { dedupeKey: 'k' })
  const laterMany: Promise<boolean[]> = box.store([event], trx)
  // @ts-expect-error: a promise is no boolean
  const wrong: boolean = box.store(event, client)
  // @ts-expect-error: a type and a payload are no event
  box.store('order.paid', blocking)
  const first: boolean = inbox.once(event, blocking, { consumer: 'billing' })
  const laterFirst: Promise<boolean> = inbox.once(event, trx)
  const { sql, params } = box.statement(event, { style: '$' })
  // @ts-expect-error: no such style
  box.statement(event, { style: '%d' })
  void [one, many, drizzled, later, laterMany, wrong, first, laterFirst, sql, params, box.ddl('mysql')]
}

export async function marks(blocking: Database.Database, client: Client): Promise<void> {
  const own = new Inbox({ table: 'app.inbox' })
  const gone: number = own.purge(blocking, { olderThanMs: 5 })
  const goneLater: Promise<number> = own.purge(client, { olderThanMs: 5, limit: 10 })
  // @ts-expect-error: how old must be said
  own.purge(client, {})
  // @ts-expect-error: seconds have another name
  own.purge(client, { olderThan: 5 })
  // @ts-expect-error: neither an event nor the id of one
  await own.once(5, client)
  // @ts-expect-error: unknown option
  new Inbox({ tabel: 'x' })
  void [gone, goneLater]
}

interface Events {
  'order.paid': { cents: number }
}
export async function relay(bus: Bus, typed: Bus<Events>, blocking: Database.Database): Promise<void> {
  const execute: Executor = async (sql, params) => ({ rows: [[sql, params.length]], affected: 1 })
  const failurePolicy: FailurePolicy = (attempts, error: PolybusError) =>
    error.retryable && attempts < 5 ? attempts * 100 : null
  const running = new Relay('postgres://shop@db/shop', bus, { failurePolicy, workers: 2, leaseMs: 30_000 })
  new Relay(blocking, typed, { retry: { maxRetries: 5 }, failurePolicy: async () => new Date() })
  new Relay(execute, bus, { dialect: 'postgres', style: '$', listen: false })
  // @ts-expect-error: where to
  new Relay('postgres://shop@db/shop')
  // @ts-expect-error: seconds have another name
  new Relay('postgres://shop@db/shop', bus, { lease: 30 })
  // @ts-expect-error: rows and a number
  new Relay(async () => [], bus)
  // @ts-expect-error: no decision
  new Relay(execute, bus, { failurePolicy: () => 'later' })
  const batch: RelayBatch = await running.relayBatch()
  const outage: string | null = batch.outage
  const stats: RelayStats = await running.stats()
  const health: RelayHealth = running.health()
  const metrics: string = await running.metrics()
  const letters: DeadRow[] = await running.deadLetters({ limit: 10, after: 5 })
  const died: Date | undefined = letters[0]?.deadAt
  const count: number = (await running.replay(letters[0]?.eventId)) + (await running.purgeDead())
  await running.purge({ olderThanMs: 86_400_000 })
  // @ts-expect-error: how old must be said
  await running.purge()
  const database: string | null = running.database
  running.wake()
  running.stop()
  await running.run({ signal: AbortSignal.timeout(5) })
  void [outage, stats.oldestMs, health.lastLookMs, metrics, died, count, database]
}
