// Drives the page in Chromium as a user does; prints what it found as JSON.
// node browser.mjs CHROMIUM URL IMAGE NO_IMAGE SHOTS
import { chromium } from "playwright-core";

const [executablePath, url, image, noImage, shots] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
const page = await context.newPage();
const found = { console: [], requests: [] };
page.on("console", (message) => ["error", "warning"].includes(message.type()) && found.console.push(message.text()));
page.on("pageerror", (error) => found.console.push(String(error)));
page.on("request", (request) => found.requests.push(request.url()));

const state = () =>
  page.evaluate(() => {
    const { results, size, map, first, runs } = window.sansmax;
    const plain = (one) => one && { ...one, input: { dims: one.input.dims, data: Array.from(one.input.data) } };
    return { size, map, first, runs, main: plain(results.main), beside: plain(results.beside), status: document.getElementById("status").textContent };
  });
const until = (test, given) => page.waitForFunction(test, given, { timeout: 60000 });

await page.goto(url);
await until(() => window.sansmax?.ready);
found.example = await state();
found.timesOfExample = await page.locator("#times").innerText();

// By keyboard: the chooser is reached with Tab, and takes a file.
const focused = () => page.evaluate(() => document.activeElement.id);
found.tabs = [];
for (let i = 0; i < 3; i++) {
  await page.keyboard.press("Tab");
  found.tabs.push(await focused());
}
let began = Date.now();
await page.setInputFiles("#file", image);
await until((runs) => window.sansmax.runs > runs, found.example.runs);
found.chosenMilliseconds = Date.now() - began;
found.chosen = await state();

await until((row) => window.sansmax.map.query[0] === row, found.chosen.map.query[0]);
await page.focus("#image");
await page.keyboard.press("ArrowUp");
await page.keyboard.press("ArrowRight");
const [row, column] = found.chosen.map.query;
await until(([r, c]) => window.sansmax.map.query[0] === r && window.sansmax.map.query[1] === c, [Math.max(0, row - 1), column + 1]);
found.moved = await state();
const box = await page.locator("#image").boundingBox();
await page.mouse.move(box.x + 3, box.y + 3);
await until(() => window.sansmax.map.query.join() === "0,0");
found.pointed = await state();
await page.screenshot({ path: `${shots}/web.png` });

await page.focus("#size");
await page.keyboard.press("ArrowRight");
await until((size) => window.sansmax.size > size && window.sansmax.results.beside, found.chosen.size);
found.larger = await state();
found.times = await page.locator("#times").innerText();

await page.setInputFiles("#file", noImage);
await until(() => document.getElementById("status").className === "error");
found.refused = await page.locator("#status").innerText();
found.after = await state();

await page.setViewportSize({ width: 390, height: 844 });
found.phone = await page.evaluate(() => [document.documentElement.scrollWidth, window.innerWidth]);
await page.setInputFiles("#file", image);
await until(() => document.getElementById("status").className === "");
await page.screenshot({ path: `${shots}/web-phone.png` });
await browser.close();
console.log(JSON.stringify(found));
