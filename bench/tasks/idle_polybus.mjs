// Idle: 20 subscriptions on a SQLite file, nothing happens; the CPU time of the process, all threads.
import { ask, now, polybus, say, sleep } from './common.mjs'

const { Bus } = await polybus()

const bus = new Bus(`sqlite:///${ask.path}`, { service: 'bench' })
await bus.start()
for (let i = 0; i < 20; i++) await bus.subscribe(`order${i}.*`, async () => {}, { name: `idle${i}` })
await sleep(2000)
const cpu = process.cpuUsage()
const wall = now()
await sleep(ask.seconds * 1000)
const { user, system } = process.cpuUsage(cpu)
say({ percent: ((user + system) * 1e5) / (now() - wall) })
await bus.close()
