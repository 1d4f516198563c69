"use strict";
// Everything that comes from results reaches the page as text: nothing is ever parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const place = new Map(data.heads.map((name, i) => [name, i]));
const state = { head: null, pointed: null, column: 0, prompt: 0, ticket: 0 };

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const told = (x) => {
  if (x === null || x === undefined) return "none";
  if (typeof x === "string") return x;
  const text = Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 1e-4) ? x.toExponential(2) : String(Number(x.toPrecision(4)));
  return text;
};
const short = (x) => (x !== 0 && (Math.abs(x) >= 1000 || Math.abs(x) < 0.001) ? x.toExponential(0) : String(Number(x.toPrecision(2))));
const visible = (token) => token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5") || "\u2205";

// --- what is packed, unpacked when it is looked at

const ROOM = 64 * 2 ** 20; // bytes that stay unpacked
const unpacked = new Map();
const sizes = new Map(); // of what has been unpacked, the oldest first
let held = 0;
function drop(id) {
  held -= sizes.get(id) ?? 0;
  sizes.delete(id);
  unpacked.delete(id);
}
async function inflate(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const found = await new Response(stream).arrayBuffer();
  sizes.set(id, found.byteLength);
  held += found.byteLength;
  for (const old of sizes.keys()) if (held > ROOM && old !== id) drop(old);
  return found;
}
function unpack(id) {
  if (!unpacked.has(id)) unpacked.set(id, inflate(id));
  return unpacked.get(id);
}
const unpackText = async (id) => new TextDecoder().decode(await unpack(id));

async function patternOf(prompt, name) {
  const row = prompt.rows.find((one) => name in one.heads);
  if (!row) return null;
  const [at, scale, signed] = row.heads[name];
  const [n, m] = row.shape;
  const levels = new Uint8Array(await unpack(row.blob), at * n * m, n * m);
  const weightOf = (level) => {
    const root = signed ? (level - 128) / 127 : level / 255;
    return Math.sign(root) * root * root * scale;
  };
  const { step } = prompt;
  const cells = (tokens, count) => Array.from({ length: count }, (_, i) => {
    const inside = tokens.slice(i * step, (i + 1) * step);
    return { text: visible(inside.join("")), at: inside.length > 1 ? `${i * step}\u2026${i * step + inside.length - 1}` : String(i * step) };
  });
  return { n, m, scale, signed, levels, weightOf, weight: (i) => weightOf(levels[i]), same: row.queries === row.keys,
    queries: cells(prompt.tokens[row.queries], n), keys: cells(prompt.tokens[row.keys], m) };
}
const coarse = ({ step }) => (step === 1 ? "" : `To keep the page small, every cell is the largest of ${step} x ${step} tokens. `);

// --- colours

const mix = (stops) => (t) => {
  const x = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2);
  return stops[i].map((a, k) => Math.round(a + (x - i) * (stops[i + 1][k] - a)));
};
const viridis = mix([[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]]);
const redBlue = mix([[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]]);
const blues = mix([[255, 255, 255], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]]);
const kinds = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#bab0ac"];
const rgb = (c) => `rgb(${c[0]},${c[1]},${c[2]})`;
const ink = (c) => (0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2] > 140 ? "#111" : "#fff");
const hex = (text) => [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));

function scaleOf(column) {
  const there = column.values.filter((x) => x !== null);
  if (there.some((x) => typeof x === "string")) {
    const counts = new Map();
    for (const word of there) counts.set(word, (counts.get(word) || 0) + 1);
    const words = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a));
    return { words, counts, of: (x) => hex(kinds[Math.min(words.indexOf(x), kinds.length - 1)]) };
  }
  const low = there.reduce((a, b) => Math.min(a, b), Infinity);
  const high = there.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low < 0) {
    const most = Math.max(-low, high) || 1;
    return { low: -most, high: most, map: redBlue, of: (x) => redBlue((x / most + 1) / 2) };
  }
  const width = high - low || 1;
  return { low, high, map: viridis, of: (x) => viridis((x - low) / width) };
}

// --- the grid of heads

const stacks = new Map([["enc", "Encoder"], ["dec", "Decoder"], ["cross", "Cross-attention"]]);
const buttons = [];
let roomy = false; // whether numbers fit in the cells
function buildGrid() {
  const widest = Math.max(1, ...data.rows.map((row) => Math.max(0, ...row.heads.map(([, index]) => index + 1))));
  const room = byId("left").clientWidth - 50;
  const cell = Math.max(17, Math.min(58, Math.floor(room / widest) - 2));
  const style = document.documentElement.style;
  style.setProperty("--wide", `${cell}px`);
  style.setProperty("--high", `${Math.min(cell, data.rows.length > 16 ? 24 : 36)}px`);
  style.setProperty("--thumb", `${Math.max(44, Math.min(64, Math.floor(room / widest) - 10))}px`);
  roomy = cell >= 44;
  const grid = byId("grid");
  if (!data.heads.length) grid.append(el("p", { class: "sub" }, "No result in this folder speaks of single heads."));
  let block = null;
  let stack = null;
  data.rows.forEach((row, number) => {
    if (row.stack !== stack || !block) {
      stack = row.stack;
      block = el("div", { class: "stack" }, stack ? el("h3", {}, stacks.get(stack)) : null);
      const numbers = Array.from({ length: widest }, (_, i) => el("span", {}, widest > 20 && i % 2 ? "" : String(i)));
      block.append(el("div", { class: "row numbers", "aria-hidden": "true" }, el("span", { class: "name" }), ...numbers));
      grid.append(block);
    }
    const line = el("div", { class: "row", role: "group", "aria-label": `layer ${row.name}` });
    line.append(el("span", { class: "name" }, row.name.split(" ").pop()));
    const at = new Map(row.heads.map(([head, index]) => [index, head]));
    for (let index = 0; index <= (row.heads.at(-1)?.[1] ?? -1); index++) {
      if (!at.has(index)) { line.append(el("span", { "aria-hidden": "true" })); continue; }
      const head = at.get(index);
      const button = el("button", { type: "button", tabindex: buttons.some(Boolean) ? -1 : 0, "aria-pressed": "false",
        "data-head": data.heads[head], "data-row": number, "data-index": index });
      buttons[head] = button;
      line.append(button);
    }
    block.append(line);
  });
  grid.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) choose(button.dataset.head);
  });
  const tell = (event) => { state.pointed = event.target.closest("button"); tellPointed(); };
  grid.addEventListener("mouseover", tell);
  grid.addEventListener("focusin", tell);
  grid.addEventListener("mouseleave", () => tell({ target: grid }));
  grid.addEventListener("keydown", walk);
}

function tellPointed() {
  const hint = buttons.length ? "Point at a head, or press Tab and the arrow keys; click or Enter opens it." : "";
  byId("told").textContent = state.pointed?.getAttribute("aria-label") ?? hint;
}

function walk(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  const from = event.target.closest("button");
  if (!step || !from) return;
  event.preventDefault();
  let [row, index] = [Number(from.dataset.row), Number(from.dataset.index)];
  for (let tries = 0; tries < 2000; tries++) {
    row += step[0]; index += step[1];
    if (row < 0 || index < 0 || row >= data.rows.length || index > 9999) return;
    const found = data.rows[row].heads.find(([, at]) => at === index);
    if (found) {
      from.tabIndex = -1;
      buttons[found[0]].tabIndex = 0;
      buttons[found[0]].focus();
      return;
    }
  }
}

function paint() {
  const column = data.columns[state.column];
  const scale = column ? scaleOf(column) : null;
  buttons.forEach((button, i) => {
    const value = column ? column.values[i] : null;
    button.setAttribute("aria-label", column ? `${data.heads[i]}: ${value === null ? "no value" : told(value)}` : data.heads[i]);
    button.classList.toggle("hole", value === null);
    const colour = value === null ? null : scale.of(value);
    button.style.background = colour ? rgb(colour) : "";
    button.style.color = colour ? ink(colour) : "";
    button.textContent = roomy && typeof value === "number" ? short(value) : "";
  });
  tellPointed();
  paintScale(column, scale);
  paintExtremes(column, scale);
}

function paintScale(column, scale) {
  const box = byId("scale");
  box.replaceChildren();
  if (!column) return;
  if (scale.words) {
    scale.words.forEach((word, i) => {
      const swatch = el("i");
      swatch.style.background = kinds[Math.min(i, kinds.length - 1)];
      box.append(swatch, el("span", {}, `${word} (${scale.counts.get(word)})`));
    });
  } else if (Number.isFinite(scale.low)) {
    const canvas = el("canvas", { width: 160, height: 1 });
    const context = canvas.getContext("2d");
    for (let x = 0; x < 160; x++) { context.fillStyle = rgb(scale.map(x / 159)); context.fillRect(x, 0, 1, 1); }
    box.append(told(scale.low), canvas, told(scale.high));
  }
  if (column.values.includes(null)) box.append(el("i", { class: "hole" }), el("span", {}, `no value (${column.values.filter((x) => x === null).length})`));
}

function paintExtremes(column, scale) {
  const box = byId("extremes");
  box.replaceChildren();
  if (!column || scale.words) return;
  const order = data.heads.map((_, i) => i).filter((i) => column.values[i] !== null).sort((a, b) => column.values[b] - column.values[a]);
  const list = (title, chosen) => el("div", {}, el("h3", {}, title),
    el("ol", { class: "lines" }, ...chosen.map((i) => el("li", {}, headLink(data.heads[i]), el("span", {}, told(column.values[i]))))));
  box.append(list("Highest", order.slice(0, 5)), list("Lowest", order.slice(-5).reverse()));
}

// --- the panel of one head

const headLink = (name) => el("button", { class: "link", type: "button", onclick: () => choose(name, true) }, name);

function choose(name, scroll = false) {
  if (!place.has(name)) return;
  const before = state.head;
  state.head = name;
  const mark = (head, on) => {
    if (head === null) return;
    buttons[place.get(head)].setAttribute("aria-pressed", String(on));
    for (const thumb of document.querySelectorAll(`.thumb[data-head="${CSS.escape(head)}"]`)) thumb.setAttribute("aria-pressed", String(on));
  };
  mark(before, false);
  mark(name, true);
  drawPanel(name);
  if (scroll) byId("panel").scrollTop = 0;
}

function drawPanel(name) {
  const panel = byId("panel");
  forget(panel);
  const ticket = ++state.ticket;
  const i = place.get(name);
  const row = data.rows.find((one) => one.heads.some(([head]) => head === i));
  const index = row.heads.find(([head]) => head === i)[1];
  const shared = data.groups[i] === null ? [] : row.heads.filter(([head]) => data.groups[head] === data.groups[i] && head !== i);
  const where = `${row.stack && `${stacks.get(row.stack).toLowerCase()}, `}layer ${row.name.split(" ").pop()}, head ${index}`;
  panel.replaceChildren(el("h2", {}, name), el("p", { class: "sub" }, where,
    ...(shared.length ? ["; shares keys and values with ", ...shared.flatMap(([head], k) => [
      el("span", { class: "together" }, headLink(data.heads[head]), k < shared.length - 1 ? "," : ""), " "])] : [])));
  const words = data.columns.filter((column) => typeof column.values[i] === "string");
  if (words.length) panel.append(el("div", { class: "badges" }, ...words.map((column) => el("span", { title: `${column.label} (${column.source})` }, column.values[i]))));
  const titles = [...new Set(data.panels.map((one) => one.title))];
  const first = ["Role", "What removal costs"];
  const block = (title) => {
    const found = data.panels.filter((one) => one.title === title && one.lines[name]);
    if (!found.length) return;
    panel.append(el("h3", {}, title));
    for (const one of found) {
      panel.append(el("h4", { title: one.source }, one.label), el("ul", { class: "lines" }, ...one.lines[name].map(([text, head, value]) =>
        el("li", {}, head !== null && place.has(head) ? headLink(head) : el("span", {}, text), value === null ? null : el("span", {}, told(value))))));
    }
  };
  first.forEach(block);
  drawPatterns(panel, name, ticket);
  titles.filter((title) => !first.includes(title)).forEach(block);
  drawNumbers(panel, i);
}

function drawNumbers(panel, i) {
  const numbers = data.columns.filter((column) => typeof column.values[i] === "number");
  if (!numbers.length) return;
  panel.append(el("h3", {}, "Its numbers"));
  const lines = numbers.map((column) => {
    const others = column.values.filter((x) => typeof x === "number");
    const rank = 1 + others.filter((x) => x > column.values[i]).length;
    return el("tr", { title: column.source }, el("td", {}, column.label), el("td", { class: "number" }, told(column.values[i])),
      el("td", { class: "number sub" }, `${rank} of ${others.length}`));
  });
  panel.append(el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "number"), el("th", {}, "value"), el("th", {}, "rank"))), el("tbody", {}, ...lines)));
}

function drawPatterns(panel, name, ticket) {
  const there = data.prompts.map((prompt, i) => [prompt, i]).filter(([prompt]) => prompt.rows.some((row) => name in row.heads));
  if (!there.length) return;
  const [prompt, chosen] = there.find(([, i]) => i === state.prompt) || there[0];
  const canvas = el("canvas", { role: "img", "aria-label": `attention pattern of ${name} on: ${prompt.name}` });
  const line = el("p", { class: "told" });
  const tokens = el("p", { class: "tokens" });
  const current = () => ticket === state.ticket; // no other head was chosen meanwhile
  const small = there.map(([one, i]) => {
    const picture = el("canvas", { "aria-hidden": "true" });
    whenSeen(picture, async () => { const pattern = await patternOf(one, name); if (current()) drawPattern(picture, pattern); });
    return el("button", { type: "button", class: "thumb", "aria-pressed": String(i === chosen), title: one.name, "aria-label": `prompt: ${one.name}`,
      onclick: () => choosePrompt(i) }, picture);
  });
  panel.append(el("h3", {}, "Attention on the prompts"), there.length > 1 ? el("div", { class: "prompts" }, ...small) : "",
    el("div", { class: "pattern" }, el("h4", {}, prompt.name), canvas, line, tokens,
      el("p", { class: "sub" }, `${coarse(prompt)}Rows ask, columns are looked at. Point at the picture or at a token.`)));
  whenSeen(canvas, async () => {
    const pattern = await patternOf(prompt, name);
    if (!current()) return;
    drawPattern(canvas, pattern);
    explore(pattern, canvas, line, tokens);
  });
}

function choosePrompt(i) {
  state.prompt = i;
  byId("prompt").value = String(i);
  if (started.has("prompts")) drawPrompt();
  if (state.head !== null) drawPanel(state.head);
}

function drawPattern(canvas, { n, m, scale, signed, levels, weightOf }) {
  canvas.width = m;
  canvas.height = n;
  const colours = new Uint32Array(256); // of every level, as the four bytes of a pixel
  const bytes = new Uint8ClampedArray(colours.buffer);
  for (let level = 0; level < 256; level++) {
    const w = weightOf(level);
    bytes.set([...(signed ? redBlue((w / scale + 1) / 2) : blues(Math.sqrt(w / Math.max(scale, 1)))), 255], 4 * level);
  }
  const context = canvas.getContext("2d");
  const pixels = Uint32Array.from(levels, (level) => colours[level]);
  context.putImageData(new ImageData(new Uint8ClampedArray(pixels.buffer), m, n), 0, 0);
  canvas.style.aspectRatio = `${m} / ${n}`;
  canvas.dataset.drawn = "yes";
}

function explore(pattern, canvas, line, tokens) {
  const { n, m, scale, signed, weight, same, queries, keys } = pattern;
  const shade = (w) => rgb(signed ? redBlue((w / scale + 1) / 2) : blues(0.75 * Math.sqrt(Math.max(w, 0) / Math.max(scale, 1))));
  const spans = keys.map((token, key) => el("span", { "data-key": key, title: `token ${token.at}` }, token.text));
  tokens.replaceChildren(...spans);
  const show = (query, key) => {
    spans.forEach((span, k) => {
      span.style.background = shade(weight(query * m + k));
      span.classList.toggle("query", same && k === query);
    });
    const best = Array.from({ length: m }, (_, k) => k).reduce((a, k) => (weight(query * m + k) > weight(query * m + a) ? k : a), 0);
    const at = key === null ? best : key;
    line.textContent = `${queries[query].text} (${queries[query].at}) \u2192 ${keys[at].text} (${keys[at].at}): ${told(weight(query * m + at))}` + (key === null ? ", its strongest" : "");
  };
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (x, size, count) => Math.min(count - 1, Math.max(0, Math.floor((x / size) * count)));
    show(at(event.clientY - box.top, box.height, n), at(event.clientX - box.left, box.width, m));
  });
  canvas.addEventListener("mouseleave", () => show(n - 1, null));
  if (same) tokens.addEventListener("mouseover", (event) => {
    const key = event.target.dataset.key;
    if (key !== undefined) show(Number(key), null);
  });
  show(n - 1, null);
}

// --- one prompt across heads

const seen = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting || !seen.has(entry.target)) continue;
    const draw = seen.get(entry.target);
    seen.delete(entry.target);
    watcher.unobserve(entry.target);
    draw().catch((error) => entry.target.replaceWith(el("span", { class: "sub failed" }, `could not be drawn (${error.message})`)));
  }
}, { rootMargin: "200px" });
function whenSeen(node, draw) { seen.set(node, draw); watcher.observe(node); }
function forget(root) { for (const node of seen.keys()) if (root.contains(node)) { seen.delete(node); watcher.unobserve(node); } }

function drawPrompt() {
  const box = byId("thumbs");
  forget(box);
  box.replaceChildren();
  const prompt = data.prompts[state.prompt];
  if (!prompt) {
    byId("prompt").closest("label").hidden = true;
    box.append(el("p", { class: "sub" }, "There are no attention patterns in this folder: see How it was made."));
    return;
  }
  const texts = Object.entries(prompt.tokens).map(([stack, tokens]) => [stack ? el("strong", {}, `${stack}: `) : "", ...tokens.map((token) => el("span", {}, visible(token)))]);
  byId("prompt-text").replaceChildren(...texts.flatMap((part, i) => (i ? [el("br"), ...part] : part)));
  if (prompt.step > 1) box.append(el("p", { class: "sub" }, coarse(prompt)));
  if (prompt.holes) box.append(el("p", { class: "sub" }, `${prompt.holes} weights are not numbers (NaN); they are drawn as zero.`));
  for (const row of data.rows) {
    const heads = row.heads.map(([head]) => data.heads[head]).filter((name) => prompt.rows.some((one) => name in one.heads));
    if (!heads.length) continue;
    const thumbs = heads.map((name) => {
      const canvas = el("canvas", { "aria-hidden": "true" });
      const thumb = el("button", { type: "button", class: "thumb", "data-head": name, "aria-label": `${name}: pattern`,
        "aria-pressed": String(name === state.head), onclick: () => choose(name) }, canvas, name);
      whenSeen(canvas, async () => drawPattern(canvas, await patternOf(prompt, name)));
      return thumb;
    });
    box.append(el("div", { class: "thumbrow" }, el("span", { class: "name" }, row.name), el("div", { class: "all" }, ...thumbs)));
  }
}

// --- figures

let plotly = null;
function loadPlotly() {
  plotly ??= unpackText("plotly").then((code) => {
    document.head.append(el("script", {}, code));
    drop("plotly");
    return window.Plotly;
  });
  return plotly;
}

function buildFigures() {
  const view = byId("view-figures");
  if (!data.figures.length) view.append(el("p", { class: "sub" }, "No result in this folder has a figure."));
  view.append(el("nav", { "aria-label": "Figures" }, ...data.figures.map((figure, i) => el("a", { href: `#drawn-${i}` }, figure.title))));
  data.figures.forEach((figure, i) => {
    const plot = el("div", { class: "plot" });
    if (figure.height) plot.style.minHeight = `${figure.height}px`;
    view.append(el("article", { class: "figure", id: `drawn-${i}` }, plot, el("p", {}, `from ${figure.source}`)));
    whenSeen(plot, async () => {
      const [library, text] = await Promise.all([loadPlotly(), unpackText(figure.blob)]);
      const { data: traces, layout } = JSON.parse(text);
      await library.newPlot(plot, traces, { ...layout, autosize: true }, { responsive: true, displaylogo: false });
      plot.dataset.drawn = "yes";
    });
  });
}

// --- how it was made

function buildMade() {
  const view = el("div");
  byId("view-made").append(view);
  if (Object.keys(data.model.facts).length) {
    view.append(el("h3", {}, "The model"), el("table", {}, el("tbody", {}, ...Object.entries({ name: data.model.name, ...data.model.facts }).map(([key, value]) =>
      el("tr", {}, el("td", {}, key), el("td", {}, flat(value)))))));
  }
  if (data.missing.length) {
    view.append(el("h3", {}, "Not in this folder"), el("table", { id: "missing" }, el("tbody", {}, ...data.missing.map((one) =>
      el("tr", {}, el("td", {}, one.what), el("td", {}, "run ", el("code", {}, one.command)))))));
  }
  view.append(el("h3", {}, "What was read"));
  view.append(el("table", {}, el("thead", {}, el("tr", {}, ...["file", "what", "how"].map((title) => el("th", {}, title)))), el("tbody", {}, ...data.files.map((file) =>
    el("tr", {}, el("td", {}, file.file), el("td", {}, file.kind + (file.other ? ", of another model" : "")),
      el("td", {}, summary(file.record), el("details", {}, el("summary", {}, "the whole record"), el("pre", {}, JSON.stringify(file.record, null, 1)))))))));
  view.append(el("p", { class: "sub" }, `Made by headlab ${data.version} from the folder ${data.folder}.`));
}
const flat = (value) => (value === null ? "none" : Array.isArray(value) ? value.map(flat).join(" ") : typeof value === "object" ? Object.entries(value).map(([key, one]) => `${key} ${flat(one)}`).join(", ") : String(value));
const summary = (record) => Object.entries(record).filter(([key, value]) => key !== "model" && flat(value).length < 160).map(([key, value]) => `${key}: ${flat(value)}`).join("; ");

// --- the page

const tabs = ["heads", "prompts", "figures", "made"];
const started = new Set();
function openTab(name) {
  for (const tab of tabs) {
    byId(`tab-${tab}`).setAttribute("aria-selected", String(tab === name));
    byId(`tab-${tab}`).tabIndex = tab === name ? 0 : -1;
    byId(`view-${tab}`).hidden = tab !== name;
  }
  byId("sides").hidden = !["heads", "prompts"].includes(name);
  if (started.has(name)) return;
  started.add(name);
  ({ heads: () => {}, prompts: drawPrompt, figures: buildFigures, made: buildMade })[name]();
}

function start() {
  byId("model").textContent = data.model.name;
  const facts = data.model.facts;
  byId("facts").textContent = [facts.class, data.heads.length && `${data.heads.length} heads in ${data.rows.length} row${data.rows.length === 1 ? "" : "s"}`, facts.dtype,
    facts.weights && `${facts.weights} weights`].filter(Boolean).join(" \u00b7 ");
  for (const tab of tabs) byId(`tab-${tab}`).addEventListener("click", () => openTab(tab));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.findIndex((tab) => byId(`tab-${tab}`) === document.activeElement) + step + tabs.length) % tabs.length];
    openTab(next);
    byId(`tab-${next}`).focus();
  });
  if (typeof DecompressionStream === "undefined") {
    byId("notice").append(el("strong", {}, "This browser is too old for the patterns and figures (it has no DecompressionStream): open the page in a newer one."));
    byId("notice").hidden = false;
  }
  if (data.problems.length) {
    const reasons = new Map();
    for (const one of data.problems) reasons.set(one.reason, [...(reasons.get(one.reason) ?? []), one.file]);
    byId("notice").append(el("strong", {}, "Not everything in the folder is on this page"), el("ul", {}, ...[...reasons].map(([reason, files]) =>
      el("li", {}, ...files.flatMap((file, i) => [i ? ", " : "", el("code", {}, file)]), `: ${reason}`))));
    byId("notice").hidden = false;
  }
  byId("colour").append(...data.columns.map((column, i) => el("option", { value: i }, column.label)));
  byId("colour").closest("label").hidden = !data.columns.length;
  byId("colour").addEventListener("change", (event) => { state.column = Number(event.target.value); paint(); });
  byId("prompt").append(...data.prompts.map((prompt, i) => el("option", { value: i }, prompt.name)));
  byId("prompt").addEventListener("change", (event) => { choosePrompt(Number(event.target.value)); });
  openTab(data.heads.length ? "heads" : "figures");
  if (data.missing.length) {
    const button = el("button", { class: "link", type: "button", onclick: () => openTab("made") }, "how to add it");
    byId("absent").append(`Not in this folder: ${data.missing.map((one) => one.what).join(", ")} (`, button, ").");
  }
  buildGrid();
  paint();
  const column = data.columns[0];
  const best = column && typeof column.values.find((x) => x !== null) === "number"
    ? column.values.reduce((a, x, i) => (x !== null && (a < 0 || x > column.values[a]) ? i : a), -1) : 0;
  if (data.heads.length) choose(data.heads[Math.max(best, 0)]);
  else byId("panel").hidden = true;
  document.documentElement.dataset.ready = "yes";
}
start();
