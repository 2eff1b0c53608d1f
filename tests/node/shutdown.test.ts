// Processes that get a signal while a handler runs: what ended is not delivered again, the rest is at once.
import assert from 'node:assert/strict'
import { mkdtempSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { Child } from './support/child.ts'
import { type RedisServer, startRedis } from './support/redis.ts'

const folder = mkdtempSync(join(tmpdir(), 'polybus-shutdown-'))
let redis: RedisServer
before(async () => {
  redis = await startRedis()
})
after(() => redis[Symbol.asyncDispose]())

let stores = 0
/** A URL and the name of a bus there. */
const places = () => [`sqlite:///${folder}/${++stores}.db#one`, `${redis.url}#b${++stores}`]

async function working(what: string, place: string): Promise<Child> {
  const child = new Child(what, place, 'shutdown')
  assert.equal(await child.tells(), 'begun')
  return child
}

/** What another process gets, up to an event that it publishes itself; long before a lease of 30 s runs out. */
async function taken(place: string): Promise<unknown[]> {
  const child = new Child('take', place, 'shutdown')
  const told = []
  for (let next = await child.tells(); next !== undefined; next = await child.tells()) told.push(next)
  assert.deepEqual(await child.ended, [0, null])
  return told.sort()
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  test(`${signal}: a handler that ends in time is done`, async () => {
    for (const place of places()) {
      const child = await working('drain', place)
      child.process.kill(signal)
      assert.equal(await child.tells(), 'closing')
      child.process.stdin.write('go on')
      assert.equal(await child.tells(), 'ended')
      assert.deepEqual(await child.ended, [0, null])
      assert.deepEqual(await taken(place), [['last', 1]])
    }
  })
}

test('one that does not is handed back, and its attempt does not count', async () => {
  for (const place of places()) {
    const child = await working('late', place)
    child.process.kill('SIGTERM')
    assert.deepEqual(await child.ended, [0, null])
    assert.deepEqual(await taken(place), [
      ['first', 1],
      ['last', 1],
    ])
  }
})

test('a second signal hands back at once', async () => {
  for (const place of places()) {
    const child = await working('hurry', place)
    child.process.kill('SIGTERM')
    assert.equal(await child.tells(), 'closing')
    child.process.kill('SIGINT')
    assert.deepEqual(await child.ended, [130, null])
    assert.deepEqual(await taken(place), [
      ['first', 1],
      ['last', 1],
    ])
  }
})

test('without exit the process ends by itself, and a listener that was stopped does nothing', async () => {
  const [place] = places() as [string]
  const child = await working('stay', place)
  child.process.kill('SIGTERM')
  assert.equal(await child.tells(), 'closing')
  assert.deepEqual(await child.ended, [0, null])
  const stopped = await working('stopped', place)
  stopped.process.kill('SIGTERM')
  assert.deepEqual(await stopped.ended, [null, 'SIGTERM'])
})
