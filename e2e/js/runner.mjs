// Runs the cases of this folder on demand. The first line it prints names the SDK and the cases; after that each line
// of standard input is the name of a case, and each case that ends prints one line of JSON: its name and, unless it
// passed, `error` or `skipped`. Cases run concurrently when several are asked for.
//
// A file of cases exports by default a function that is given a sandbox and returns named async functions.
import { readdir, readFile } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { Sandbox } from 'e2b'
import { Skip } from './wait.mjs'

const say = (message) => process.stdout.write(JSON.stringify(message) + '\n')

const sandbox = await Sandbox.create() // debug mode, by E2B_DEBUG; E2B_SANDBOX_URL says where
const cases = new Map()
for (const file of (await readdir(import.meta.dirname)).sort()) {
  if (file === 'runner.mjs' || file === 'wait.mjs' || !file.endsWith('.mjs')) continue
  const { default: casesFor } = await import('./' + file)
  for (const [name, run] of Object.entries(casesFor(sandbox))) cases.set(file.replace('.mjs', '/') + name, run)
}

const sdk = JSON.parse(await readFile(new URL('../node_modules/e2b/package.json', import.meta.url)))
say({ sdk: `e2b ${sdk.version}, node ${process.version}`, cases: [...cases.keys()] })

for await (const name of createInterface({ input: process.stdin })) {
  cases.get(name)().then(
    () => say({ name }),
    (error) => say(error instanceof Skip ? { name, skipped: error.message } : { name, error: error?.stack ?? error }),
  )
}
process.exit() // standard input is closed: whatever still runs has been given up
