// A worker thread that never finishes what it takes.
import { parentPort, workerData } from 'node:worker_threads'
import { Bus } from 'polybus'

const bus = new Bus(workerData, { service: 'life', leaseMs: 30_000 })
bus.on('a', async function handle(event) {
  parentPort.postMessage(event.payload)
  await new Promise(() => {})
})
await bus.start()
parentPort.postMessage('ready')
