// Commands, as the JS SDK runs them: `/bin/bash -l -c COMMAND`, without standard input unless it is asked for.
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import {
  AuthenticationError, CommandExitError, InvalidArgumentError, NotFoundError, SandboxError, TimeoutError,
} from 'e2b'
import { Skip, until } from './wait.mjs'

const self = process.env.ENVD_E2E_USER // the user whom the daemon runs as
const other = process.env.ENVD_E2E_OTHER_USER // another one, empty where the daemon may not act for others

export default ({ commands }) => {
  const background = (command, options) => commands.run(command, { background: true, ...options })

  const succeeds = (command) => until(async () =>
    (await commands.run(`if ${command}; then echo yes; fi`)).stdout === 'yes\n', () => command)

  // gone waits until no process has that id, as the sandbox itself sees it.
  const gone = (pid) => succeeds(`! kill -0 ${pid} 2>/dev/null`)

  // dead waits until that process is gone or a zombie: who reaps an orphan, and when, is not the daemon's business.
  const dead = (pid) => succeeds(`! grep "^State:[[:space:]]*[^ZX[:space:]]" /proc/${pid}/status >/dev/null 2>&1`)

  const exitOf = async (running) => {
    const error = await running.then(() => assert.fail('exited with 0'), (error) => error)
    assert.ok(error instanceof CommandExitError, error.stack)
    return error
  }

  return {
    async run() {
      const result = await commands.run('echo out; echo err >&2')
      assert.deepEqual({ ...result }, { exitCode: 0, error: undefined, stdout: 'out\n', stderr: 'err\n' })
    },

    async 'exit-code'() {
      const { result } = await exitOf(commands.run('echo out; echo err >&2; exit 3'))
      assert.deepEqual({ ...result }, { exitCode: 3, error: 'exit status 3', stdout: 'out\n', stderr: 'err\n' })
    },

    async signal() {
      const error = await exitOf(commands.run('kill -SEGV $$'))
      assert.equal(error.exitCode, -1)
      assert.match(error.error, /^signal: segmentation fault/)
    },

    async 'not-found'() {
      const error = await exitOf(commands.run('no-such-program-anywhere'))
      assert.equal(error.exitCode, 127)
      assert.match(error.stderr, /not found/)
    },

    async env() {
      const envs = { E2E_ONE: 'one two', E2E_EMPTY: '', E2E_UNICODE: 'ünï→😀' }
      const show = 'printf "%s|" "${E2E_ONE-unset}" "${E2E_EMPTY-unset}" "${E2E_UNICODE-unset}"'
      assert.equal((await commands.run(show, { envs })).stdout, 'one two||ünï→😀|')
      assert.equal((await commands.run(show)).stdout, 'unset|unset|unset|', 'variables of one command reached another')
    },

    async cwd() {
      assert.equal((await commands.run('pwd', { cwd: '/usr/bin' })).stdout, '/usr/bin\n')
      const { stdout: home } = await commands.run(`getent passwd ${self} | cut -d: -f6`, { cwd: '/' })
      assert.equal((await commands.run('pwd')).stdout, home)
      assert.equal((await commands.run('pwd', { cwd: '~' })).stdout, home)
    },

    async 'cwd-missing'() {
      await assert.rejects(commands.run('pwd', { cwd: '/no/such/directory' }), (error) =>
        error instanceof InvalidArgumentError && error.message.includes("cwd '/no/such/directory' does not exist"))
    },

    async 'user-default'() {
      assert.equal((await commands.run('id -un')).stdout, self + '\n')
      assert.equal((await commands.run('id -un', { user: self })).stdout, self + '\n')
    },

    async 'user-other'() {
      if (!other) throw new Skip('needs root: the daemon acts for one user only')
      const { stdout } = await commands.run('id -un; echo "$USER"; id -G', { user: other, cwd: '/' })
      const groups = (await commands.run(`id -G ${other}`)).stdout
      assert.equal(stdout, `${other}\n${other}\n${groups}`)
    },

    async 'user-unknown'() {
      await assert.rejects(commands.run('id', { user: 'no-such-user' }), (error) =>
        error instanceof AuthenticationError && error.message.includes("invalid username: 'no-such-user'"))
    },

    async 'stdin-off'() {
      assert.equal((await commands.run('cat; readlink /proc/self/fd/0')).stdout, '/dev/null\n')
    },

    async background() {
      let out = ''
      let err = ''
      const command = await background('echo one; echo two >&2; read line; echo "got $line"; exit 5', {
        stdin: true,
        onStdout: (text) => { out += text },
        onStderr: (text) => { err += text },
      })
      await until(() => out === 'one\n' && err === 'two\n', () => `output, so far ${JSON.stringify([out, err])}`)
      assert.equal(command.exitCode, undefined)
      await command.sendStdin('line\n')
      const error = await exitOf(command.wait())
      assert.deepEqual([error.exitCode, out, err], [5, 'one\ngot line\n', 'two\n'])
      assert.deepEqual([command.exitCode, command.stdout, command.stderr], [5, out, err])
    },

    // A command is over when it ends, not when the last child that it left behind closes its output.
    async 'background-child'() {
      const { stdout } = await commands.run('sleep 60 & echo $!', { timeoutMs: 20_000 })
      await commands.run(`kill ${stdout}`)
    },

    async list() {
      const command = await background('exec sleep 60', { cwd: '/usr', envs: { E2E_LIST: 'yes' } })
      const listed = async () => (await commands.list()).find((process) => process.pid === command.pid)
      assert.deepEqual(await listed(), {
        pid: command.pid, cmd: '/bin/bash', args: ['-l', '-c', 'exec sleep 60'], envs: { E2E_LIST: 'yes' }, cwd: '/usr',
      })
      assert.equal(await command.kill(), true)
      await until(async () => !await listed(), 'killed command no longer listed')
      await exitOf(command.wait())
    },

    async connect() {
      const first = await background('while read line; do echo "got $line"; done; exit 4', { stdin: true })
      await first.sendStdin('one\n')
      await until(() => first.stdout === 'got one\n', () => `first output, so far ${JSON.stringify(first.stdout)}`)
      let late = ''
      const second = await commands.connect(first.pid, { onStdout: (text) => { late += text } })
      assert.equal(second.pid, first.pid)
      await first.disconnect()
      await second.sendStdin('two\n')
      await until(() => late === 'got two\n', () => `output after connecting, so far ${JSON.stringify(late)}`)
      await second.closeStdin()
      assert.equal((await exitOf(second.wait())).exitCode, 4)
      assert.equal(first.stdout, 'got one\n')
    },

    async 'connect-many'() {
      const first = await background('read line; seq 1 20000', { stdin: true })
      const all = [first, ...await Promise.all(Array.from({ length: 4 }, () => commands.connect(first.pid)))]
      await first.sendStdin('\n')
      const expected = Array.from({ length: 20000 }, (_, i) => `${i + 1}\n`).join('')
      for (const { stdout } of await Promise.all(all.map((command) => command.wait()))) assert.ok(stdout === expected)
    },

    // Nobody was connected when it ended; its exit code can still be had.
    async 'connect-ended'() {
      const command = await background('read line; exit 7', { stdin: true })
      await command.disconnect()
      await commands.sendStdin(command.pid, '\n')
      await until(async () => !(await commands.list()).some(({ pid }) => pid === command.pid), 'command ended')
      assert.equal((await exitOf((await commands.connect(command.pid)).wait())).exitCode, 7)
    },

    async 'connect-unknown'() {
      await assert.rejects(commands.connect(999_999_999), NotFoundError)
    },

    async stdin() {
      const command = await background('cat', { stdin: true })
      await command.sendStdin('')
      await command.sendStdin('one\n')
      await command.sendStdin(new TextEncoder().encode('ünï→😀\n'))
      await commands.sendStdin(command.pid, '')
      await command.closeStdin()
      assert.equal((await command.wait()).stdout, 'one\nünï→😀\n')
    },

    async 'stdin-large'() {
      const text = 'A line of text that goes through a pipe.\n'.repeat(50_000)
      const command = await background('sha256sum', { stdin: true })
      await command.sendStdin(text)
      await command.closeStdin()
      assert.equal((await command.wait()).stdout, createHash('sha256').update(text).digest('hex') + '  -\n')
    },

    async 'stdin-closed'() {
      const command = await background('cat; read line; exec sleep 60', { stdin: true })
      await command.closeStdin()
      await command.closeStdin()
      await assert.rejects(command.sendStdin('late\n'), (error) =>
        error instanceof SandboxError && error.message.includes('stdin not enabled or closed'))
      await command.kill()
      await exitOf(command.wait())
    },

    async 'stdin-unknown'() {
      await assert.rejects(commands.sendStdin(999_999_999, 'x'), (error) =>
        error instanceof NotFoundError && error.message.includes('process with pid 999999999 not found'))
    },

    async kill() {
      const command = await background('trap "" TERM INT HUP; echo ready; sleep 60; sleep 60')
      await until(() => command.stdout === 'ready\n', 'trap set')
      assert.equal(await commands.kill(command.pid), true)
      const error = await exitOf(command.wait())
      assert.deepEqual([error.exitCode, error.error], [-1, 'signal: killed'])
      await gone(command.pid)
      // While anything of its tree is left, a kill still has something to kill.
      await until(async () => await command.kill() === false, 'nothing left to kill')
    },

    async 'kill-children'() {
      const command = await background('sleep 60 & echo $!; wait')
      const child = await until(() => /^(\d+)\n$/.exec(command.stdout)?.[1], 'pid of the child')
      assert.equal(await command.kill(), true)
      await exitOf(command.wait())
      await dead(child)
    },

    async 'kill-unknown'() {
      assert.equal(await commands.kill(999_999_999), false)
    },

    async timeout() {
      const started = Date.now()
      const command = await background('sleep 60 & echo $!; wait', { timeoutMs: 2000 })
      await assert.rejects(command.wait(), TimeoutError)
      assert.ok(Date.now() - started < 20_000)
      await gone(command.pid)
      await dead(/\d+/.exec(command.stdout)[0])
    },

    async 'timeout-none'() {
      assert.equal((await commands.run('echo out', { timeoutMs: 0 })).stdout, 'out\n')
    },

    // The timeout of a second connection ends that connection, not the command.
    async 'timeout-connect'() {
      const first = await background('read line; echo "got $line"', { stdin: true })
      const second = await commands.connect(first.pid, { timeoutMs: 1000 })
      await assert.rejects(second.wait(), TimeoutError)
      await first.sendStdin('line\n')
      assert.equal((await first.wait()).stdout, 'got line\n')
    },

    async 'long-output'() {
      const script = 'f=$(mktemp); head -c 6000000 /dev/urandom | base64 -w 99 >$f; sha256sum <$f >&2; cat $f; rm $f'
      const { stdout, stderr } = await commands.run(script)
      assert.equal(stdout.length, 8_080_809)
      assert.equal(createHash('sha256').update(stdout).digest('hex') + '  -\n', stderr)
    },

    // Characters of 1 to 4 bytes, so that every chunk boundary falls into one sooner or later.
    async unicode() {
      const { stdout } = await commands.run(`yes 'aü→😀' | head -n 200000`)
      assert.ok(stdout === 'aü→😀\n'.repeat(200_000))
    },

    async binary() {
      const { stdout } = await commands.run(String.raw`printf 'a\377\376\0b\200'`)
      assert.equal(stdout, 'a\ufffd\ufffd\0b\ufffd')
    },

    async parallel() {
      await Promise.all(Array.from({ length: 50 }, async (_, i) => {
        const result = await commands.run(`echo out ${i}; echo err ${i} >&2; exit ${i}`).catch((error) => error.result)
        assert.deepEqual([result?.exitCode, result?.stdout, result?.stderr], [i, `out ${i}\n`, `err ${i}\n`])
      }))
    },
  }
}
