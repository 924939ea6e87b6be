// The sandbox as a whole: is it there, and the access token. For the cases with a token the SDK is not in debug mode:
// it asks a control plane, which the test plays, for the daemon's version and token, as it does in production.
import assert from 'node:assert/strict'
import { AuthenticationError, Sandbox } from 'e2b'

const self = process.env.ENVD_E2E_USER // the user whom the daemon runs as
const sandboxUrl = process.env.ENVD_E2E_SECURE_URL // a daemon with an access token set
const apiUrl = process.env.ENVD_E2E_API_URL // the control plane that knows the token

export default (sandbox) => {
  const secure = () => Sandbox.create({ debug: false, apiUrl, sandboxUrl })

  return {
    async 'is-running'() {
      assert.equal(await sandbox.isRunning(), true)
    },

    async token() {
      const { commands, pty } = await secure()
      assert.equal((await commands.run('echo out')).stdout, 'out\n')
      const terminal = await pty.create({ cols: 80, rows: 24, onData() {} })
      await pty.sendInput(terminal.pid, new TextEncoder().encode('exit\n'))
      assert.equal((await terminal.wait()).exitCode, 0)
    },

    // Links that stand for the token: for one file, one operation, one user, until they expire.
    async 'signed-urls'() {
      const sandbox = await secure()
      const path = `/tmp/envd-e2e-signed ü+${Math.random()}`
      for (const options of [{}, { user: self }, { user: self, useSignatureExpiration: 60 }]) {
        const form = new FormData()
        form.append('file', 'signed')
        const up = await fetch(await sandbox.uploadUrl(path, options), { method: 'POST', body: form })
        assert.equal(up.status, 200, await up.text())
        const down = await fetch(await sandbox.downloadUrl(path, options))
        assert.equal(await down.text(), 'signed')
      }
      const expired = await fetch(await sandbox.downloadUrl(path, { useSignatureExpiration: -10 }))
      assert.deepEqual([expired.status, await expired.json()], [401, { code: 401, message: 'signature is already expired' }])
      const swapped = await fetch((await sandbox.downloadUrl(path)).replace('signed', 'other'))
      assert.deepEqual([swapped.status, await swapped.json()], [401, { code: 401, message: 'invalid signature' }])
      await sandbox.files.remove(path)
    },

    async 'login-env'() {
      const { commands } = await secure()
      const script = 'printf "\\n%s\\n" "$USER $LOGNAME $HOME"; getent passwd "$USER"; command -v bash'
      const [names, passwd, bash] = (await commands.run(script)).stdout.trimEnd().split('\n').slice(-3)
      assert.equal(names, `${self} ${self} ${passwd.split(':')[5]}`)
      assert.match(bash, /\/bash$/)
    },

    async 'token-missing'() {
      const { commands } = await Sandbox.create({ sandboxUrl })
      await assert.rejects(commands.run('echo out'), AuthenticationError)
      await assert.rejects(commands.list(), AuthenticationError)
      await assert.rejects(commands.kill(1), AuthenticationError)
    },

    async 'token-health'() {
      assert.equal(await (await Sandbox.create({ sandboxUrl })).isRunning(), true)
    },

    // What the SDK leaves out for an old daemon works with the version that the daemon really reports.
    async 'version-gates'() {
      const { commands } = await secure()
      const command = await commands.run('cat', { background: true, stdin: true })
      await command.sendStdin('x')
      await command.closeStdin()
      assert.equal((await command.wait()).stdout, 'x')
      assert.equal((await commands.run('cat', { stdin: false })).stdout, '')
      assert.equal((await commands.run('id -un')).stdout, self + '\n')
    },
  }
}
