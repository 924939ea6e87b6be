// Runs a command with the E2B SDK: node run.mjs [URL]
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create({ debug: true, sandboxUrl: process.argv[2] }) // http://localhost:49983
const { exitCode } = await sandbox.commands.run('echo hello from $(uname -s)', {
  onStdout: (text) => process.stdout.write(text),
})
console.log('exit code', exitCode)
