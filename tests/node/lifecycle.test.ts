// Life and death of processes and threads.
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { Worker } from 'node:worker_threads'
import { Bus } from 'polybus'
import { Child, LIMIT, runs, script } from './support/child.ts'

const folder = mkdtempSync(join(tmpdir(), 'polybus-life-'))
let stores = 0
const store = () => `sqlite:///${folder}/${++stores}.db`

test('a bus that nobody uses does not hold the process', async () => {
  assert.deepEqual(await runs('unused', 'memory://'), [])
})

test('a publish under way holds the process until it is done', async () => {
  for (const url of ['memory://', store()]) {
    const [receipt] = (await runs('publish', url)) as [{ id: string }]
    assert.match(receipt.id, /^[0-9a-f-]{36}$/)
  }
})

test('after close, also from inside a handler, the process ends by itself', async () => {
  for (const url of ['memory://', store()]) assert.deepEqual(await runs('close', url), [{ saw: 1 }])
})

test('subscriptions that do not hold the process let it end without close', async () => {
  for (const url of ['memory://', store()]) assert.deepEqual(await runs('unref', url), ['subscribed'])
})

test('process.exit in a handler ends cleanly, and the event comes back', async () => {
  const url = store()
  assert.deepEqual(await runs('exit', url), [{ attempt: 1 }])
  const [again] = (await runs('take', url)) as [{ attempt: number; redelivered: boolean }]
  assert.equal(again.redelivered, true)
})

test('SIGTERM ends a process, and its event comes back', async () => {
  const url = store()
  const child = new Child('wait', url)
  assert.deepEqual(await child.tells(), { attempt: 1 })
  child.process.kill('SIGTERM')
  assert.deepEqual(await child.ended, [null, 'SIGTERM'])
  assert.deepEqual(await runs('take', url), [{ attempt: 2, redelivered: true }])
})

test('closing on SIGTERM hands back, and the attempt does not count', async () => {
  const url = store()
  const child = new Child('graceful', url)
  assert.deepEqual(await child.tells(), { attempt: 1 })
  child.process.kill('SIGTERM')
  assert.deepEqual(await child.ended, [0, null])
  assert.deepEqual(await runs('take', url), [{ attempt: 1, redelivered: true }])
})

test('an event loop blocked for three leases keeps its delivery', async () => {
  const url = store()
  const blocked = new Child('block', url)
  assert.equal(await blocked.tells(), 'ready')
  const bus = new Bus(url, { service: 'life', leaseMs: 1000 })
  await bus.publish('a', 1)
  assert.deepEqual(await blocked.tells(), { attempt: 1, pid: 'blocked' })
  const watcher = new Child('watch', url)
  assert.equal(await watcher.tells(), 'ready')
  assert.equal(await blocked.tells(), 'unblocked')
  assert.deepEqual(await blocked.ended, [0, null])
  await bus.publish('a', 2)
  assert.deepEqual(await watcher.tells(), { attempt: 1, pid: 'watcher' }, 'the first event was not delivered again')
  watcher.process.stdin.end()
  assert.deepEqual(await watcher.ended, [0, null])
  await bus.close()
})

test('a worker that is terminated hands back at once, and the main thread goes on', async () => {
  for (const url of ['memory://workers', store()]) {
    const bus = new Bus(url, { service: 'life', leaseMs: 30_000 })
    const worker = new Worker(script('worker'), { workerData: url })
    const signal = AbortSignal.timeout(LIMIT)
    assert.deepEqual(await once(worker, 'message', { signal }), ['ready'])
    await bus.publish('a', 7)
    assert.deepEqual(await once(worker, 'message', { signal }), [7])
    const again = new Promise<number>((resolve) => {
      bus.on('a', function handle(event) {
        resolve(event.payload)
      })
    })
    await worker.terminate()
    await bus.start()
    assert.equal(await again, 7, 'long before its lease of 30 s ran out')
    await bus.close()
  }
})

test('many workers come and go', async () => {
  const url = 'memory://crowd'
  const bus = new Bus(url, { service: 'main' })
  const signal = AbortSignal.timeout(LIMIT)
  for (let round = 0; round < 3; round++) {
    const workers = Array.from({ length: 4 }, () => new Worker(script('worker'), { workerData: url }))
    await Promise.all(workers.map((worker) => once(worker, 'message', { signal })))
    await bus.publishMany(Array.from({ length: 50 }, (_, payload) => ({ type: 'a', payload })))
    await Promise.all(workers.map((worker) => worker.terminate()))
  }
  await bus.close()
})
