// Checked by tsc, never run: what users write must type-check, and what they must not write must not.
import { version } from 'polybus'

export const right: string = version()
// @ts-expect-error: a version is a string
export const wrong: number = version()
