// Idle: so many subscriptions, nothing happens; the CPU time of the process, all threads.
import { once } from 'node:events'
import { ask, now, polybus, say, sleep } from './common.mjs'

const { Bus } = await polybus()

const bus = new Bus(ask.url, { service: 'bench' })
await bus.start()
for (let i = 0; i < ask.subscriptions; i++) await bus.subscribe(`order${i}.*`, async () => {}, { name: `idle${i}` })
say({ ready: true })
await once(process.stdin, 'data') // not readSync: a blocked loop would be idle for another reason
await sleep(2000)
const cpu = process.cpuUsage()
const wall = now()
await sleep(ask.seconds * 1000)
const { user, system } = process.cpuUsage(cpu)
say({ percent: ((user + system) * 1e5) / (now() - wall) })
await once(process.stdin, 'data') // open until its connections are counted
await bus.close()
process.stdin.destroy()
