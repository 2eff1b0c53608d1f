// A service of Prisma: takes orders, as many as each line says, and handles the orders of every service.
import { createInterface } from 'node:readline'
import { PrismaPg } from '@prisma/adapter-pg'
import { Bus, Event } from 'polybus'
import { inbox, Outbox } from 'polybus/outbox'
import { PrismaClient } from '../../../examples/outbox/generated/client.ts'

const [database, url] = process.argv.slice(2) as [string, string]
const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: database }) })
const bus = new Bus(url, { service: 'prisma' })
const outbox = new Outbox()

/** Every fifth is refused when all is written. */
async function take(order: string, number: number): Promise<void> {
  const taken = prisma.$transaction(async (tx) => {
    await tx.$executeRaw`INSERT INTO orders VALUES (${order})`
    await outbox.store(Event.create('order.placed', { orderId: order }, { partitionKey: order }), tx)
    if (number % 5 === 4) throw new Error('refused')
  })
  await taken.catch((error) => {
    if (error.message !== 'refused') throw error
  })
}

// One transaction: the mark, the effect, and the next event.
bus.on<{ orderId: string }>('order.placed', { concurrency: 4 }, async function reserve(event) {
  const { orderId } = event.payload
  await prisma.$transaction(async (tx) => {
    if (!(await inbox.once(event, tx))) {
      await tx.suppressed.create({ data: { eventId: event.meta.id } })
      return
    }
    await tx.reservation.create({ data: { orderId, parcels: 1 } })
    await outbox.store(event.child('stock.reserved', { orderId }), tx)
  })
})

await bus.start()
console.log('ready')
for await (const line of createInterface({ input: process.stdin })) {
  for (let number = 0; number < Number(line); number++) await take(`prisma-${number}`, number)
  console.log('taken')
}
await bus.close()
await prisma.$disconnect()
