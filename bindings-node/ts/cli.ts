#!/usr/bin/env node
/**
 * The command `polybus`.
 *
 * @module
 */
import { native } from './native.js'

// Nothing else runs in this process, and the core listens to signals itself: the call may block.
process.exitCode = native.cli(['polybus', ...process.argv.slice(2)])
