// The report's charts, switches, tips and the table of samples. Without this file the pictures are
// there as SVG, and the table of samples whole. Nothing is asked of anywhere; only a page of
// `fastalign report --watch` asks its own server for newer numbers.
"use strict";

const $ = (id) => document.getElementById(id);
const state = { off: new Set(), smoothing: 0, ranges: {} };
let data = { runs: [], charts: {} };
let charts = [];
let lazy = null;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (run) => style(`--run-${run % 10}`);
const expand = (xs) => (place) => (Array.isArray(xs) ? xs[place] : xs.first + xs.by * place);
const show = (value) => {
  if (value === null || value === undefined) return "–";
  const tiny = value !== 0 && Math.abs(value) < 1e-3;
  const text = tiny ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(4)));
  return text.replaceAll("-", "−");
};

function numbers(line) {
  const at = expand(line.x);
  return [line.y.map((_, place) => at(place)), line.y];
}

// A moving average whose past fades; of a long curve it takes the means of its parts, since the
// points that are drawn are extremes.
function smoothed(line, weight) {
  let [xs, ys] = numbers(line);
  if (line.means) {
    const at = expand(line.means[0]);
    ys = line.means[1];
    xs = ys.map((_, place) => at(place));
  }
  let sum = 0, share = 0;
  return [xs, ys.map((y) => {
    if (y === null) return null;
    sum = weight * sum + (1 - weight) * y;
    share = weight * share + (1 - weight);
    return sum / share;
  })];
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.spec = data.charts[figure.dataset.chart];
    this.box = figure.querySelector(".plot");
    this.legend = figure.querySelector(".live");
    this.title = figure.querySelector("figcaption").textContent.trim().replace(/\s+/g, " ");
    this.lines = this.spec.lines.map((line) => ({ ...line, points: numbers(line) }));
    this.writeLegend();
    this.draw();
  }

  writeLegend() {
    this.legend.textContent = "";
    for (const line of this.lines) {
      const item = document.createElement("li");
      item.dataset.run = `run-${line.run % 10}`;
      const swatch = document.createElement("span");
      swatch.className = `swatch run-${line.run % 10}${line.heldOut ? " held-out" : ""}`;
      line.value = document.createElement("span");
      line.value.className = "value";
      const name = data.runs[line.run] + (line.heldOut ? ", held out" : "");
      item.append(swatch, name, " ", line.value);
      this.legend.append(item);
      line.item = item;
    }
    this.update(null);
  }

  tables() {
    const found = [];
    for (const line of this.lines) {
      found.push(line.points);
      found.push(line.heldOut ? [[line.points[0][0]], [null]] : smoothed(line, state.smoothing));
    }
    return uPlot.join(found);
  }

  series() {
    return this.lines.flatMap((line) => {
      const stroke = colour(line.run), on = !state.off.has(line.run);
      const few = line.points[0].length < 2;
      const dash = line.heldOut ? [6, 4] : line.run >= 10 ? [2, 3] : undefined;
      const pale = state.smoothing && !line.heldOut;
      return [
        { stroke: pale ? stroke + "55" : stroke, width: line.heldOut ? 2 : 1.5, dash, show: on,
          points: { show: line.heldOut || few, size: 5, fill: stroke } },
        { stroke, width: 2, dash, show: on && Boolean(pale), points: { show: false } },
      ];
    });
  }

  draw() {
    const ink = style("--quiet"), grid = style("--thin");
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const range = state.ranges[this.spec.section];
    this.plot?.destroy();
    this.box.textContent = "";
    this.plot = new uPlot({
      width: this.box.clientWidth,
      height: 230,
      legend: { show: false },
      scales: { x: { time: false } },
      cursor: {
        y: false, drag: { x: true, y: false }, focus: { prox: 24 },
        sync: { key: `section ${this.spec.section}`, scales: ["x", null] },
      },
      focus: { alpha: 0.35 },
      axes: [
        { ...axis, size: 30, values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) },
        { ...axis, size: (_, values) => 14 + 6.5 * Math.max(1, ...(values ?? []).map((v) => v.length)),
          values: (_, ticks) => ticks.map((tick) => show(tick)) },
      ],
      series: [{}, ...this.series()],
      hooks: {
        setCursor: [(plot) => this.update(plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : null)],
        setScale: [(plot, key) => this.keepRange(plot, key)],
        drawAxes: [(plot) => this.events(plot)],
      },
    }, this.tables(), this.box);
    if (range) this.plot.setScale("x", range);
  }

  // What is zoomed stays so when newer numbers come.
  keepRange(plot, key) {
    if (key !== "x" || !plot.data[0].length) return;
    const xs = plot.data[0], { min, max } = plot.scales.x;
    const whole = min <= xs[0] && max >= xs[xs.length - 1];
    if (whole) delete state.ranges[this.spec.section];
    else state.ranges[this.spec.section] = { min, max };
    $("reset").disabled = !Object.keys(state.ranges).length;
  }

  events(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = 1.5 * devicePixelRatio;
    for (const [run, step, , kind] of this.spec.marks) {
      const x = plot.valToPos(step, "x", true);
      if (state.off.has(run) || x < bbox.left || x > bbox.left + bbox.width) continue;
      const low = bbox.top + bbox.height, d = 3 * devicePixelRatio;
      ctx.strokeStyle = colour(run);
      ctx.beginPath();
      ctx.setLineDash(kind === "collapse" ? [2 * d, d] : []);
      if (kind === "collapse") { ctx.moveTo(x, bbox.top); ctx.lineTo(x, low); }
      else { ctx.moveTo(x - d, low - 2 * d); ctx.lineTo(x + d, low); ctx.moveTo(x + d, low - 2 * d); ctx.lineTo(x - d, low); }
      ctx.stroke();
    }
    ctx.restore();
  }

  // Each curve's value at the step nearest to one; without a step its last one.
  update(x) {
    const words = [];
    for (const line of this.lines) {
      const [xs, ys] = line.points;
      let place = xs.length - 1;
      if (x !== null) {
        let low = 0;
        while (low < place) {
          const middle = (low + place) >> 1;
          if (xs[middle] < x) low = middle + 1; else place = middle;
        }
        if (place && x - xs[place - 1] < xs[place] - x) place -= 1;
      }
      line.value.textContent = `${show(ys[place])} at ${xs[place].toLocaleString("en")}`;
      if (!state.off.has(line.run)) words.push(line.item.textContent);
    }
    const near = x === null || !this.plot ? [] : this.spec.marks.filter(
      ([run, step]) => !state.off.has(run) && Math.abs(this.plot.valToPos(step, "x") - this.plot.valToPos(x, "x")) < 6);
    for (const [run, step, text] of near.slice(0, 2)) words.push(`${data.runs[run]}: ${text} (step ${step})`);
    this.note(near.slice(0, 2).map(([run, step, text]) => `${data.runs[run]}, step ${step}: ${text}`));
    this.words = words.join("; ");
  }

  note(texts) {
    const note = this.figure.querySelector(".event-note");
    note.textContent = texts.join("; ");
  }

  key(event) {
    const plot = this.plot, xs = plot.data[0];
    const { min, max } = plot.scales.x;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const now = plot.cursor.left >= 0 ? plot.valToPos(plot.posToVal(plot.cursor.left, "x"), "x") : null;
      const seen = xs.filter((x) => x >= min && x <= max);
      const at = now === null ? -1 : seen.findIndex((x) => plot.valToPos(x, "x") >= now - 0.5);
      const next = Math.min(seen.length - 1, Math.max(0, at + (event.key === "ArrowRight" ? 1 : -1)));
      for (const chart of charts) {
        if (chart.spec.section === this.spec.section) chart.plot.setCursor({ left: chart.plot.valToPos(seen[next], "x"), top: 10 });
      }
      $("status").textContent = `${this.title}: ${this.words}`;
    } else if (event.key === "+" || event.key === "-") {
      const middle = plot.cursor.left >= 0 ? plot.posToVal(plot.cursor.left, "x") : (min + max) / 2;
      const by = event.key === "+" ? 0.5 : 2;
      const to = { min: Math.max(xs[0], middle - (middle - min) * by), max: Math.min(xs[xs.length - 1], middle + (max - middle) * by) };
      for (const chart of charts) if (chart.spec.section === this.spec.section) chart.plot.setScale("x", to);
    } else if (event.key === "0") {
      resetZoom();
    } else return;
    event.preventDefault();
  }
}

function resetZoom() {
  state.ranges = {};
  for (const chart of charts) chart.plot.setData(chart.plot.data, true);
  $("reset").disabled = true;
}

function redraw() {
  for (const chart of charts) chart.draw();
}

function drawNow(figure) {
  lazy.unobserve(figure);
  if (!charts.some((chart) => chart.figure === figure)) charts.push(new Chart(figure));
}

function hideRuns() {
  for (const part of document.querySelectorAll("[data-run]")) {
    const runs = data.runs.map((_, run) => run).filter((run) => `run-${run % 10}` === part.dataset.run);
    part.classList.toggle("off", runs.length > 0 && runs.every((run) => state.off.has(run)));
  }
}

function init() {
  for (const chart of charts) chart.plot.destroy();
  charts = [];
  data = JSON.parse($("data")?.textContent ?? '{"runs": [], "charts": {}}');
  for (const part of document.querySelectorAll("[data-tip] title")) part.remove();
  for (const part of document.querySelectorAll(".needs-script")) part.hidden = false;
  if (typeof uPlot !== "undefined" && $("controls")) initControls();
  initContents();
  initSamples();
}

// Links to the sections.
function initContents() {
  const list = document.querySelector("#contents ul");
  if (!list) return;
  list.textContent = "";
  [...document.querySelectorAll("main h2")].forEach((heading, place) => {
    heading.id = `section-${place}`;
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = `#${heading.id}`;
    link.textContent = heading.textContent;
    item.append(link);
    list.append(item);
  });
}

function initControls() {
  lazy?.disconnect();
  lazy = new IntersectionObserver((found) => {
    for (const entry of found) if (entry.isIntersecting) drawNow(entry.target);
  }, { rootMargin: "300px" });
  for (const figure of document.querySelectorAll("[data-chart]")) {
    lazy.observe(figure);
    const box = figure.querySelector(".plot");
    box.addEventListener("keydown", (event) => charts.find((chart) => chart.figure === figure)?.key(event));
  }
  for (const box of document.querySelectorAll("#controls [data-switch]")) {
    const run = Number(box.dataset.switch);
    box.checked = !state.off.has(run);
    box.addEventListener("change", () => {
      if (box.checked) state.off.delete(run); else state.off.add(run);
      hideRuns();
      redraw();
    });
  }
  const say = () => {
    $("smoothing-value").textContent = state.smoothing ? state.smoothing.toFixed(2) : "none";
  };
  $("smoothing").value = state.smoothing;
  say();
  $("smoothing").addEventListener("input", (event) => {
    state.smoothing = Number(event.target.value);
    say();
    redraw();
  });
  $("reset").addEventListener("click", resetZoom);
  hideRuns();
}

let resizing = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(() => {
    for (const chart of charts) {
      if (chart.box.clientWidth) chart.plot.setSize({ width: chart.box.clientWidth, height: 230 });
    }
  });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
matchMedia("print").addEventListener("change", redraw); // on paper all is light
addEventListener("beforeprint", () => {
  for (const figure of document.querySelectorAll("[data-chart]")) {
    if (figure.querySelector(".plot").clientWidth) drawNow(figure);
  }
});

// Tips of marks in pictures.
function tip(part) {
  const box = $("tip");
  box.hidden = !part;
  if (!part) return;
  box.textContent = part.dataset.tip;
  const { left, top, width } = part.getBoundingClientRect();
  box.style.maxWidth = `${Math.min(420, innerWidth - 20)}px`;
  box.style.left = `${Math.max(8, Math.min(left + width / 2 - box.offsetWidth / 2, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${top > box.offsetHeight + 12 ? top - box.offsetHeight - 8 : top + 20}px`;
}
for (const name of ["pointerover", "focusin"]) {
  document.addEventListener(name, (event) => tip(event.target.closest?.("[data-tip]")));
}
document.addEventListener("focusout", () => tip(null));
document.addEventListener("keydown", (event) => event.key === "Escape" && tip(null));
addEventListener("scroll", () => tip(null), { passive: true });

// The table of samples.
function initSamples() {
  const table = $("samples");
  if (!table) return;
  const rows = [...table.tBodies[0].rows];
  const field = (name) => $(`samples-${name}`);
  const before = initSamples.values ?? {};
  const names = ["text", "run", "kind", "low", "high", "order"].filter((name) => field(name));
  const apply = () => {
    const value = Object.fromEntries(names.map((name) => [name, field(name).value]));
    initSamples.values = value;
    const low = value.low === "" ? -Infinity : Number(value.low), high = value.high === "" ? Infinity : Number(value.high);
    const words = value.text.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const reward = row.dataset.reward === "" ? NaN : Number(row.dataset.reward);
      const inside = Number.isNaN(reward) ? value.low === "" && value.high === "" : reward >= low && reward <= high;
      row.hidden = !(inside && (!value.run || row.dataset.sampled === value.run)
        && (!value.kind || row.dataset.kind === value.kind) && row.textContent.toLowerCase().includes(words));
      shown += !row.hidden;
    }
    const [by, way] = value.order.split(" ");
    const key = (row) => (row.dataset[by] === "" ? -Infinity : Number(row.dataset[by]));
    rows.sort((a, b) => (key(a) - key(b)) * (way === "down" ? -1 : 1) || a.dataset.place - b.dataset.place);
    table.tBodies[0].append(...rows);
    $("samples-count").textContent = `${shown} of ${rows.length} samples`;
  };
  for (const name of names) {
    if (before[name] !== undefined) field(name).value = before[name];
    field(name).addEventListener("input", apply);
  }
  apply();
}

// Newer numbers of a run that trains.
const LOOK_AFTER = 2000; // milliseconds
async function look() {
  try {
    const reply = await fetch("/version", { method: "POST" });
    if (!reply.ok) throw new Error(reply.status);
    const version = await reply.text();
    if (version !== document.body.dataset.watch) {
      const page = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
      const open = new Set([...document.querySelectorAll("details[open] > summary")].map((s) => s.textContent));
      const focus = document.activeElement?.id;
      $("main").replaceWith(document.importNode(page.getElementById("main"), true));
      document.body.dataset.watch = page.body.dataset.watch;
      for (const part of document.querySelectorAll("details > summary")) {
        if (open.has(part.textContent)) part.parentElement.open = true;
      }
      init();
      if (focus) $(focus)?.focus({ preventScroll: true });
    }
    $("watched").textContent = `Live: looked at ${new Date().toLocaleTimeString()}`;
  } catch {
    $("watched").textContent = "The server has ended: these are its last numbers.";
  }
  setTimeout(look, LOOK_AFTER);
}

init();
if (document.body.dataset.watch) setTimeout(look, LOOK_AFTER);
