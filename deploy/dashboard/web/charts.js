// The six charts, and what stands in each.

import { Chart } from "./chart.js";
import { byId } from "./dom.js";
import { bytes, bytesPerSecond, count, ofUnit, perSecond, seconds } from "./format.js";

const ratioOf = (prefill, decode) => (samples, index) => {
  const below = samples.value(decode, index);
  return below ? samples.value(prefill, index) / below : null;
};

const percentiles = (name) => [
  { name: `${name}_p50`, label: "p50", tone: "tone-soft", style: "thin", marker: "circle" },
  { name: `${name}_p95`, label: "p95", tone: "tone-prefill", marker: "square", hasArea: false },
  { name: `${name}_p99`, label: "p99", tone: "tone-transfer", style: "dotted", marker: "triangle" },
];

const objective = (name) => (state) => {
  const value = state?.latency[name].objective_s ?? null;
  return value === null ? null : { value, label: `objective ${seconds(value)}` };
};

/** @type {import("./chart.js").Plan[]} */
const PLANS = [
  {
    id: "chart-signal",
    title: "Signal",
    unit: "",
    show: count,
    lines: [
      { name: "signal", label: "load", tone: "tone-signal", marker: "circle", hasArea: true },
      { name: "capacity", label: "capacity", tone: "tone-ink", style: "thin", marker: "square", isStep: true },
      { name: "target", label: "target at wanted size", tone: "tone-transfer", style: "dashed", isStep: true },
    ],
  },
  {
    id: "chart-workers",
    title: "Workers",
    unit: "ready, and wanted (dashed)",
    show: count,
    isWhole: true,
    lines: [
      { name: "prefill_ready", label: "prefill", tone: "tone-prefill", marker: "circle", isStep: true, nudge: -1.5 },
      { name: "prefill_wanted", label: "wanted", tone: "tone-prefill", style: "dashed", isStep: true, nudge: -1.5 },
      { name: "decode_ready", label: "decode", tone: "tone-decode", marker: "square", isStep: true, nudge: 1.5 },
      { name: "decode_wanted", label: "wanted", tone: "tone-decode", style: "dashed", isStep: true, nudge: 1.5 },
    ],
  },
  {
    id: "chart-ttft",
    title: "Time to first token",
    unit: "",
    show: seconds,
    isLog: true,
    lines: percentiles("ttft"),
    limit: objective("ttft"),
  },
  {
    id: "chart-tbt",
    title: "Time between tokens",
    unit: "",
    show: seconds,
    isLog: true,
    lines: percentiles("tbt"),
    limit: objective("tbt"),
  },
  {
    id: "chart-ratio",
    title: "Ready ratio",
    unit: "prefill per decode",
    show: count,
    lines: [
      {
        name: "ratio_ready",
        label: "ready",
        tone: "tone-signal",
        marker: "diamond",
        isStep: true,
        derive: ratioOf("prefill_ready", "decode_ready"),
      },
      {
        name: "ratio_wanted",
        label: "wanted",
        tone: "tone-ink",
        style: "dashed",
        isStep: true,
        derive: ratioOf("prefill_wanted", "decode_wanted"),
      },
    ],
  },
  {
    id: "chart-handoff",
    title: "KV hand-offs",
    unit: "bytes per second",
    show: bytesPerSecond,
    showTick: bytes,
    lines: [
      { name: "handoff_bytes_per_s", label: "moved", tone: "tone-transfer", marker: "diamond", hasArea: true },
      // Told as a number only: another scale would mislead.
      { name: "handoffs_per_s", label: "hand-offs", tone: "tone-soft", show: perSecond, isTold: true },
      { name: "handoff_failures_per_s", label: "failed", tone: "tone-bad", show: perSecond, isTold: true },
    ],
  },
];

export class Charts {
  constructor() {
    this.cursor = null;
    this.charts = PLANS.map((plan) => new Chart(plan, (at) => this.point(at)));
    byId("charts").append(...this.charts.map((chart) => chart.node));
  }

  /** All charts show the same moment. @param {number | null} at */
  point(at) {
    if (at === this.cursor) return;
    this.cursor = at;
    for (const chart of this.charts) {
      if (chart.view === null) continue;
      chart.view.cursor = at;
      chart.draw();
    }
  }

  /** @param {import("./samples.js").Samples} samples */
  show(samples, state, moves, rangeS) {
    const to = samples.latest ?? Math.floor(Date.now() / 1000);
    const view = { from: to - rangeS, to, cursor: this.cursor, moves, state };
    const signal = state?.scaling.signal ?? null;
    if (signal !== null) this.explainSignal(signal);
    for (const chart of this.charts) chart.show(samples, { ...view });
  }

  explainSignal(signal) {
    const { plan } = this.charts[0];
    plan.unit = `${signal.name}, ${signal.unit}${signal.missing === null ? "" : `: ${signal.missing}`}`;
    plan.show = (value) => ofUnit(value, signal.unit);
  }
}
