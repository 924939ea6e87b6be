// Terminals, as the JS SDK opens them: `/bin/bash -i -l` with TERM, LANG and LC_ALL set.
import assert from 'node:assert/strict'
import { CommandExitError, InvalidArgumentError, NotFoundError, TimeoutError } from 'e2b'
import { Skip, until } from './wait.mjs'

const other = process.env.ENVD_E2E_OTHER_USER

export default ({ pty, commands }) => {
  const encode = (text) => new TextEncoder().encode(text)

  // Screen collects what a terminal shows. `waits` returns once the pattern has been shown; what the terminal echoes
  // must not match it, which is why the cases have the shell compute what they wait for.
  class Screen {
    text = ''
    #decoder = new TextDecoder()
    onData = (data) => { this.text += this.#decoder.decode(data, { stream: true }) }
    waits = (pattern) => until(() => pattern.exec(this.text), () => `${pattern} in ${JSON.stringify(this.text)}`)
  }

  async function open(options) {
    const screen = new Screen()
    const terminal = await pty.create({ cols: 80, rows: 24, onData: screen.onData, ...options })
    return { terminal, screen, type: (text) => pty.sendInput(terminal.pid, encode(text)) }
  }

  const killed = (error) =>
    error instanceof CommandExitError && error.exitCode === -1 && error.error === 'signal: killed'

  return {
    async create() {
      const { terminal, screen, type } = await open({ cwd: '/usr', envs: { E2E_PTY: 'mine' } })
      await type('echo "$TERM|$LANG|$LC_ALL|$E2E_PTY|$PWD"; tty; stty size\n')
      await screen.waits(/xterm-256color\|C\.UTF-8\|C\.UTF-8\|mine\|\/usr\r\n\/dev\/pts\/\d+\r\n24 80\r\n/)
      await type('exit\n')
      const result = await terminal.wait()
      assert.equal(result.exitCode, 0)
      assert.equal(result.error, undefined)
    },

    async 'exit-code'() {
      const { terminal, type } = await open()
      await type('exit 9\n')
      await assert.rejects(terminal.wait(), (error) => error instanceof CommandExitError && error.exitCode === 9)
    },

    async resize() {
      const { terminal, screen, type } = await open()
      await pty.resize(terminal.pid, { cols: 123, rows: 45 })
      await type('stty size; echo "columns=$(tput cols)"\n')
      await screen.waits(/45 123\r\ncolumns=123\r\n/)
      await type('exit\n')
      await terminal.wait()
    },

    // The program in the foreground is told of a new size, and of Ctrl-C.
    async signals() {
      const { terminal, screen, type } = await open()
      await type(`trap 'echo "resized to $(stty size)"' WINCH; echo rea''dy\n`)
      await screen.waits(/ready\r\n/)
      await pty.resize(terminal.pid, { cols: 100, rows: 30 })
      await type('\n')
      await screen.waits(/resized to 30 100\r\n/)
      await type(`sh -c 'echo star""ted; exec sleep 60'\n`)
      await screen.waits(/started\r\n/)
      await type('\x03')
      await type('echo "status $?"\n')
      await screen.waits(/status 130\r\n/)
      await type('exit\n')
      await terminal.wait()
    },

    async unicode() {
      const { terminal, screen, type } = await open()
      await type(`stty -echo; echo sil''ent\n`)
      await screen.waits(/silent\r\n/)
      await type('cat; exit\n')
      await type('ünï→😀\n')
      await screen.waits(/ünï→😀\r\n/)
      await type('\x04')
      await terminal.wait()
    },

    async user() {
      if (!other) throw new Skip('needs root: the daemon acts for one user only')
      const { terminal, screen, type } = await open({ user: other, cwd: '/' })
      await type('echo "I am $(id -un), $(stat -c %U $(tty))"\n')
      await screen.waits(new RegExp(`I am ${other}, ${other}\r\n`))
      await type('exit\n')
      await terminal.wait()
    },

    async connect() {
      const first = await open()
      await first.type('echo fir$((1))st\n')
      await first.screen.waits(/fir1st\r\n/)
      await first.terminal.disconnect()
      const screen = new Screen()
      const second = await pty.connect(first.terminal.pid, { onData: screen.onData })
      assert.equal(second.pid, first.terminal.pid)
      await first.type('echo sec$((2))ond\n')
      await screen.waits(/sec2ond\r\n/)
      await first.type('exit\n')
      assert.equal((await second.wait()).exitCode, 0)
      assert.doesNotMatch(first.screen.text, /sec2ond/)
    },

    async list() {
      const { terminal } = await open()
      const listed = (await commands.list()).find(({ pid }) => pid === terminal.pid)
      assert.deepEqual([listed?.cmd, listed?.args], ['/bin/bash', ['-i', '-l']])
      assert.equal(listed.envs.TERM, 'xterm-256color')
      await terminal.kill()
      await assert.rejects(terminal.wait(), killed)
    },

    async kill() {
      const { terminal, screen, type } = await open()
      await type(`sh -c 'echo "child=$$"; exec sleep 60'\n`)
      const [, child] = await screen.waits(/child=(\d+)\r\n/)
      assert.equal(await pty.kill(terminal.pid), true)
      await assert.rejects(terminal.wait(), killed)
      const sleeps = `grep "^State:[[:space:]]*[^ZX[:space:]]" /proc/${child}/status >/dev/null 2>&1`
      const check = `if kill -0 ${terminal.pid} 2>/dev/null || ${sleeps}; then echo no; else echo yes; fi`
      await until(async () => (await commands.run(check)).stdout === 'yes\n', 'shell and child gone')
      await until(async () => await pty.kill(terminal.pid) === false, 'nothing left to kill')
    },

    async timeout() {
      const { terminal } = await open({ timeoutMs: 2000 })
      await assert.rejects(terminal.wait(), TimeoutError)
      await until(async () => !(await commands.list()).some(({ pid }) => pid === terminal.pid), 'terminal ended')
    },

    async unknown() {
      assert.equal(await pty.kill(999_999_999), false)
      await assert.rejects(pty.connect(999_999_999), NotFoundError)
      await assert.rejects(pty.sendInput(999_999_999, encode('x')), NotFoundError)
      await assert.rejects(pty.resize(999_999_999, { cols: 1, rows: 1 }), NotFoundError)
      await assert.rejects(pty.create({ cols: 80, rows: 24, onData() {}, cwd: '/no/such' }), InvalidArgumentError)
    },
  }
}
