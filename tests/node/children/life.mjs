// One process of the lifecycle tests: does what its first argument says, and tells on stdout.
import { setImmediate as turn } from 'node:timers/promises'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { Bus } from 'polybus'

const [what, url] = process.argv.slice(2)
const tell = (value) => process.stdout.write(`${JSON.stringify(value)}\n`)
const bus = new Bus(url, { service: 'life', leaseMs: 1000 })

const acts = {
  // Nothing is opened: the process ends.
  async unused() {
    bus.on('a', function never() {})
  },
  // A publish under way holds the process until it is done.
  async publish() {
    bus.publish('a', 1).then((receipt) => tell(receipt))
  },
  // After close the process ends by itself.
  async close() {
    bus.on('a', async function handle(event) {
      tell({ saw: event.payload })
      await bus.close()
    })
    await bus.start()
    await bus.publish('a', 1)
  },
  // process.exit without close, in the middle of a handler.
  async exit() {
    bus.on('a', async function handle(event) {
      tell({ attempt: event.delivery.attempt })
      setImmediate(() => process.exit(0))
      await new Promise(() => {})
    })
    await bus.start()
    await bus.publish('a', 1)
  },
  // A subscription that does not hold the process: it ends, without close.
  async unref() {
    bus.unref()
    await bus.subscribe('a', () => {}, { name: 'handle' })
    tell('subscribed')
  },
  // Waits for a signal; a plain SIGTERM ends it.
  async wait() {
    bus.on('a', async function handle(event) {
      tell({ attempt: event.delivery.attempt })
      await new Promise(() => {})
    })
    await bus.start()
    await bus.publish('a', 1)
  },
  // Closes on SIGTERM: what runs is handed back, and the process ends.
  async graceful() {
    process.once('SIGTERM', () => void bus.close({ timeoutMs: 50 }))
    await acts.wait()
  },
  // Takes what is there, once.
  async take() {
    bus.on('a', async function handle(event) {
      tell({ attempt: event.delivery.attempt, redelivered: event.delivery.redelivered })
      await bus.close()
    })
    await bus.start()
  },
  // Blocks its event loop for three leases in the middle of a handler.
  async block() {
    bus.on('a', async function handle(event) {
      tell({ attempt: event.delivery.attempt, pid: 'blocked' })
      const until = Date.now() + 3000
      while (Date.now() < until);
      tell('unblocked')
      setTimeout(() => bus.close(), 10)
    })
    await bus.start()
    tell('ready')
  },
  // Awaits a publish, and does not close.
  async alone() {
    await bus.publish('a', 1)
    await bus.publish('a', 2)
    tell('published')
  },
  // Throws when a publish is done: nobody catches it.
  async throws() {
    process.once('unhandledRejection', (error) => tell(String(error)))
    await bus.publish('a', 1)
    bus.publish('a', 2).then(() => {
      throw new Error('mine')
    })
  },
  // Forgets buses that were in use, until they are collected.
  async forget() {
    setFlagsFromString('--expose-gc')
    const gc = runInNewContext('gc')
    let collected = 0
    const registry = new FinalizationRegistry(() => (collected += 1))
    const use = async () => {
      const forgotten = new Bus(url, { service: 'life' })
      registry.register(forgotten)
      await forgotten.publish('a', 1)
      await forgotten.publish('a', 2)
      await forgotten.close()
    }
    for (let i = 0; i < 5; i++) await use()
    for (const until = Date.now() + 10_000; collected < 5 && Date.now() < until; ) {
      gc()
      await turn()
    }
    tell(collected === 5 ? 'forgotten' : { collected })
  },
  // Tells what it gets.
  async watch() {
    bus.on('a', function handle(event) {
      tell({ attempt: event.delivery.attempt, pid: 'watcher' })
    })
    await bus.start()
    tell('ready')
    process.stdin.resume().on('end', () => bus.close())
  },
}

await acts[what]()
