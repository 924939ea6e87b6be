// Runs the checks of grpcweb.mjs: grpcweb_run.mjs ENVD DESCRIPTORS [PAGE]. With a page, whose origin is not the daemon's, in Chromium.
import { chromium } from 'playwright-core'
import { check } from './grpcweb.mjs'

const [envd, descriptors, page] = process.argv.slice(2)
let counts
if (page === undefined) {
  counts = await check(envd, descriptors)
} else {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking', '--no-proxy-server'] })
  try {
    const tab = await browser.newPage()
    await tab.goto(page)
    counts = await tab.evaluate(async ([envd, descriptors]) => (await import('/browser/grpcweb.mjs')).check(envd, descriptors), [envd, descriptors])
  } finally {
    await browser.close()
  }
}
console.log(JSON.stringify(counts))
