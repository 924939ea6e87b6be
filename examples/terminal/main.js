// A page that opens a terminal in a sandbox, and moves and watches files there. It speaks to envd itself: Connect for processes and
// the filesystem, plain HTTP for the files' content.
import { Code, ConnectError, createClient } from '@connectrpc/connect'
import { createConnectTransport } from '@connectrpc/connect-web'
import { FitAddon } from '@xterm/addon-fit'
import { Terminal } from '@xterm/xterm'
import '@xterm/xterm/css/xterm.css'
import { EventType, Filesystem, FileType } from './gen/filesystem_pb.js'
import { Process } from './gen/process_pb.js'
import './style.css'

const element = (id) => document.getElementById(id)
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

// Sandbox is one daemon, seen by one user.
class Sandbox {
  constructor(url, token, user) {
    this.url = url.replace(/\/+$/, '')
    this.headers = {}
    if (token) this.headers['X-Access-Token'] = token
    if (user) this.headers.Authorization = `Basic ${btoa(`${user}:`)}`
    const withHeaders = (next) => (request) => {
      for (const [name, value] of Object.entries(this.headers)) request.header.set(name, value)
      return next(request)
    }
    const transport = createConnectTransport({ baseUrl: this.url, useBinaryFormat: true, interceptors: [withHeaders] })
    this.processes = createClient(Process, transport)
    this.files = createClient(Filesystem, transport)
  }

  async transfer(path, init) {
    const response = await fetch(`${this.url}/files?${new URLSearchParams({ path })}`, { headers: this.headers, ...init })
    if (!response.ok) throw new Error(await response.text())
    return response
  }
}

// openTerminal runs a login shell until it ends. A broken connection does not end it: what the screen lacks is asked for again by
// its offset in the output. `signal` closes this view of it.
async function openTerminal(sandbox, cwd, signal) {
  const screen = new Terminal({ cursorBlink: true, scrollback: 10_000 })
  const fit = new FitAddon()
  screen.loadAddon(fit)
  element('terminal').replaceChildren()
  screen.open(element('terminal'))
  fit.fit()
  screen.focus()
  const size = () => ({ size: { cols: screen.cols, rows: screen.rows } })

  let process // selects the shell, once it runs
  let offset = 0n // of the next byte of output
  let ended = false

  // Keys are sent in their order, those typed during a call with the next one.
  let typed = []
  let sending = false
  async function send() {
    if (sending || !process) return
    sending = true
    while (typed.length > 0 && !ended) {
      const text = typed.join('')
      typed = []
      const input = { case: 'pty', value: new TextEncoder().encode(text) }
      await sandbox.processes.sendInput({ process, input: { input } }).catch((error) => say(error.message))
    }
    sending = false
  }
  screen.onData((text) => { typed.push(text); send() })
  screen.onResize(() => process && sandbox.processes.update({ process, pty: size() }).catch(() => {}))
  const resized = new ResizeObserver(() => fit.fit())
  resized.observe(element('terminal'))

  async function show(stream) {
    for await (const { event } of stream) {
      const { case: kind, value } = event.event
      if (kind === 'start') {
        process = { selector: { case: 'pid', value: value.pid } }
        say('')
        send()
      } else if (kind === 'data') {
        offset += BigInt(value.output.value.length)
        screen.write(value.output.value)
      } else if (kind === 'end') {
        ended = true
        say(`ended: ${value.status}`)
      }
    }
  }
  const onHeader = (header) => { offset = BigInt(header.get('Envd-Output-Offset') ?? offset) }
  const shell = { cmd: '/bin/sh', args: ['-c', 'exec "$(command -v bash || echo sh)" -l'], cwd, envs: { TERM: 'xterm-256color' } }
  try {
    for (let wait = 100; !ended && !signal.aborted; wait = Math.min(2 * wait, 5000)) {
      try {
        if (!process) await show(sandbox.processes.start({ process: shell, pty: size() }, { signal, onHeader }))
        else await show(sandbox.processes.connect({ process }, { signal, onHeader, headers: { 'Envd-Output-From': `${offset}` } }))
      } catch (error) {
        const final = [Code.NotFound, Code.InvalidArgument, Code.Unauthenticated].includes(ConnectError.from(error).code)
        if (!process || final || signal.aborted) throw error
        say(`${error.message}; trying again`)
        await sleep(wait)
      }
    }
  } finally {
    resized.disconnect()
  }
}

async function list(sandbox, directory) {
  const { entries } = await sandbox.files.listDir({ path: directory, depth: 1 })
  element('files').replaceChildren(...entries.map((entry) => {
    const item = document.createElement('li')
    if (entry.type !== FileType.FILE) {
      item.textContent = `${entry.name}/`
      return item
    }
    const link = document.createElement('a')
    link.href = '#'
    link.textContent = entry.name
    link.title = `${entry.size} bytes, ${entry.permissions} ${entry.owner}`
    link.onclick = (event) => {
      event.preventDefault()
      download(sandbox, entry).catch((error) => say(error.message))
    }
    item.append(link)
    return item
  }))
}

async function download(sandbox, { path, name }) {
  const response = await sandbox.transfer(path)
  const link = document.createElement('a')
  link.href = URL.createObjectURL(await response.blob())
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000)
}

async function upload(sandbox, directory, files) {
  for (const file of files) {
    await sandbox.transfer(`${directory}/${file.name}`,
      { method: 'POST', body: file, headers: { ...sandbox.headers, 'Content-Type': 'application/octet-stream' } })
    say(`uploaded ${file.name}`)
  }
}

async function watch(sandbox, directory, signal) {
  for (let stale; !signal.aborted; await sleep(1000)) {
    try {
      for await (const { event } of sandbox.files.watchDir({ path: directory }, { signal })) {
        if (event.case === 'filesystem') {
          const line = document.createElement('li')
          line.textContent = `${EventType[event.value.type].toLowerCase()} ${event.value.name}`
          element('events').prepend(line)
          while (element('events').children.length > 100) element('events').lastChild.remove()
        } else if (event.case !== 'start') {
          continue
        }
        clearTimeout(stale) // many events, one listing
        stale = setTimeout(() => list(sandbox, directory).catch((error) => say(error.message)), 100)
      }
    } catch (error) {
      if (!signal.aborted) say(error.message)
    }
  }
}

function say(text) { element('status').textContent = text }

// The form keeps what the address says: ?url=http://localhost:49983&directory=/tmp&user=me. The token is never put there.
const form = element('where')
const query = new URLSearchParams(location.search)
for (const [name, value] of Object.entries({ url: 'http://localhost:49983', directory: '/tmp', user: '' })) {
  form.elements[name].value = query.get(name) ?? value
}

let view = new AbortController()
let current
form.onsubmit = (event) => {
  event.preventDefault()
  view.abort()
  view = new AbortController()
  const { url, token, user, directory } = Object.fromEntries(new FormData(form))
  current = { sandbox: new Sandbox(url, token, user), directory }
  element('events').replaceChildren()
  const failed = (error) => say(error.message)
  openTerminal(current.sandbox, directory, view.signal).catch(failed)
  watch(current.sandbox, directory, view.signal)
}
element('upload').onchange = ({ target }) => {
  if (!current) return say('open a sandbox first')
  upload(current.sandbox, current.directory, [...target.files]).catch((error) => say(error.message)).finally(() => { target.value = '' })
}
