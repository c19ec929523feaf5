import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send

const $ = (id) => document.getElementById(id);
const about = await (await fetch("about.json")).json();
const kinds = Object.keys(about); // main, and beside: the same with softmax
const nets = {};
const times = new Map(); // side -> { main, beside } in milliseconds
let picture = null; // an ImageBitmap
let size = about.main.img_size;
let seen = null; // canvas of the pixels that the networks were given
let tokens = {}; // of the last run: what entered the layer of the map
let query = null; // [row, column]
let busy = null;
window.sansmax = { about, runs: 0 }; // what was found, for whoever looks from outside

const main = about.main;
$("name").textContent = main.name;
$("about").textContent =
  `${main.mechanisms.join(", ")}, ${main.classes.length} classes, learned at ${main.img_size} px. ` +
  "Runs in this browser, on one thread; no image leaves it.";
$("size").max = main.sizes.length - 1;
$("size").value = main.sizes.indexOf(size);
$("side").textContent = `${size} px`;
if (main.sizes.length === 1) {
  $("size").disabled = true;
  $("fixed").textContent = "The graph of this network takes images of one size.";
}
if (about.beside) {
  $("twin").textContent = about.beside.trained
    ? `Beside it: ${about.beside.name}.`
    : "Beside it: the same network with softmax attention and random weights in it, for its time alone.";
} else {
  $("twin").textContent = "This network has softmax attention itself.";
}
if (!main.map) $("hint").textContent = `No attention map: ${main.why_no_map}.`;

async function load(kind) {
  const open = (file) => ort.InferenceSession.create(file, { executionProviders: ["wasm"] });
  nets[kind] = { net: await open(`${kind}.onnx`), map: about[kind].map ? await open(`${kind}-map.onnx`) : null };
}

// As the network learned it: the shorter side to size / crop, then the middle.
function prepared(bitmap, told, side) {
  const scale = Math.floor(side / told.crop) / Math.min(bitmap.width, bitmap.height);
  const width = Math.max(side, Math.round(bitmap.width * scale));
  const height = Math.max(side, Math.round(bitmap.height * scale));
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, side, side);
  context.drawImage(bitmap, Math.round((side - width) / 2), Math.round((side - height) / 2), width, height);
  return canvas;
}

function tensor(canvas, told) {
  const side = canvas.width;
  const { data } = canvas.getContext("2d").getImageData(0, 0, side, side);
  const channels = told.mean.length;
  const values = new Float32Array(channels * side * side);
  for (let i = 0; i < side * side; i++) {
    const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    // ITU-R 601, as PIL has it.
    const pixel = channels === 1 ? [(r * 299 + g * 587 + b * 114) / 1000] : [r, g, b];
    for (let c = 0; c < channels; c++) {
      values[c * side * side + i] = (pixel[c] / 255 - told.mean[c]) / told.std[c];
    }
  }
  return new ort.Tensor("float32", values, [1, channels, side, side]);
}

function softmax(logits) {
  const top = Math.max(...logits);
  const shares = logits.map((x) => Math.exp(x - top));
  const sum = shares.reduce((a, b) => a + b, 0);
  return shares.map((x) => x / sum);
}

async function run() {
  if (!picture || !nets.main) return;
  seen = prepared(picture, main, size);
  const results = {};
  tokens = {};
  for (const kind of kinds) {
    if (!nets[kind] || !about[kind].sizes.includes(size)) continue;
    const input = tensor(prepared(picture, about[kind], size), about[kind]);
    const outputs = await nets[kind].net.run({ image: input }); // the first at a size also plans its memory
    const samples = [];
    for (let i = 0; i < 3; i++) {
      const began = performance.now();
      await nets[kind].net.run({ image: input });
      samples.push(performance.now() - began);
    }
    const took = samples.sort((a, b) => a - b)[1];
    times.set(size, { ...times.get(size), [kind]: took });
    results[kind] = { logits: Array.from(outputs.logits.data), took, input };
    if (outputs.tokens) tokens[kind] = outputs.tokens;
  }
  Object.assign(window.sansmax, { results, size });
  answer(results);
  timetable();
  if (main.map) {
    const cells = size / main.map.patch;
    query = (query ?? [cells / 2, cells / 2]).map((x) => Math.min(Math.max(0, Math.floor(x)), cells - 1));
    await attend();
  } else draw(null);
  window.sansmax.runs += 1;
}

function answer(results) {
  $("answers").replaceChildren();
  for (const kind of kinds) {
    if (!results[kind] || (kind === "beside" && !about.beside.trained)) continue;
    const { classes, name } = about[kind];
    const shares = softmax(results[kind].logits);
    const best = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    results[kind].top = best.map(([share, i]) => ({ name: classes[i], share }));
    const title = document.createElement("h3");
    title.textContent = name;
    const list = document.createElement("ol");
    if (kind === "beside") list.className = "other";
    for (const { name: label, share } of results[kind].top) {
      const item = document.createElement("li");
      const [what, much, bar, fill] = ["span", "span", "div", "i"].map((tag) => document.createElement(tag));
      what.textContent = label;
      much.textContent = `${(100 * share).toFixed(1)} %`;
      bar.className = "bar";
      fill.style.width = `${100 * share}%`;
      bar.append(fill);
      item.append(what, much, bar);
      list.append(item);
    }
    $("answers").append(title, list);
  }
  const { top, took } = results.main;
  say(`${top[0].name}, ${(100 * top[0].share).toFixed(1)} %, in ${took.toFixed(1)} ms at ${size} px`);
}

function timetable() {
  const columns = kinds.filter((kind) => nets[kind]);
  const titles = ["side", ...columns.map((kind) => (kind === "main" ? main.mechanisms.join(", ") : "softmax"))];
  if (columns.length > 1) titles.push("faster");
  const cell = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  const head = document.createElement("tr");
  head.append(...titles.map((title) => cell("th", title)));
  const rows = [...times.entries()].sort((a, b) => a[0] - b[0]).map(([side, took]) => {
    const row = document.createElement("tr");
    if (side === size) row.className = "now";
    row.append(cell("th", `${side} px`), ...columns.map((kind) => cell("td", took[kind] ? `${took[kind].toFixed(1)} ms` : "")));
    if (columns.length > 1) row.append(cell("td", took.beside ? `${(took.beside / took.main).toFixed(2)}x` : ""));
    return row;
  });
  const [top, body] = [document.createElement("thead"), document.createElement("tbody")];
  top.append(head);
  body.append(...rows);
  $("times").replaceChildren(top, body);
}

// What the token `query` of the last layer attends to.
async function attend() {
  const { prefix } = main.map;
  const count = tokens.main.dims[1];
  const cells = Math.sqrt(count - prefix); // of the image that they are of
  const row = new Float32Array(count);
  query = query.map((x) => Math.min(Math.floor(x), cells - 1));
  row[prefix + query[0] * cells + query[1]] = 1;
  const outputs = await nets.main.map.run({ tokens: tokens.main, row: new ort.Tensor("float32", row, [1, count]) });
  const weights = Array.from(outputs.map.data).slice(prefix);
  window.sansmax.map = { query: [...query], weights };
  draw(weights, cells);
}

function draw(weights, cells) {
  const canvas = $("image");
  const side = 480;
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.filter = weights ? "grayscale(1) brightness(0.7)" : "none";
  context.imageSmoothingEnabled = size > 64;
  context.drawImage(seen, 0, 0, side, side);
  context.filter = "none";
  if (!weights) return;
  const most = weights.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
  const step = side / cells;
  weights.forEach((weight, i) => {
    const share = 0.85 * Math.abs(weight) / most;
    context.fillStyle = weight > 0 ? `rgba(255, 40, 40, ${share})` : `rgba(50, 90, 255, ${share})`;
    context.fillRect((i % cells) * step, Math.floor(i / cells) * step, step, step);
  });
  context.strokeStyle = "#00ff66";
  context.lineWidth = 3;
  context.strokeRect(query[1] * step, query[0] * step, step, step);
  const [low, high] = [Math.min(...weights), Math.max(...weights)].map((x) => x.toPrecision(2));
  $("hint").textContent =
    `What row ${query[0]}, column ${query[1]} of ${cells} x ${cells} attends to: red where a token weighs more, ` +
    `blue where its weight is negative (${low} to ${high}).`;
}

// One run at a time; what is asked for meanwhile runs once afterwards. A run draws the map too.
let again = null;
async function queue(task) {
  if (busy) {
    if (again !== run) again = task;
    return;
  }
  busy = task;
  try {
    await task();
  } catch (error) {
    say(`The network could not be run: ${error.message}`, true);
  }
  busy = null;
  if (again) {
    const next = again;
    again = null;
    await queue(next);
  }
}

function say(text, error = false) {
  $("status").textContent = text;
  $("status").className = error ? "error" : "";
}

let chosen = 0; // of two files the later counts, whichever is decoded first
async function show(blob, name) {
  const number = ++chosen;
  let decoded;
  try {
    decoded = await createImageBitmap(blob);
  } catch {
    if (number === chosen) say(`${name} is no image that this browser can read; choose another file`, true);
    return;
  }
  if (number !== chosen) return;
  picture = decoded;
  await queue(run);
}

function move(row, column) {
  if (!main.map || !tokens.main) return;
  const cells = Math.sqrt(tokens.main.dims[1] - main.map.prefix);
  const next = [row, column].map((x) => Math.min(Math.max(0, Math.floor(x)), cells - 1));
  if (query && next[0] === query[0] && next[1] === query[1]) return;
  query = next;
  queue(attend);
}

$("image").addEventListener("pointermove", (event) => {
  const box = $("image").getBoundingClientRect();
  const cells = main.map ? size / main.map.patch : 1;
  move(((event.clientY - box.top) / box.height) * cells, ((event.clientX - box.left) / box.width) * cells);
});
$("image").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step || !query) return;
  event.preventDefault();
  move(query[0] + step[0], query[1] + step[1]);
});
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) show(file, file.name);
});
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) show(file, file.name);
  });
}
$("size").addEventListener("input", () => {
  const before = size;
  size = main.sizes[Number($("size").value)];
  $("side").textContent = `${size} px`;
  if (query) query = query.map((x) => (x + 0.5) * (size / before));
  queue(run);
});

try {
  await load("main");
  await show(await (await fetch("example.png")).blob(), "the example");
  window.sansmax.first = performance.now();
  if (about.beside) {
    await load("beside");
    await queue(run);
  }
  window.sansmax.ready = true;
} catch (error) {
  say(`The page could not be loaded: ${error.message}; serve its folder with a web server, such as python -m http.server`, true);
}
