// One chart over time, drawn as SVG: lines that differ in dash, weight and marker beside colour.

import { el, say, set, svg } from "./dom.js";
import { clock } from "./format.js";
import { linearAxis, logAxis, placeOn, thin, timeTicks } from "./scale.js";

const HEIGHT = 148;
const EDGE = { left: 46, right: 12, top: 10, bottom: 20 };
const GAP_S = 4;
const MARKERS = {
  circle: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
  square: "M-3.2 -3.2h6.4v6.4h-6.4z",
  triangle: "M0 -4 4 3.2H-4z",
  diamond: "M0 -4.4 4.4 0 0 4.4 -4.4 0z",
};

/**
 * @typedef {object} Line
 * @property {string} name of the sample's column, or of a derived one
 * @property {string} label
 * @property {string} tone a `tone-*` class
 * @property {string} [style] "dashed", "dotted", "thin"
 * @property {keyof typeof MARKERS} [marker]
 * @property {boolean} [isStep] holds its value until the next sample
 * @property {boolean} [hasArea]
 * @property {number} [nudge] pixels aside, where lines often lie on each other
 * @property {(samples: import("./samples.js").Samples, index: number) => number | null} [derive]
 * @property {(value: number | null) => string} [show]
 * @property {boolean} [isTold] as a number in the legend only: it is on another scale
 */

/**
 * @typedef {object} Plan
 * @property {string} id
 * @property {string} title
 * @property {string} unit
 * @property {Line[]} lines
 * @property {(value: number | null) => string} show
 * @property {(value: number) => string} [showTick]
 * @property {boolean} [isLog]
 * @property {boolean} [isWhole]
 * @property {(state: any) => { value: number | null, label: string } | null} [limit] a line across
 */

/** @typedef {{ from: number, to: number, cursor: number | null, moves: any[], state: any }} View */

export class Chart {
  /** @param {Plan} plan @param {(at: number | null) => void} onCursor */
  constructor(plan, onCursor) {
    this.plan = plan;
    this.onCursor = onCursor;
    this.view = null;
    this.samples = null;
    this.title = el("h2", { id: `${plan.id}-title` }, plan.title);
    this.unit = el("span", { class: "unit" }, plan.unit);
    this.canvas = svg("svg", {
      role: "img",
      tabindex: 0,
      "aria-labelledby": `${plan.id}-title ${plan.id}-legend`,
      preserveAspectRatio: "none",
    });
    this.legend = el("dl", { class: "legend", id: `${plan.id}-legend` });
    this.values = plan.lines.map((line) => this.addKey(line));
    this.node = el("figure", { class: "panel chart", id: plan.id });
    this.node.append(el("figcaption", {}, this.title, this.unit), this.canvas, this.legend);
    this.listen();
  }

  addKey(line) {
    const value = el("dd");
    const key = line.isTold ? el("dt", {}, line.label) : el("dt", {}, swatch(line), line.label);
    this.legend.append(el("div", {}, key, value));
    return value;
  }

  listen() {
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => {
      const box = this.canvas.getBoundingClientRect();
      const share = (event.clientX - box.left - EDGE.left) / (box.width - EDGE.left - EDGE.right);
      if (this.view === null || share < 0 || share > 1) return this.onCursor(null);
      return this.onCursor(this.view.from + share * (this.view.to - this.view.from));
    });
    this.canvas.addEventListener("pointerleave", () => this.onCursor(null));
    this.canvas.addEventListener("blur", () => this.onCursor(null));
    this.canvas.addEventListener("keydown", (event) => this.step(event));
  }

  /** Walk through time with the arrow keys. */
  step(event) {
    if (this.view === null) return;
    const { from, to, cursor } = this.view;
    const stride = (to - from) / 60;
    const next = {
      ArrowLeft: Math.max(from, (cursor ?? to) - stride),
      ArrowRight: Math.min(to, (cursor ?? to) + stride),
      Home: from,
      End: to,
      Escape: null,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.onCursor(next);
  }

  /** @param {import("./samples.js").Samples} samples @param {View} view */
  show(samples, view) {
    this.samples = samples;
    this.view = view;
    this.draw();
  }

  draw() {
    const { samples, view, canvas, plan } = this;
    const width = canvas.clientWidth;
    if (samples === null || view === null || width === 0) return;
    set(canvas, "viewBox", `0 0 ${width} ${HEIGHT}`);
    const inner = width - EDGE.left - EDGE.right;
    const first = Math.max(0, samples.from(view.from) - 1);
    const step = Math.max(1, (view.to - view.from) / inner);
    const data = plan.lines.map((line) =>
      line.isTold ? [] : thin(samples.times, this.column(line), first, step, GAP_S + step),
    );
    const limit = plan.limit?.(view.state) ?? null;
    const axis = this.axis(data, limit);
    const x = (at) => EDGE.left + ((at - view.from) / (view.to - view.from)) * inner;
    const y = (value) => HEIGHT - EDGE.bottom - placeOn(axis, value) * (HEIGHT - EDGE.top - EDGE.bottom);
    canvas.replaceChildren(
      ...grid(axis, y, width, plan.showTick ?? plan.show),
      ...timeAxis(view, x, inner),
      ...moves(view, x),
      ...limitLine(limit, y, width),
      ...plan.lines.flatMap((line, index) => drawLine(line, data[index], x, y)),
      ...this.cursor(x, y),
    );
    this.tell();
  }

  /** Values of one line by sample. @param {Line} line */
  column(line) {
    if (line.derive === undefined) return this.samples.columns[line.name] ?? [];
    return this.samples.times.map((_, index) => line.derive(this.samples, index));
  }

  axis(data, limit) {
    const values = data.flat().filter((point) => point !== null).map((point) => point[1]);
    if (limit !== null && limit.value !== null) values.push(limit.value);
    const most = values.reduce((a, b) => Math.max(a, b), 0);
    if (!this.plan.isLog) return linearAxis(most, this.plan.isWhole);
    const positive = values.filter((value) => value > 0);
    return logAxis(positive.reduce((a, b) => Math.min(a, b), 1), most || 1);
  }

  cursor(x, y) {
    const { samples, view } = this;
    if (view.cursor === null || samples.times.length === 0) return [];
    const index = samples.nearest(view.cursor);
    const at = samples.times[index];
    const left = x(at);
    const points = this.plan.lines.flatMap((line) => {
      const value = this.valueAt(line, index);
      return value === null || line.isTold ? [] : [marker(line, left, y(value))];
    });
    const rule = { class: "cursor", x1: left, x2: left, y1: EDGE.top, y2: HEIGHT - EDGE.bottom };
    return [svg("line", rule), ...points];
  }

  valueAt(line, index) {
    if (index < 0) return null;
    return line.derive ? line.derive(this.samples, index) : this.samples.value(line.name, index);
  }

  /** Say the values at the cursor, or the latest ones. */
  tell() {
    const { samples, view, plan } = this;
    const last = samples.times.length - 1;
    const index = view.cursor === null ? last : samples.nearest(view.cursor);
    plan.lines.forEach((line, number) => {
      say(this.values[number], (line.show ?? plan.show)(this.valueAt(line, index)));
    });
    const at = view.cursor === null || index < 0 ? "" : ` at ${clock(samples.times[index])}`;
    say(this.unit, `${plan.unit}${at}`);
  }
}

function swatch(line) {
  const mark = svg("svg", { viewBox: "0 0 26 10", class: line.tone, "aria-hidden": "true" });
  mark.append(svg("path", { class: `mark-line ${line.style ?? ""}`, d: "M1 5H25" }));
  if (line.marker) mark.append(marker(line, 13, 5));
  return mark;
}

function marker(line, x, y) {
  const place = `translate(${x.toFixed(1)} ${y.toFixed(1)})`;
  const shape = MARKERS[line.marker ?? "circle"];
  return svg("path", { class: `mark-point ${line.tone}`, d: shape, transform: place });
}

function grid(axis, y, width, show) {
  return axis.ticks.flatMap((tick) => [
    svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: EDGE.left - 7, y: y(tick) + 3.5, "text-anchor": "end" }, show(tick)),
  ]);
}

function timeAxis(view, x, inner) {
  const ticks = timeTicks(view.from, view.to, Math.max(2, Math.floor(inner / 74)));
  const hasSeconds = ticks.some((at) => at % 60 !== 0);
  return ticks
    .filter((at) => x(at) > EDGE.left + 16 && x(at) < EDGE.left + inner - 16)
    .map((at) =>
      svg("text", { x: x(at), y: HEIGHT - 4, "text-anchor": "middle" }, clock(at, hasSeconds)),
    );
}

/** Where decisions changed the pools. */
function moves(view, x) {
  return view.moves
    .filter((move) => move.at >= view.from && move.at <= view.to)
    .flatMap((move) => {
      const left = x(move.at);
      const turn = move.action === "in" ? " rotate(180)" : "";
      const place = `translate(${left.toFixed(1)} ${EDGE.top - 4})${turn} scale(0.9)`;
      const rule = { class: "move", x1: left, x2: left, y1: EDGE.top, y2: HEIGHT - EDGE.bottom };
      return [
        svg("line", rule),
        svg("path", { class: "move-mark", d: MARKERS.triangle, transform: place }),
      ];
    });
}

function limitLine(limit, y, width) {
  if (limit === null || limit.value === null) return [];
  const at = y(limit.value);
  const line = { class: "mark-line dashed tone-bad", d: `M${EDGE.left} ${at}H${width - EDGE.right}` };
  const below = at < EDGE.top + 14 ? 13 : -5;
  const text = { x: EDGE.left + 4, y: at + below };
  return [svg("path", line), svg("text", text, limit.label)];
}

/** @param {Line} line @param {([number, number] | null)[]} points */
function drawLine(line, points, x, y) {
  const shift = line.nudge ?? 0;
  const runs = [];
  let run = [];
  for (const point of [...points, null]) {
    if (point !== null) run.push([x(point[0]), y(point[1]) + shift]);
    else if (run.length > 0) {
      runs.push(run);
      run = [];
    }
  }
  const drawn = runs.flatMap((each) => strokes(line, each, y(0)));
  const end = runs.at(-1)?.at(-1);
  if (end && line.marker && points.at(-1) !== null) drawn.push(marker(line, end[0], end[1]));
  return drawn;
}

function strokes(line, run, base) {
  const steps = run.map(([left, top], index) => {
    if (index === 0) return `M${left.toFixed(1)} ${top.toFixed(1)}`;
    return line.isStep ? `H${left.toFixed(1)}V${top.toFixed(1)}` : `L${left.toFixed(1)} ${top.toFixed(1)}`;
  });
  const path = steps.join("");
  const drawn = [svg("path", { class: `mark-line ${line.style ?? ""} ${line.tone}`, d: path })];
  if (line.hasArea && run.length > 1) {
    const area = `${path}V${base.toFixed(1)}H${run[0][0].toFixed(1)}Z`;
    drawn.unshift(svg("path", { class: `mark-area ${line.tone}`, d: area }));
  }
  return drawn;
}
