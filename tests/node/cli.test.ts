// The command `polybus` of the npm package.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { promisify } from 'node:util'

const root = join(import.meta.dirname, '..', '..')
const command = join(root, JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')).bin.polybus)
const polybus = (...args: string[]) => promisify(execFile)(process.execPath, [command, ...args])

test('prints the tables, also for other tools', async () => {
  const { stdout } = await polybus('outbox', 'ddl', '--dialect', 'mysql', '--table', 'shop.outbox')
  assert.match(stdout, /CREATE TABLE IF NOT EXISTS `shop`\.`outbox`/)
  for (const [tool, sign] of [
    ['prisma', '@@map("polybus_outbox")'],
    ['drizzle', 'sqliteTable('],
    ['knex', 'knex.raw'],
  ] as const) {
    assert.ok((await polybus('outbox', 'schema', '--for', tool, '--dialect', 'sqlite')).stdout.includes(sign))
  }
})

test('bad arguments', async () => {
  await assert.rejects(polybus('outbox', 'ddl', '--dialect', 'postgras'), { code: 2, stderr: /postgres/ })
  await assert.rejects(polybus('outbox', 'ddl', '--dialect', 'sqlite', '--table', 'a;b'), {
    code: 1,
    stderr: /letters/,
  })
})
