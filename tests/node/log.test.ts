// Loggers of other shapes, and what a program sees that has none.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { test } from 'node:test'
import { Bus } from 'polybus'
import { TestBus } from 'polybus/testing'

/** As pino's: methods that need their `this`, a question, and more levels than ours. */
class Shaped {
  readonly records: [string, string][] = []
  readonly #level: number
  static readonly LEVELS = ['trace', 'debug', 'info', 'warn', 'error', 'fatal']

  constructor(level: string) {
    this.#level = Shaped.LEVELS.indexOf(level)
  }

  isLevelEnabled(level: string): boolean {
    return Shaped.LEVELS.indexOf(level) >= this.#level
  }

  #log(level: string, message: string): void {
    if (this.isLevelEnabled(level)) this.records.push([level, message])
  }

  debug(message: string) {
    this.#log('debug', message)
  }
  info(message: string) {
    this.#log('info', message)
  }
  warn(message: string) {
    this.#log('warn', message)
  }
  error(message: string) {
    this.#log('error', message)
  }
}

async function buryOne(logger: Shaped): Promise<void> {
  const bus = new TestBus({ logger, retry: { maxRetries: 0 } })
  bus.on('a', function h() {
    throw new RangeError('100% {no} %s')
  })
  await bus.publish('a', { card: '4111' })
  await bus.idle()
  await bus.close()
}

test('a logger that is asked for its level gets that, with its own this', async () => {
  for (const [level, levels] of [
    ['debug', ['debug', 'warn']],
    ['warn', ['warn']],
    ['fatal', []],
  ] as const) {
    const logger = new Shaped(level)
    await buryOne(logger)
    assert.deepEqual([...new Set(logger.records.map(([level]) => level))].sort(), levels)
    const warnings = logger.records.filter(([level]) => level === 'warn').map(([, text]) => text)
    if (level !== 'fatal') assert.deepEqual(warnings, ['test/h (a): dead letter (exhausted): RangeError: 100% {no} %s'])
    assert.ok(!JSON.stringify(logger.records).includes('4111'))
  }
})

test('what fails in the background is told, also by a bus of the environment', async () => {
  const logger = new Shaped('info')
  await using bus = await Bus.fromConfig({ service: 'shop' }, { logger }).start()
  await bus.subscribe('a', () => {}, { name: 'taken' })
  bus.on('a', { name: 'taken' }, () => {})
  await bus.publish('b', 1)
  const [[level, text]] = logger.records as [[string, string]]
  assert.equal(level, 'error')
  assert.match(text, /^taken is not subscribed to a: DuplicateSubscription/)
})

test('a bus of the environment takes a logger', () => {
  process.env.POLYBUS_SERVICE = 'shop'
  Bus.fromEnv({ logger: new Shaped('info') })
  assert.throws(() => Bus.fromEnv({ logger: {} as never }), { code: 'invalid_config' })
  delete process.env.POLYBUS_SERVICE
})

test('by default it is quiet until something is wrong', () => {
  const program = `
    import { Bus } from ${JSON.stringify(import.meta.resolve('polybus'))}
    const bus = new Bus('memory://', { service: 'shop', retry: { maxRetries: 0 } })
    const done = new Promise((resolve) => bus.on('a', function h() {
      resolve()
      if (process.env.FAIL) throw new RangeError('why')
    }))
    await bus.start()
    await bus.publish('a', { card: '4111' })
    await done
    await bus.close()`
  for (const [FAIL, expected] of [
    ['', ''],
    ['1', 'shop/h (a): dead letter (exhausted): RangeError: why\n'],
  ]) {
    const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
      env: { ...process.env, FAIL },
      encoding: 'utf8',
    })
    assert.deepEqual([stdout, stderr], ['', expected])
  }
})
