// The TypeScript actor: obeys one JSON command a line, tells what happens. See README.md.
import { createInterface } from 'node:readline'
import { Bus, type DeadLetter, Event, type Subscription } from 'polybus'

const tell = (value: unknown) => process.stdout.write(`${JSON.stringify(value)}\n`)
const text = (event: Event<unknown>) => Buffer.from(event.raw).toString()

const [url, busName] = process.argv.slice(2) as [string, string]
const bus = new Bus(url, { service: 'node', bus: busName, leaseMs: 1000 })
await bus.start()
tell({ ready: true })
const subscriptions: Subscription[] = []

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  if (command.do === 'publish') {
    const event = Event.create(command.type, Buffer.from(command.payload), command.meta)
    tell({ published: (await bus.publish(event)).id })
  } else if (command.do === 'subscribe') {
    const handler = async (event: Event<unknown>) => {
      tell({ saw: event.toDict(), payload: text(event), attempt: event.delivery?.attempt })
      if (command.hang) await new Promise(() => {})
      if (command.fail) throw new Error('as the test wants ☃')
    }
    const retry = { maxRetries: 1, initialDelayMs: 5, jitter: 'none' } as const
    subscriptions.push(
      await bus.subscribe(command.pattern, handler, { name: command.name, group: command.group, retry }),
    )
    tell({ subscribed: command.name })
  } else if (command.do === 'unsubscribe') {
    await Promise.all(subscriptions.map((subscription) => subscription.unsubscribe()))
    tell({ unsubscribed: true })
  } else if (command.do === 'dead') {
    tell({ dead: (await bus.deadLetters.list({ limit: 100 })).map(described) })
  } else if (command.do === 'replay') {
    tell({ replayed: await bus.deadLetters.replay({}) })
  } else if (command.do === 'again') {
    const { group, after } = command
    tell({ again: await bus.replay(command.pattern, { group, limit: command.limit, after }) })
  }
}
await bus.close()

function described(letter: DeadLetter) {
  if (!letter.event) throw new Error('undecodable')
  const { event, reason, attempts, group, error } = letter
  return { event: event.toDict(), payload: text(event), reason, attempts, group, error: error.message }
}
