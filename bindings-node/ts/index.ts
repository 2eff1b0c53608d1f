/**
 * One event bus for Python and TypeScript services, with a Rust core.
 *
 * @packageDocumentation
 */

export { version } from '../native/index.js'
