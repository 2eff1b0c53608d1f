// The package as Node resolves it from this folder: one version everywhere.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import { version } from 'polybus'

test('the addon has the version of the package', () => {
  const url = new URL('../../package.json', import.meta.url)
  assert.equal(version(), JSON.parse(readFileSync(url, 'utf8')).version)
})
