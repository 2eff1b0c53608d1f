// The warehouse: Fastify and Prisma. What an order makes it do, the mark that it did, and its answer commit together.
import { PrismaPg } from '@prisma/adapter-pg'
import Fastify from 'fastify'
import { Bus } from 'polybus'
import { Inbox, Outbox } from 'polybus/outbox'
import { PrismaClient } from './generated/client.ts'

const { WAREHOUSE_DB, BUS } = process.env as { WAREHOUSE_DB: string; BUS: string }
const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: WAREHOUSE_DB, max: 16 }) })
const bus = new Bus(BUS, { service: 'warehouse', leaseMs: 3000 })
const outbox = new Outbox()
const inbox = new Inbox()

bus.on<{ orderId: string }>('order.placed', { concurrency: 8 }, async function reserve(event) {
  const { orderId } = event.payload
  await prisma.$transaction(async (tx) => {
    if (!(await inbox.once(event, tx, { consumer: 'warehouse' }))) {
      await tx.suppressed.create({ data: { eventId: event.meta.id } })
      return
    }
    await tx.reservation.create({ data: { orderId, parcels: 1 } })
    await outbox.store(event.child('stock.reserved', { orderId }, { partitionKey: orderId }), tx)
  })
})

const app = Fastify()
app.get('/reservations/:orderId', async (request) => {
  const { orderId } = request.params as { orderId: string }
  return { parcels: await prisma.reservation.count({ where: { orderId } }) }
})
app.addHook('onClose', async () => {
  await bus.close()
  await prisma.$disconnect()
})
process.once('SIGTERM', () => void app.close())

await bus.start()
await app.listen({ host: '127.0.0.1', port: 0 })
console.log((app.server.address() as { port: number }).port)
