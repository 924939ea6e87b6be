// Waiting for a condition, and saying that a case does not apply.
import { setTimeout as pause } from 'node:timers/promises'

export class Skip extends Error {}

// until returns what `condition` returns as soon as that is truthy, and fails after ten seconds.
export async function until(condition, what = condition) {
  for (const deadline = Date.now() + 10_000; Date.now() < deadline; await pause(10)) {
    const value = await condition()
    if (value) return value
  }
  throw new Error(`not within 10 s: ${typeof what === 'function' ? what() ?? what : what}`)
}
