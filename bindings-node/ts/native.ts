/**
 * Loads the addon for this platform: beside this package, or from the platform's own package.
 *
 * @module
 */
import { createRequire } from 'node:module'
import type * as Addon from '../native/index.js'

const require = createRequire(import.meta.url)

/** `linux-x64-gnu`, as `@napi-rs/cli` names it. */
function triple(): string {
  const { platform, arch } = process
  if (platform === 'linux') {
    const header = (process.report.getReport() as { header?: { glibcVersionRuntime?: string } }).header
    return `linux-${arch}-${header?.glibcVersionRuntime ? 'gnu' : 'musl'}`
  }
  return platform === 'win32' ? `win32-${arch}-msvc` : `${platform}-${arch}`
}

function load(): typeof Addon {
  const name = triple()
  const failures: unknown[] = []
  for (const place of [`../native/polybus.${name}.node`, `polybus-${name}`]) {
    try {
      return require(place)
    } catch (error) {
      failures.push(error)
    }
  }
  const tried = failures.map((error) => `  ${String((error as Error)?.message ?? error).split('\n')[0]}`).join('\n')
  throw new Error(
    `polybus has no working addon for ${name} (Node ${process.version}): reinstall it without --omit=optional, or ` +
      `build it with "npm run build" in polybus's repository. Tried:\n${tried}`,
    { cause: failures[0] },
  )
}

/** What `bindings-node/src` exports. Never use `instanceof` on its classes: a reloaded module has others. */
export const native: typeof Addon = load()
