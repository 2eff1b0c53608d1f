// The package as Node resolves it from this folder: one version everywhere, more than one copy in one process.
import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { cpSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { fileURLToPath } from 'node:url'
import * as polybus from 'polybus'
import { version } from 'polybus'

const root = fileURLToPath(new URL('../..', import.meta.url))
const folder = mkdtempSync(join(tmpdir(), 'polybus-package-'))

/** A second installation. */
function copy(name: string): string {
  const place = join(folder, name, 'bindings-node')
  for (const part of ['dist', 'native'])
    cpSync(join(root, 'bindings-node', part), join(place, part), { recursive: true })
  cpSync(join(root, 'package.json'), join(folder, name, 'package.json'))
  return place
}

test('the addon has the version of the package', () => {
  const url = new URL('../../package.json', import.meta.url)
  assert.equal(version(), JSON.parse(readFileSync(url, 'utf8')).version)
})

test('import and require find the package from the root of the repository', () => {
  const run = (...args: string[]) => execFileSync(process.execPath, args, { cwd: root, encoding: 'utf8' }).trim()
  const program = "new Bus('memory://', { service: 'a' }).publish('a', 1).then(() => console.log('ok'))"
  assert.equal(run('--input-type=module', '-e', `import { Bus } from 'polybus'; ${program}`), 'ok')
  assert.equal(run('--no-warnings', '-e', `const { Bus } = require('polybus'); ${program}`), 'ok')
})

test('without an addon for the platform the error says what to do', () => {
  const place = copy('bare')
  rmSync(join(place, 'native'), { recursive: true })
  const { stderr, status } = spawnSync(process.execPath, [join(place, 'dist', 'index.js')], { encoding: 'utf8' })
  assert.equal(status, 1)
  assert.match(stderr, /polybus has no working addon for \S+ \(Node v/)
  assert.match(stderr, /npm run build/)
})

test('two copies in one process: errors, verdicts and events of one are those of the other', async () => {
  const other: typeof polybus = await import(join(copy('second'), 'dist', 'index.js'))
  assert.notEqual(other.Bus, polybus.Bus)
  const error = new other.InvalidEvent('why')
  assert.ok(error instanceof polybus.InvalidEvent && error instanceof polybus.PolybusError)
  assert.ok(!(error instanceof polybus.InvalidConfig))
  class Mine extends polybus.PolybusError {}
  assert.ok(!(error instanceof Mine) && new Mine('x') instanceof Mine)

  const bus = new polybus.Bus('memory://', {
    service: 'one',
    retry: { maxRetries: 0 },
    logger: { warn() {}, error() {} },
  })
  const seen = new Promise<polybus.Event>((resolve) => {
    bus.on('a', function here(event) {
      resolve(event)
      throw new other.Reject('said by the other copy')
    })
  })
  await bus.start()
  const event = other.Event.create('a', { n: 1 })
  await bus.publish(event)
  assert.equal((await seen).meta.id, event.meta.id)
  while ((await bus.deadLetters.count()) === 0) await new Promise(setImmediate)
  assert.equal((await bus.deadLetters.list())[0]?.reason, 'rejected')
  const second = new other.Bus('memory://', { service: 'two' })
  const there = new Promise((resolve) => second.on('a', { name: 'there' }, resolve))
  await second.start()
  await second.publish(await seen)
  await there
  await Promise.all([bus.close(), second.close()])
})
