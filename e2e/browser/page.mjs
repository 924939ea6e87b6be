// A user at examples/terminal in Chromium: page.mjs PAGE ENVD DIRECTORY [SCREENSHOT]. ENVD_TOKEN is typed into the form.
//
// The page's origin is not the daemon's. In the middle the daemon is prepared for a snapshot and restored, which cuts all connections.
import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { chromium } from 'playwright-core'
import { until } from '../js/wait.mjs'

const [page, envd, directory, screenshot] = process.argv.slice(2)
const scratch = await mkdtemp(join(tmpdir(), 'envd-browser-'))
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--no-proxy-server'],
})
try {
  const tab = await browser.newPage({ viewport: { width: 1100, height: 600 } })
  const problems = []
  tab.on('pageerror', (error) => problems.push(error.message))
  await tab.goto(`${page}?${new URLSearchParams({ url: envd, directory })}`)
  if (process.env.ENVD_TOKEN) {
    await tab.click('text=Open')
    await tab.waitForFunction(() => /unauthenticated/.test(document.getElementById('status').textContent))
    await tab.fill('[name=token]', process.env.ENVD_TOKEN)
  }
  await tab.click('text=Open')

  const screen = () => tab.locator('.xterm-rows').innerText()
  const shows = (pattern) => until(async () => pattern.exec(await screen()), () => `${pattern} on the screen`)
  const type = async (line) => {
    await tab.locator('.xterm-helper-textarea').focus()
    await tab.keyboard.type(`${line}\n`)
  }
  await tab.waitForFunction(() => document.querySelector('.xterm-rows'))
  await type('PS1="sandbox> "; echo "sum $((40+2)) in $PWD"; test -t 0 && echo a ter"m"inal')
  await shows(/sum 42 in \//)
  await shows(/a terminal/)

  // The terminal's size is the window's, and stays so.
  const columns = async () => {
    await type('clear; echo "columns=$(stty size | cut -d" " -f2)."')
    return Number((await shows(/^columns=(\d+)\./m))[1])
  }
  const before = await columns()
  await tab.setViewportSize({ width: 900, height: 600 })
  await until(async () => await columns() < before, () => `fewer columns than ${before}`)

  // Files: up, seen, listed, down.
  const content = Array.from({ length: 20_000 }, (_, i) => `line ${i}\n`).join('')
  const file = join(scratch, 'from the browser.txt')
  await writeFile(file, content)
  await tab.setInputFiles('#upload', file)
  await tab.waitForSelector('#files >> text=from the browser.txt')
  await tab.waitForSelector('#events >> text=/create .*from the browser.txt/')
  await type('wc -c < "from the browser.txt"; cp from* copy.txt')
  await shows(new RegExp(`${content.length}`))
  await tab.waitForSelector('#events >> text=create copy.txt')
  const [download] = await Promise.all([tab.waitForEvent('download'), tab.click('#files >> text=copy.txt')])
  assert.equal(download.suggestedFilename(), 'copy.txt')
  assert.equal(await readFile(await download.path(), 'utf8'), content)

  // What is printed while every connection is cut reaches the screen once.
  await type('clear; for i in 1 2 3 4 5 6 7 8; do echo "tick $i"; sleep 0.25; done; echo "al""l"')
  await shows(/tick 2/)
  for (const [method, path] of [['POST', '/snapshot/prepare'], ['GET', '/health']]) {
    const response = await fetch(envd + path, { method })
    assert.ok(response.ok, `${path}: ${response.status}`)
  }
  await shows(/^all/m)
  const ticks = (await screen()).match(/^tick \d/gm)
  assert.deepEqual(ticks, [1, 2, 3, 4, 5, 6, 7, 8].map((i) => `tick ${i}`))
  // The page watches again: what was made meanwhile is in its list, what is made from then on among its events.
  let made = 0
  await until(async () => {
    await type(`touch after"ward"s-${++made}`)
    return await tab.locator('#events >> text=/create afterwards/').count()
  }, () => `an event of one of ${made} files`)
  await tab.waitForSelector('#files >> text=afterwards-1')

  if (screenshot) await tab.screenshot({ path: screenshot })
  await type('exit')
  await tab.waitForFunction(() => document.getElementById('status').textContent === 'ended: exit status 0')
  assert.deepEqual(problems, [])
} finally {
  await browser.close()
  await rm(scratch, { recursive: true })
}
