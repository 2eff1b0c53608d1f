// A worker that closes on signals: `what` is how it closes. It tells when it begins, sees the close, and ends its handler.
import { Bus, closeOnSignals } from 'polybus'

const [what, address] = process.argv.slice(2)
const [url, name] = address.split('#')
const tell = (value) => process.stdout.write(`${JSON.stringify(value)}\n`)
const bus = new Bus(url, { service: 'life', bus: name, leaseMs: 30_000 })

if (what === 'take') {
  bus.on('a', { name: 'h', concurrency: 1 }, (event) => {
    tell([event.payload, event.delivery.attempt])
    if (event.payload === 'last') setImmediate(() => bus.close())
  })
} else {
  const goOn = new Promise((resolve) => process.stdin.once('data', resolve))
  bus.on('a', { name: 'h', concurrency: 1 }, async function h() {
    tell('begun')
    await goOn
    tell('ended')
  })
  const before = () => tell('closing')
  if (what === 'drain') closeOnSignals(bus, { timeoutMs: 60_000, before })
  // Called twice, as by a module that is evaluated again: the first is forgotten.
  if (what === 'hurry') closeOnSignals(bus, { before: () => tell('never') })
  if (what === 'hurry') closeOnSignals([bus], { timeoutMs: 3_600_000, before })
  if (what === 'late') closeOnSignals(bus, { timeoutMs: 50, before: () => new Promise(before) })
  if (what === 'stay') {
    closeOnSignals(bus, { exit: false, timeoutMs: 50, before })
    process.stdin.unref()
  }
  if (what === 'stopped') closeOnSignals(bus, { before })()
}
await bus.start()
await bus.publish('a', what === 'take' ? 'last' : 'first')
