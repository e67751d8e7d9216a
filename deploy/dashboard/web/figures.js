// The row of numbers at the top.

import { byId, el, say, set } from "./dom.js";
import { bytesParts, count, NOTHING, seconds, secondsParts } from "./format.js";
import { icon } from "./icons.js";

/** @typedef {{ number: string, unit: string, verdict: string, is: "good" | "bad" | "" }} Figure */

/** @returns {Figure} the latency that is held against the objective, and how it stands */
function latency(state, name) {
  const { objective_s: objective, count: seen, ...values } = state.latency[name];
  const value = values.p95;
  const [number, unit] = secondsParts(value);
  if (value === null) return { number, unit: "", verdict: "no request lately", is: "" };
  if (objective === null) return { number, unit, verdict: `no objective · ${count(seen)} seen`, is: "" };
  const is = value <= objective ? "good" : "bad";
  const words = is === "good" ? "within" : "over";
  return { number, unit, verdict: `${words} ${seconds(objective)}`, is };
}

/** @type {[string, (state: any) => Figure][]} */
const FIGURES = [
  ["TTFT p95", (state) => latency(state, "ttft")],
  ["Between tokens p95", (state) => latency(state, "tbt")],
  ["Requests", (state) => plain(state.traffic.arrived_per_s, "/s", failed(state))],
  ["Output", (state) => plain(state.traffic.output_tokens_per_s, " tokens/s", finished(state))],
  ["KV moved", handoffs],
  ["Hand-offs failed", (state) => failures(state)],
];

const plain = (value, unit, rest) => ({ number: count(value), unit: value === null ? "" : unit, ...rest });

function failed(state) {
  const rate = state.traffic.failed_per_s;
  if (rate === null) return { verdict: "not known yet", is: "" };
  return rate > 0
    ? { verdict: `${count(rate)} failed/s`, is: "bad" }
    : { verdict: "none failed", is: "good" };
}

const finished = (state) => ({ verdict: `${count(state.traffic.finished_per_s)} finished/s`, is: "" });

function handoffs(state) {
  const [number, unit] = bytesParts(state.traffic.handoff_bytes_per_s);
  const verdict = `${count(state.traffic.handoffs_per_s)} hand-offs/s`;
  return { number, unit: number === NOTHING ? "" : `${unit}/s`, verdict, is: "" };
}

function failures(state) {
  const sum = (name) => state.routers.reduce((total, router) => total + router[name], 0);
  const [all, broken] = [sum("handoffs"), sum("handoff_failures")];
  const rate = state.traffic.handoff_failures_per_s;
  const is = rate > 0 ? "bad" : "good";
  return { number: count(broken), unit: ` of ${count(all + broken)}`, verdict: rate > 0 ? "failing now" : "none lately", is };
}

export class Figures {
  constructor() {
    this.tiles = FIGURES.map(([label, read]) => {
      const value = el("dd", {});
      const verdict = el("dd", { class: "verdict" });
      const node = el("div", { class: "figure" }, el("dt", {}, label), value, verdict);
      byId("figures").append(node);
      return { read, value, verdict };
    });
  }

  show(state) {
    for (const { read, value, verdict } of this.tiles) {
      const figure = read(state);
      value.replaceChildren(figure.number, el("small", {}, ` ${figure.unit.trim()}`));
      if (verdict.dataset.is !== figure.is) set(verdict, "data-is", figure.is);
      const shape = figure.is === "" ? [] : [icon(figure.is)];
      if (verdict.textContent !== figure.verdict) verdict.replaceChildren(...shape, figure.verdict);
    }
  }
}

/** Health, name, what is amiss, and what the controller did. */
export function showDeployment(state) {
  say(byId("name"), state.name);
  say(byId("model"), `${state.model} · ${state.engine}`);
  document.title = `${state.healthy ? "●" : "▲"} ${state.name} · Tandem`;
  const health = byId("health");
  const said = state.healthy ? "Serving" : state.reason;
  if (health.textContent !== said) {
    set(health, "data-is", state.healthy ? "good" : "bad");
    health.replaceChildren(icon(state.healthy ? "good" : "bad"), el("span", { class: "text" }, said));
  }
  const amiss = [
    ...state.unplaced.map((reason) => `No place: ${reason}`),
    ...Object.values(state.failed_starts).map((reason) => `Failed to start: ${reason}`),
    ...Object.entries(state.refused_pairs).map(([pair, reason]) => `Not paired ${pair}: ${reason}`),
    ...Object.entries(state.failed_proofs).map(([pair, reason]) => `Hand-off ${pair}: ${reason}`),
  ];
  const list = byId("attention");
  list.hidden = amiss.length === 0;
  if (list.dataset.says !== amiss.join("\n")) {
    list.dataset.says = amiss.join("\n");
    const lines = amiss.map((line) => el("li", {}, icon("bad"), el("span", {}, line)));
    list.firstElementChild.replaceChildren(...lines);
  }
  const events = byId("events");
  const last = String(state.events.at(-1)?.[0] ?? "");
  if (events.dataset.last !== last) {
    events.dataset.last = last;
    events.replaceChildren(...state.events.toReversed().map(([, event]) => el("li", {}, event)));
  }
}
