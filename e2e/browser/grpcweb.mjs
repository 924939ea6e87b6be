// What a client of gRPC-Web relies on, in node and in a browser: connect-web's transport, with messages by the daemon's own
// descriptors. It uses nothing that a browser does not have.
import { createClient, Code, ConnectError } from '@connectrpc/connect'
import { createGrpcWebTransport } from '@connectrpc/connect-web'
import { createFileRegistry, fromBinary } from '@bufbuild/protobuf'
import { FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt'

// check throws what is wrong, and returns what it counted.
export async function check(envd, descriptors) {
  const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))
  const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, bytes(descriptors)))
  const counts = { calls: 0, events: 0, bytes: 0, errors: 0, exposed: 0 }
  const must = (condition, what) => {
    if (!condition) throw new Error(what)
  }
  const text = new TextDecoder()

  for (const useBinaryFormat of [true, false]) {
    const type = `application/grpc-web+${useBinaryFormat ? 'proto' : 'json'}`
    let last // answer
    const transport = createGrpcWebTransport({ baseUrl: envd, useBinaryFormat, fetch: async (...args) => {
      counts.calls++
      return last = await fetch(...args)
    } })
    const files = createClient(registry.getService('filesystem.Filesystem'), transport)
    const processes = createClient(registry.getService('process.Process'), transport)
    const fails = async (code, what, call) => {
      const error = await call().then(() => undefined, ConnectError.from)
      must(error?.code === code, `${type}: ${what}: ${error}, want ${Code[code]}`)
      counts.errors++
      return error
    }
    // Without a message the trailers are in the header, which a browser shows only where the daemon exposes it.
    const exposes = (status) => {
      must(last.headers.get('grpc-status') === status && last.headers.get('grpc-message'), `${type}: grpc-status: ${last.headers.get('grpc-status')}`)
      counts.exposed++
    }
    const run = async (script, options, take = () => {}) => {
      let end
      const start = { process: { cmd: '/bin/sh', args: ['-c', script] } }
      for await (const { event } of processes.start(start, options)) {
        counts.events++
        if (event.event.case === 'data') take(event.event.value.output.value)
        if (event.event.case === 'end') end = event.event.value
      }
      return end
    }

    // Unary: an answer, and errors, which come as a trailer, in the header, or as HTTP's own status.
    const { entry } = await files.stat({ path: '/' })
    must(entry.path === '/' && last.headers.get('content-type') === type, `${type}: Stat: ${entry.path}, ${last.headers.get('content-type')}`)
    const missing = await fails(Code.NotFound, 'Stat', () => files.stat({ path: '/no/such' }))
    must(missing.rawMessage.includes('/no/such'), `${type}: the message is '${missing.rawMessage}'`)
    exposes('5')
    await fails(Code.InvalidArgument, 'SendSignal to nobody', () => processes.sendSignal({}))
    await fails(Code.Unauthenticated, 'a stranger', () => files.stat({ path: '/' }, { headers: { Authorization: 'Basic ' + btoa('no-such-user:') } }))

    // Streams: much output and a status; a failure before the first message, one after, and one that the client makes.
    const hash = []
    const end = await run('i=0; while [ $i -lt 20000 ]; do echo "line $i of a stream"; i=$((i+1)); done; exit 7', {}, (data) => {
      counts.bytes += data.length
      hash.push(text.decode(data, { stream: true }))
    })
    must(end.exitCode === 7, `${type}: Start: exit code ${end.exitCode}`)
    must(hash.join('') === Array.from({ length: 20_000 }, (_, i) => `line ${i} of a stream\n`).join(''), `${type}: Start: the output is another`)
    await fails(Code.NotFound, 'Connect to nobody', async () => {
      for await (const _ of processes.connect({ process: { selector: { case: 'tag', value: 'nobody' } } })) must(false, 'an event of nobody')
    })
    exposes('5')
    await fails(Code.DeadlineExceeded, 'a deadline that the daemon is told', () => run('sleep 60', { headers: { 'Grpc-Timeout': '300m' } }))
    const controller = new AbortController()
    await fails(Code.Canceled, 'a stream that the client ends', () =>
      run('echo begun; exec sleep 60', { signal: controller.signal }, () => controller.abort()))
    const { processes: left } = await processes.list({})
    for (const { pid } of left) await processes.sendSignal({ process: { selector: { case: 'pid', value: pid } }, signal: 9 })
    must(left.length === 1, `${type}: ${left.length} processes are left, want the one whose stream was ended`)
  }

  // The variant in base64 is no part of the contract: it is refused, and nothing else is mistaken for it.
  for (const type of ['application/grpc-web-text', 'application/grpc-web-text+proto']) {
    const response = await fetch(`${envd}/filesystem.Filesystem/Stat`, { method: 'POST', headers: { 'Content-Type': type }, body: 'AAAAAAA=' })
    must(response.status === 415, `${type}: ${response.status}, want 415`)
  }

  // With a token: HTTP's 401 is Unauthenticated.
  const init = await fetch(`${envd}/init`, { method: 'POST', body: JSON.stringify({ accessToken: 'a-token' }) })
  must(init.status === 204, `/init: ${init.status}`)
  const files = createClient(registry.getService('filesystem.Filesystem'), createGrpcWebTransport({ baseUrl: envd }))
  const error = await files.stat({ path: '/' }).then(() => undefined, ConnectError.from)
  must(error?.code === Code.Unauthenticated, `without the token: ${error}`)
  await files.stat({ path: '/' }, { headers: { 'X-Access-Token': 'a-token' } })
  return counts
}
