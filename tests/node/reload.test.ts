// Modules that are evaluated again: the same name means the new handler, and nothing is lost or left running.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, test } from 'node:test'
import { pathToFileURL } from 'node:url'
import { Bus } from 'polybus'
import { type RedisServer, startRedis } from './support/redis.ts'

const folder = mkdtempSync(join(tmpdir(), 'polybus-reload-'))
let redis: RedisServer
before(async () => {
  redis = await startRedis()
})
after(() => redis[Symbol.asyncDispose]())

let stores = 0
const urls = () => [`sqlite:///${folder}/${++stores}.db`, redis.url]
const until = () => {
  let resolve = () => {}
  const promise = new Promise<void>((done) => {
    resolve = done
  })
  return { promise, resolve }
}

/** A module of a user; a query after its name makes Node evaluate it once more, as development servers do. */
const module = join(folder, 'module.mjs')
writeFileSync(
  module,
  `
import { Bus } from ${JSON.stringify(import.meta.resolve('polybus'))}
const { url, name, words, handled } = globalThis.facts
const version = Number(new URL(import.meta.url).searchParams.get('v'))
export const bus = Bus.shared(url, { service: 'shop', bus: name, onDuplicate: 'replace' })
bus.use(function log(event, next) {
  words.push('log')
  return next()
})
bus.on('a', function h(event) {
  return handled(version, event)
})
await bus.start()
`,
)

test('a module that is evaluated again', async () => {
  for (const url of urls()) {
    const words: unknown[] = []
    const [begun, goOn, done] = [until(), until(), until()]
    const handled = async (version: number, { payload }: { payload: number }) => {
      words.push(['begin', version, payload])
      if (payload === 3) done.resolve()
      if (payload > 1) return
      begun.resolve()
      await goOn.promise
      words.push(['end', version, payload])
    }
    Object.assign(globalThis, { facts: { url, name: `r${++stores}`, words, handled } })
    const load = async (version: number): Promise<Bus> =>
      (await import(`${pathToFileURL(module)}?v=${version}&n=${stores}`)).bus
    const bus = await load(1)
    await bus.publish('a', 1)
    await begun.promise
    assert.equal(await load(2), bus)
    assert.equal((await bus.stats()).subscriptions.length, 1)
    await bus.publish('a', 2)
    await bus.publish('a', 3)
    await done.promise
    goOn.resolve()
    await bus.close()
    const begins = [1, 2, 2].flatMap((version, at) => ['log', ['begin', version, at + 1]])
    assert.deepEqual(words, [...begins, ['end', 1, 1]])
  }
})

test('when more than the handler changed, the old one is drained first', async () => {
  for (const url of urls()) {
    for (const [pattern, concurrency] of [
      ['a.**', 1],
      ['a.*', 2],
    ] as const) {
      const seen: unknown[] = []
      const [begun, goOn, done] = [until(), until(), until()]
      await using bus = await new Bus(url, { service: 'shop', bus: `r${++stores}`, onDuplicate: 'replace' }).start()
      bus.on('a.*', { name: 'h', concurrency: 1 }, async function old({ payload }) {
        begun.resolve()
        await goOn.promise
        seen.push(['old', payload])
      })
      await bus.publish('a.b', 1)
      await begun.promise
      bus.on(pattern, { name: 'h', concurrency }, ({ payload }) => {
        seen.push(['new', payload])
        done.resolve()
      })
      goOn.resolve()
      await bus.publish('a.b', 2)
      await done.promise
      assert.deepEqual(seen, [
        ['old', 1],
        ['new', 2],
      ])
      assert.equal((await bus.stats()).subscriptions.length, 1)
    }
  }
})

test('of many at once the last one has the name', async () => {
  await using bus = await new Bus('memory://', { service: 'shop', onDuplicate: 'replace' }).start()
  const seen: number[] = []
  const done = until()
  for (let number = 1; number < 6; number++) {
    bus.on('a', { name: 'h', concurrency: number }, () => {
      seen.push(number)
      done.resolve()
    })
  }
  await bus.publish('a', 1)
  await done.promise
  assert.deepEqual(seen, [5])
})

test('by default it is an error', async () => {
  await using bus = await new Bus('memory://', { service: 'shop' }).start()
  const again = () => bus.on('a', { name: 'h' }, () => {})
  again()
  assert.throws(again, { code: 'duplicate_subscription', message: /onDuplicate/ })
  assert.throws(() => new Bus('memory://', { service: 'shop', onDuplicate: 'replce' as never }), /did you mean/)
})

test('a subscription that is replaced goes on, also after close and start', async () => {
  const bus = await new Bus('memory://', { service: 'shop', onDuplicate: 'replace' }).start()
  const seen: number[] = []
  const first = await bus.subscribe('a', () => {}, { name: 'h' })
  assert.equal(await bus.subscribe('a', () => seen.push(0), { name: 'h' }), first)
  const done = until()
  bus.on('a', { name: 'h' }, () => seen.push(1))
  bus.on('a', { name: 'h' }, () => {
    seen.push(2)
    done.resolve()
  })
  await bus.close()
  await bus.start()
  await bus.publish('a', 1)
  await done.promise
  await bus.close()
  assert.deepEqual(seen, [2])
})

test('what counts as development', () => {
  const program = `
    import { Bus } from ${JSON.stringify(import.meta.resolve('polybus'))}
    process.argv[1] = process.env.SCRIPT
    const bus = Bus.fromEnv()
    const again = () => bus.on('a', { name: 'h' }, () => {})
    again()
    try { again(); console.log('replace') } catch { console.log('error') }`
  for (const [env, expected] of [
    [{}, 'error'],
    [{ WATCH_REPORT_DEPENDENCIES: '1' }, 'replace'],
    [{ WATCH_REPORT_DEPENDENCIES: '1', NODE_ENV: 'production' }, 'error'],
    [{ NEXT_RUNTIME: 'nodejs', NODE_ENV: 'development' }, 'replace'],
    [{ NEXT_RUNTIME: 'nodejs', NODE_ENV: 'production' }, 'error'],
    [{ NODE_ENV: 'development' }, 'error'],
    [{ SCRIPT: '/app/node_modules/.bin/vite' }, 'replace'],
    [{ SCRIPT: '/app/node_modules/vite/bin/vite.js' }, 'replace'],
    [{ SCRIPT: '/app/invite.js' }, 'error'],
    [{ POLYBUS_ON_DUPLICATE: 'replace' }, 'replace'],
    [{ WATCH_REPORT_DEPENDENCIES: '1', POLYBUS_ON_DUPLICATE: 'error' }, 'error'],
  ] as const) {
    const { PATH } = process.env
    const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program, 'script.js'], {
      env: { PATH, POLYBUS_SERVICE: 'shop', ...env } as NodeJS.ProcessEnv,
      encoding: 'utf8',
    })
    assert.equal(stdout, `${expected}\n`, JSON.stringify(env))
  }
})
