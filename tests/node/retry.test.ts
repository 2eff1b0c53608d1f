// withRetry: the core's arithmetic around any function.
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Reject, Retry, withRetry } from 'polybus'

const fast = { initialDelayMs: 1, maxDelayMs: 1 }

test('tries again until it works', async () => {
  let runs = 0
  const work = withRetry(async (a: number, b: number) => {
    if (++runs < 3) throw new Error('not yet')
    return a + b
  }, fast)
  assert.equal(await work(1, 2), 3)
  assert.equal(runs, 3)
})

test('throws the last error when it gives up, after onDead', async () => {
  let runs = 0
  const dead: unknown[] = []
  async function charge(_: string): Promise<void> {
    throw new Error(`run ${++runs}`)
  }
  const work = withRetry(charge, { ...fast, maxRetries: 1, onDead: (error, order) => void dead.push(error, order) })
  assert.equal(work.name, 'charge')
  await assert.rejects(work('o-1'), /run 2/)
  assert.match(String(dead[0]), /run 2/)
  assert.equal(dead[1], 'o-1')
})

test('Reject is final, Retry says when, a signal ends the wait', async () => {
  let runs = 0
  await assert.rejects(
    withRetry(() => {
      runs++
      throw new Reject('never')
    }, fast)(),
    Reject,
  )
  assert.equal(runs, 1)
  await assert.rejects(
    withRetry(
      () => {
        runs++
        throw new Retry({ afterMs: 1 })
      },
      { maxRetries: 1, initialDelayMs: 60_000, jitter: 'none' },
    )(),
    Retry,
  )
  assert.equal(runs, 3)
  const controller = new AbortController()
  const slow = withRetry(
    () => {
      setImmediate(() => controller.abort())
      throw new Error('slow')
    },
    { initialDelayMs: 30_000, jitter: 'none' },
  )
  await assert.rejects((slow as (context: object) => Promise<void>)({ signal: controller.signal }), /slow/)
  assert.throws(() => withRetry(() => {}, { maxRetry: 1 } as never), { code: 'invalid_config' })
})
