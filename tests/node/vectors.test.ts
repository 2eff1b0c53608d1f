// The golden vectors that all three languages read.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { test } from 'node:test'
import * as polybus from 'polybus'
import { Event, InvalidEvent, PolybusError } from 'polybus'
import { native } from '../../bindings-node/dist/native.js'

const read = (name: string) =>
  JSON.parse(readFileSync(new URL(`../vectors/${name}.json`, import.meta.url), 'utf8')) as Record<string, never>

function code(run: () => unknown): string {
  try {
    run()
  } catch (error) {
    const text = (error as Error).message
    return error instanceof PolybusError ? error.code : JSON.parse(text).code
  }
  return 'nothing thrown'
}

test('errors: class, code and retryable are those of the core', () => {
  const vectors = read('errors') as unknown as { class: string; code: string; retryable: boolean }[]
  const table = vectors.map((kind) => [kind.class, kind.code, kind.retryable])
  assert.deepEqual(native.errorKinds(), table)
  for (const { class: name, code, retryable } of vectors) {
    const kind = (polybus as unknown as Record<string, typeof PolybusError>)[name] ?? PolybusError
    const error = new kind('why')
    assert.deepEqual([error.name, error.code, error.retryable], [name, code, retryable])
    assert.ok(error instanceof PolybusError && error instanceof Error)
  }
})

test('codec: what is decoded is encoded as the same bytes', () => {
  const { valid, invalid } = read('codec') as unknown as {
    valid: { name: string; wire: string; canonical?: string }[]
    invalid: { name: string; wire: string }[]
  }
  assert.ok(valid.length > 5 && invalid.length > 5)
  for (const { name, wire, canonical } of valid) {
    assert.equal(Event.decode(wire).encode().toString(), canonical ?? wire, name)
    assert.equal(Event.decode(Buffer.from(wire)).encode().toString(), canonical ?? wire, name)
    const event = Event.decode(wire)
    assert.deepEqual(event.payload, JSON.parse(canonical ?? wire).payload, name)
    assert.deepEqual(event.type, JSON.parse(wire).type, name)
    assert.equal(event.meta.id, JSON.parse(wire).meta.id, name)
  }
  for (const { name, wire } of invalid) {
    assert.throws(
      () => Event.decode(wire),
      (error: PolybusError) => error instanceof InvalidEvent,
      name,
    )
  }
})

test('event types: the same are valid', () => {
  const { valid, invalid } = read('event_types') as unknown as { valid: string[]; invalid: string[] }
  for (const type of valid) assert.equal(Event.create(type, null).type, type)
  for (const type of invalid)
    assert.equal(
      code(() => Event.create(type, null)),
      'invalid_event',
      JSON.stringify(type),
    )
})

test('patterns: the same match', () => {
  const { matches, invalid } = read('patterns') as unknown as {
    matches: { pattern: string; event_type: string; matches: boolean }[]
    invalid: (string | { pattern: string })[]
  }
  for (const { pattern, event_type, matches: expected } of matches) {
    assert.equal(native.matches(pattern, event_type), expected, `${pattern} ${event_type}`)
  }
  for (const entry of invalid) {
    const pattern = typeof entry === 'string' ? entry : entry.pattern
    assert.equal(
      code(() => native.matches(pattern, 'a')),
      'invalid_pattern',
      pattern,
    )
  }
})

test('retry: the same delays', () => {
  const { cases } = read('retry') as unknown as {
    cases: { policy: Record<string, unknown>; attempt: number; random: number; delay_ms: number | null }[]
  }
  const camel = (name: string) => name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase())
  for (const { policy, attempt, random, delay_ms } of cases) {
    const text = JSON.stringify(Object.fromEntries(Object.entries(policy).map(([name, value]) => [camel(name), value])))
    const delay = native.retryDelay(text, attempt, random)
    if (delay_ms === null || delay === null) assert.equal(delay, delay_ms)
    else assert.ok(Math.abs(delay - delay_ms) < 0.001, `${text} ${attempt}: ${delay}, not ${delay_ms}`)
  }
})
