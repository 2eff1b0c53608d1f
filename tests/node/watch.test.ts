// The answer to a lone publish over Redis is read by the event loop itself (bindings-node/src/watch.rs): nobody may
// notice, whatever becomes of the loop, the server, the bus or the thread.
import assert from 'node:assert/strict'
import { AsyncLocalStorage } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { after, test as always, before } from 'node:test'
import { setImmediate as turn } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { Bus } from 'polybus'
import { LIMIT, runs, script } from './support/child.ts'
import { type RedisServer, startRedis } from './support/redis.ts'

const landed = JSON.parse(readFileSync(new URL('../transports.json', import.meta.url), 'utf8')).includes('redis')
const test = (name: string, run: () => Promise<void>) =>
  always(name, { skip: !landed && 'not in transports.json' }, run)

let server: RedisServer
before(async () => {
  if (landed) server = await startRedis({})
})
after(() => server?.[Symbol.asyncDispose]())

const open = (options = {}) => new Bus(server.url, { service: 'shop', bus: randomUUID(), ...options })

interface Handle {
  type: string
  is_active: boolean
  is_referenced: boolean
}
/** Sockets that libuv watches for an addon. */
const watched = () =>
  (process.report.getReport() as { libuv: Handle[] }).libuv.filter(
    ({ type, is_active }) => type === 'poll' && is_active,
  )

test('the loop watches while publishes are awaited one by one, and no longer than the bus is open', async () => {
  const bus = open()
  for (let i = 0; i < 3; i++) await bus.publish('a', i)
  assert.equal(watched().length, 1)
  assert.equal(watched()[0]?.is_referenced, false, 'it does not hold the process')
  await Promise.all([bus.publish('a', 3), bus.publish('a', 4)])
  assert.equal(watched().length, 0, 'those of one turn are answered together')
  await bus.publish('a', 5)
  await bus.close()
  assert.equal(watched().length, 0)
  await bus.start()
  assert.match((await bus.publish('a', 6)).id, /-/)
  await bus.close()
})

test('an event loop that is busy when the answer comes does not make the publish fail', async () => {
  const bus = open({ publishTimeoutMs: 200 })
  await bus.publish('a', 0)
  const sent = bus.publish('a', 1)
  await Promise.resolve() // the end of the turn, when it is sent
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 600)
  assert.match((await sent).id, /-/)
  await bus.close()
})

test('what waits for a publish goes on in its own context', async () => {
  const bus = open()
  const storage = new AsyncLocalStorage<number>()
  await bus.publish('a', 0)
  await Promise.all(
    [1, 2, 3].map((request) =>
      storage.run(request, async () => {
        for (let i = 0; i < 5; i++) {
          await turn()
          await bus.publish('a', i)
          assert.equal(storage.getStore(), request)
        }
      }),
    ),
  )
  await bus.close()
})

test('publishes survive restarts of the server', async () => {
  await using own = await startRedis({ appendfsync: 'always' })
  const bus = new Bus(own.url, { service: 'shop' })
  for (let i = 0; i < 3; i++) {
    await bus.publish('a', i)
    await own.restart()
  }
  for (let i = 3; i < 5; i++) await bus.publish('a', i)
  assert.equal(watched().length, 1, 'the new connection, and no old one')
  await bus.close()
})

test('a process that has awaited a publish ends by itself, also without close', async () => {
  assert.deepEqual(await runs('alone', server.url), ['published'])
})

test('what throws after a publish is the program’s own error', async () => {
  assert.deepEqual(await runs('throws', server.url), ['Error: mine'])
})

test('buses that nobody has any more are collected', async () => {
  assert.deepEqual(await runs('forget', server.url), ['forgotten'])
})

test('threads that publish come and go, by themselves and by force', async () => {
  const signal = AbortSignal.timeout(LIMIT)
  for (const end of ['itself', 'exit', 'force']) {
    const workers = Array.from(
      { length: 4 },
      () => new Worker(script('publishing-worker'), { workerData: { url: server.url, end } }),
    )
    const ended = workers.map((worker) => once(worker, 'exit', { signal }))
    if (end === 'force') {
      await Promise.all(workers.map((worker) => once(worker, 'message', { signal })))
      for (const worker of workers) worker.terminate()
    }
    const codes = (await Promise.all(ended)).map(([code]) => code)
    assert.deepEqual(codes, Array(4).fill(end === 'force' ? 1 : 0))
  }
})
