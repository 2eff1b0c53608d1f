/**
 * Errors: one base class, a real subclass for each kind of failure, the same kinds in Python and Rust.
 *
 * @module
 */

/** Says which kind a class, or an instance, stands for: `instanceof` works across two copies of this package too. */
const KIND = Symbol.for('polybus.error.kind')

/** One of many that failed. */
export interface ItemFailure {
  /** Its place in the caller's list. */
  readonly index: number
  readonly error: PolybusError
}

/** What a responder threw, perhaps in another language. Its stack stays with it. */
export interface Remote {
  /** Class of the error. */
  readonly type: string
  readonly message: string
  /** Its `code`, if it was a `PolybusError`. */
  readonly code: string | null
}

/** What an error may carry beside its message. */
export interface PolybusErrorOptions {
  cause?: unknown
  failures?: readonly ItemFailure[]
  remote?: Remote
}

/** The base of every error that polybus throws. */
export class PolybusError extends Error {
  /** A stable string, the same in every language. */
  declare readonly code: string
  /** Whether the same call may succeed later without a change by the caller. */
  declare readonly retryable: boolean
  /** For a call on many things: which failed, and why. All others were accepted, unless the message says otherwise. */
  readonly failures: readonly ItemFailure[]
  /** For a request whose responder failed: what its handler threw. */
  declare readonly remote?: Remote

  constructor(message: string, options: PolybusErrorOptions = {}) {
    super(message, 'cause' in options ? { cause: options.cause } : undefined)
    this.failures = options.failures ?? []
    if (this.failures.length === 0) Object.defineProperty(this, 'failures', { enumerable: false })
    if (options.remote !== undefined) this.remote = options.remote
  }

  // biome-ignore-start lint/complexity/noThisInStatic: each subclass inherits this and asks about itself
  static override [Symbol.hasInstance](value: unknown): boolean {
    // A subclass that users derive has no kind of its own.
    if (!Object.hasOwn(this, KIND)) return Function.prototype[Symbol.hasInstance].call(this, value)
    const kind = (this as unknown as Branded)[KIND]
    const given = typeof value === 'object' && value !== null ? (value as Partial<Branded>)[KIND] : undefined
    return given !== undefined && (kind === '' || given === kind)
  }
  // biome-ignore-end lint/complexity/noThisInStatic: as above
}

interface Branded {
  [KIND]: string
}

/** The event's type, payload or meta is not valid: nothing was published. */
export class InvalidEvent extends PolybusError {}
/** The glob pattern cannot be compiled. */
export class InvalidPattern extends PolybusError {}
/** An option, URL or file given at construction is not usable. */
export class InvalidConfig extends PolybusError {}
/** The payload, or the whole event, exceeds the limit. */
export class PayloadTooLarge extends PolybusError {}
/** The payload does not fit its schema. */
export class SchemaViolation extends PolybusError {}
/** The transport cannot be reached, or its storage failed; nothing was stored. */
export class ConnectionFailed extends PolybusError {}
/** The publish did not start within its timeout; nothing was stored. */
export class PublishTimeout extends PolybusError {}
/** The publish was sent and not confirmed: it may or may not have happened. */
export class PublishUnknown extends PolybusError {}
/** A bounded buffer is full. */
export class BufferFull extends PolybusError {}
/** The bus was closed. */
export class BusClosed extends PolybusError {}
/** The transport does not have this capability. */
export class Unsupported extends PolybusError {}
/** A handler failed; its own error is the `cause`, or for a request, what is known of it is `remote`. */
export class HandlerError extends PolybusError {}
/** A handler ran longer than its timeout. */
export class HandlerTimeout extends PolybusError {}
/** The lease on a delivery passed to somebody else; its outcome was refused. */
export class LeaseLost extends PolybusError {}
/** A second subscription of the same name on one bus. */
export class DuplicateSubscription extends PolybusError {}
/** The thing named by an id does not exist. */
export class NotFound extends PolybusError {}
/** The server refused the credentials. */
export class AuthFailed extends PolybusError {}
/** A request was not answered in time. */
export class RequestTimeout extends PolybusError {}
/** Nobody answers requests of this type. */
export class NoResponder extends PolybusError {}

type Class = new (message: string, options?: PolybusErrorOptions) => PolybusError

/** `[class, code, retryable]`, as in `core/src/error.rs`; a test compares them. */
const KINDS: readonly (readonly [Class, string, boolean])[] = [
  [InvalidEvent, 'invalid_event', false],
  [InvalidPattern, 'invalid_pattern', false],
  [InvalidConfig, 'invalid_config', false],
  [PayloadTooLarge, 'payload_too_large', false],
  [SchemaViolation, 'schema_violation', false],
  [ConnectionFailed, 'connection_failed', true],
  [PublishTimeout, 'publish_timeout', true],
  [PublishUnknown, 'publish_unknown', true],
  [BufferFull, 'buffer_full', true],
  [BusClosed, 'bus_closed', false],
  [Unsupported, 'unsupported', false],
  [HandlerError, 'handler_error', false],
  [HandlerTimeout, 'handler_timeout', true],
  [LeaseLost, 'lease_lost', false],
  [DuplicateSubscription, 'duplicate_subscription', false],
  [NotFound, 'not_found', false],
  [AuthFailed, 'auth_failed', false],
  [RequestTimeout, 'request_timeout', true],
  [NoResponder, 'no_responder', true],
]

function describe(kind: Class, name: string, code: string, retryable: boolean, brand: string): void {
  Object.defineProperty(kind, KIND, { value: brand })
  Object.defineProperties(kind.prototype, {
    [KIND]: { value: brand },
    name: { value: name, writable: true, configurable: true },
    // Enumerable, so that loggers which walk an error's members show them.
    code: { value: code, enumerable: true, writable: true },
    retryable: { value: retryable, enumerable: true, writable: true },
  })
}

describe(PolybusError, 'PolybusError', 'polybus_error', false, '')
const BY_CODE = new Map<string, Class>()
for (const [kind, code, retryable] of KINDS) {
  describe(kind, kind.name, code, retryable, code)
  BY_CODE.set(code, kind)
}

/** What the core says about a failure. */
interface Report {
  code: string
  message: string
  cause: string | null
  failures: { index: number; error: Report }[]
  remote: Remote | null
}

function build({ code, message, cause, failures, remote }: Report): PolybusError {
  const kind = BY_CODE.get(code) ?? PolybusError
  const listed = failures.map(({ index, error }) => ({ index, error: build(error) }))
  return new kind(message, {
    ...(cause === null ? {} : { cause: new Error(cause) }),
    ...(remote === null ? {} : { remote }),
    failures: listed,
  })
}

/** The failure of an operation, as text. An async function makes the error of it, so that the stack is the caller's. */
export class Failed {
  constructor(readonly text: string) {}
}

/** The error that stands for what the addon threw, or what an operation failed with; other values are passed on. */
export function fromNative(failure: unknown): unknown {
  const text = failure instanceof Failed ? failure.text : (failure as Error)?.message
  if (typeof text !== 'string' || !text.startsWith('{"')) return failure
  try {
    return build(JSON.parse(text))
  } catch {
    return failure
  }
}

/** Calls the addon; what it throws becomes an error of this file. */
export function call<T>(run: () => T): T {
  try {
    return run()
  } catch (error) {
    throw fromNative(error)
  }
}
