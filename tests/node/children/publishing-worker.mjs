// A worker thread that publishes one event after another, and ends as it is told.
import { parentPort, workerData } from 'node:worker_threads'
import { Bus } from 'polybus'

const bus = new Bus(workerData.url, { service: 'life' })
for (let i = 0; i < 20; i++) await bus.publish('a', i)
parentPort.postMessage('published')
if (workerData.end === 'exit') process.exit()
while (workerData.end === 'force') await bus.publish('a', 0)
