/**
 * Whether modules are evaluated again in this process, or by a server that restarts it when a file changes.
 *
 * @module
 */

/** True only where it is certain, and never with `NODE_ENV=production`: `node --watch`, Next.js, Vite. */
export function reloads(): boolean {
  const { env, execArgv, argv } = process
  if (env.NODE_ENV === 'production') return false
  const watched =
    env.WATCH_REPORT_DEPENDENCIES !== undefined || execArgv.some((flag) => /^--watch(-path)?(=|$)/.test(flag))
  const next = env.NODE_ENV === 'development' && (env.NEXT_RUNTIME ?? env.__NEXT_DEV_SERVER) !== undefined
  const vite = /[\\/](vite|vite-node)([\\/]|(\.m?js)?$)/.test(argv[1] ?? '') && !argv.includes('build')
  return watched || next || vite
}
