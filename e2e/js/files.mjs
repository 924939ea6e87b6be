// Files and watching, as the JS SDK does them.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { FileNotFoundError, FilesystemEventType, FileType, InvalidArgumentError, Sandbox } from 'e2b'
import { until } from './wait.mjs'

const self = process.env.ENVD_E2E_USER // the user whom the daemon runs as
const sandboxUrl = process.env.ENVD_E2E_SECURE_URL // a daemon with an access token set
const apiUrl = process.env.ENVD_E2E_API_URL // the control plane that knows the token

export default ({ files, commands }) => {
  // inDir runs a case in a directory of its own.
  const inDir = (run) => async () => {
    const dir = `/tmp/envd-e2e-${randomUUID()}`
    await files.makeDir(dir)
    try {
      await run(dir)
    } finally {
      await files.remove(dir)
    }
  }
  const names = (entries) => entries.map((entry) => entry.name)

  return {
    'write-read': inDir(async (dir) => {
      const info = await files.write(`${dir}/new/dir/x.txt`, 'content')
      assert.deepEqual({ ...info }, { name: 'x.txt', path: `${dir}/new/dir/x.txt`, type: FileType.FILE, metadata: undefined })
      assert.equal(await files.read(`${dir}/new/dir/x.txt`), 'content')
      await files.write(`${dir}/new/dir/x.txt`, '')
      assert.equal(await files.read(`${dir}/new/dir/x.txt`), '')
    }),

    formats: inDir(async (dir) => {
      const bytes = new Uint8Array(3 << 20).map((_, i) => i * 7)
      const path = `${dir}/bytes`
      for (const data of [bytes.buffer, new Blob([bytes]), new Blob([bytes]).stream()]) {
        await files.write(path, data)
        assert.deepEqual(await files.read(path, { format: 'bytes' }), bytes)
      }
      assert.equal((await files.read(path, { format: 'blob' })).size, bytes.length)
      let streamed = 0
      for await (const chunk of await files.read(path, { format: 'stream' })) streamed += chunk.length
      assert.equal(streamed, bytes.length)
    }),

    gzip: inDir(async (dir) => {
      const text = 'compressible '.repeat(200_000)
      await files.write(`${dir}/gz`, text, { gzip: true })
      assert.equal(await files.read(`${dir}/gz`, { gzip: true }), text)
      assert.equal((await files.getInfo(`${dir}/gz`)).size, text.length)
    }),

    'write-files': inDir(async (dir) => {
      const infos = await files.writeFiles(['b', 'a', 'sub/c'].map((name) => ({ path: `${dir}/${name}`, data: name })))
      assert.deepEqual(infos.map((info) => info.path), [`${dir}/b`, `${dir}/a`, `${dir}/sub/c`])
      assert.equal(await files.read(`${dir}/sub/c`), 'sub/c')
      assert.deepEqual(await files.writeFiles([]), [])
    }),

    metadata: inDir(async (dir) => {
      const info = await files.write(`${dir}/m`, 'x', { metadata: { purpose: 'test' } })
      assert.deepEqual(info.metadata, { purpose: 'test' })
      assert.deepEqual((await files.getInfo(`${dir}/m`)).metadata, { purpose: 'test' })
      assert.deepEqual((await files.rename(`${dir}/m`, `${dir}/n`)).metadata, { purpose: 'test' })
      assert.deepEqual((await files.list(dir))[0].metadata, { purpose: 'test' })
    }),

    missing: inDir(async (dir) => {
      await assert.rejects(files.read(`${dir}/none`), FileNotFoundError)
      await assert.rejects(files.getInfo(`${dir}/none`), FileNotFoundError)
      await assert.rejects(files.list(`${dir}/none`), FileNotFoundError)
      await assert.rejects(files.rename(`${dir}/none`, `${dir}/x`), FileNotFoundError)
      await assert.rejects(files.watchDir(`${dir}/none`, () => {}), FileNotFoundError)
      assert.equal(await files.exists(`${dir}/none`), false)
      await files.remove(`${dir}/none`)
    }),

    list: inDir(async (dir) => {
      await commands.run('mkdir -p a/b/c; touch f a/f1 a/b/f2; ln -s a l', { cwd: dir })
      assert.deepEqual(names(await files.list(dir)), ['a', 'f', 'l'])
      assert.deepEqual(names(await files.list(dir, { depth: 2 })), ['a', 'b', 'f1', 'f', 'l'])
      assert.deepEqual(names(await files.list(dir, { depth: 3 })), ['a', 'b', 'c', 'f2', 'f1', 'f', 'l'])
      await assert.rejects(files.list(dir, { depth: 0 }), InvalidArgumentError)
    }),

    'make-dir': inDir(async (dir) => {
      assert.equal(await files.makeDir(`${dir}/x/y`), true)
      assert.equal(await files.makeDir(`${dir}/x/y`), false)
      assert.equal(await files.exists(`${dir}/x/y`), true)
      await files.write(`${dir}/f`, '')
      await assert.rejects(files.makeDir(`${dir}/f`))
    }),

    info: inDir(async (dir) => {
      await commands.run('echo 12345 > f; chmod 640 f; ln -s f l', { cwd: dir })
      const info = await files.getInfo(`${dir}/f`)
      assert.deepEqual([info.name, info.type, info.size, info.mode, info.permissions, info.owner],
        ['f', FileType.FILE, 6, 0o640, '-rw-r-----', self])
      assert.ok(Math.abs(info.modifiedTime - new Date()) < 60_000)
      const link = await files.getInfo(`${dir}/l`)
      assert.deepEqual([link.symlinkTarget, link.type], [`${dir}/f`, FileType.FILE])
    }),

    'rename-remove': inDir(async (dir) => {
      await files.write(`${dir}/a`, 'a')
      assert.equal((await files.rename(`${dir}/a`, `${dir}/sub/b`)).path, `${dir}/sub/b`)
      assert.equal(await files.exists(`${dir}/a`), false)
      await files.remove(`${dir}/sub`)
      assert.equal(await files.exists(`${dir}/sub`), false)
    }),

    watch: inDir(async (dir) => {
      await files.write(`${dir}/old`, 'x')
      const seen = []
      const handle = await files.watchDir(dir, (event) => seen.push(event), { includeEntry: true })
      await files.write(`${dir}/old`, 'y')
      await until(() => seen.some((e) => e.type === FilesystemEventType.WRITE && e.name === 'old' && e.entry.path === `${dir}/old`))
      await files.rename(`${dir}/old`, `${dir}/new`)
      await until(() => seen.some((e) => e.type === FilesystemEventType.RENAME && e.name === 'old'))
      await files.remove(`${dir}/new`)
      await until(() => seen.some((e) => e.type === FilesystemEventType.REMOVE && e.name === 'new'))
      await handle.stop()
    }),

    'watch-recursive': inDir(async (dir) => {
      const seen = []
      const handle = await files.watchDir(dir, (event) => seen.push(event), { recursive: true })
      await files.makeDir(`${dir}/sub`)
      await files.write(`${dir}/sub/f`, 'x')
      await until(() => seen.some((e) => e.type === FilesystemEventType.CREATE && e.name === 'sub/f'))
      await handle.stop()
      await assert.rejects(files.watchDir(`${dir}/sub/f`, () => {}))
    }),

    async 'signed-urls'() {
      const secure = await Sandbox.create({ debug: false, apiUrl, sandboxUrl })
      const path = `/tmp/envd-e2e-${randomUUID()}`
      const upload = await secure.uploadUrl(path, { useSignatureExpiration: 1000 })
      const form = new FormData()
      form.append('file', 'signed')
      const at = (url) => sandboxUrl + new URL(url).pathname + new URL(url).search
      assert.equal((await fetch(at(upload), { method: 'POST', body: form })).status, 200)
      assert.equal(await (await fetch(at(await secure.downloadUrl(path, { useSignatureExpiration: 1000 })))).text(), 'signed')
      const expired = await fetch(at(await secure.downloadUrl(path, { useSignatureExpiration: -1000 })))
      assert.deepEqual([expired.status, await expired.json()], [401, { code: 401, message: 'signature is already expired' }])
      assert.equal((await fetch(`${sandboxUrl}/files?path=${path}`)).status, 401)
      await secure.files.remove(path)
    },
  }
}
