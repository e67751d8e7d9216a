// The timeline of decisions, and the drawer that explains one.

import { byId, choices, el, keep, rove, roveAgain, say } from "./dom.js";
import { block, table } from "./drawer.js";
import { clock, count, percent, seconds, sizes, span, words } from "./format.js";
import { icon } from "./icons.js";

const KEPT = 1000;
const SHOWN = 300;
const NAMES = { hold: "Hold", out: "Scale out", in: "Scale in", repair: "Ratio repair", restore: "Taken back" };
const LAWS = { pin: "by hand", signal: "by the signal", arrivals: "by arrivals", latency: "by latency" };

export class Decisions {
  /**
   * @param {import("./drawer.js").Drawer} drawer
   * @param {import("./samples.js").Samples} samples
   */
  constructor(drawer, samples) {
    this.drawer = drawer;
    this.samples = samples;
    this.state = null;
    this.opened = null;
    /** @type {any[]} oldest first */
    this.records = [];
    this.kind = "all";
    this.list = byId("decision-list");
    choices(byId("kinds"), [["all", "All"], ["moves", "Moves"]], this.kind, (kind) => {
      this.kind = kind;
      this.draw();
    });
    rove(this.list);
  }

  /** @param {any[]} records @param {boolean} isNew */
  add(records, isNew) {
    this.records = isNew ? records : [...this.records, ...records].slice(-KEPT);
    this.draw();
  }

  show(state) {
    this.state = state;
    const { pin } = state.scaling;
    const rule = { off: "The autoscaler is off", advise: "Advice only, nothing is changed", act: "The autoscaler acts" };
    const held = pin === null ? "" : ` · held at ${pin}`;
    say(byId("scaling"), `${rule[state.autoscaler]}${held}`);
    if (this.drawer.isOpen && this.drawer.owner === this) {
      say(this.drawer.dialog.querySelector(".outcome"), this.outcome(this.opened));
    }
    const empty = byId("no-decisions");
    empty.hidden = this.shown().length > 0;
    if (!empty.hidden) say(empty, this.records.length > 0 ? "No move yet." : "No decision yet.");
  }

  /** Decisions that changed the pools, for the charts. */
  moves() {
    return this.records
      .filter((record) => record.decision.action !== "hold")
      .map((record) => ({ at: record.now, action: record.decision.action }));
  }

  /** Newest first. */
  shown() {
    const isShown = (record) => this.kind === "all" || record.decision.action !== "hold";
    return this.records.filter(isShown).slice(-SHOWN).reverse();
  }

  draw() {
    keep(this.list, this.shown(), (record) => String(record.seq), (record) => this.row(record), () => {});
    roveAgain(this.list);
  }

  row(record) {
    const { decision } = record;
    const name = NAMES[decision.action] ?? decision.action;
    const change =
      decision.action === "hold" ? sizes(decision.final) : `${sizes(decision.current)} → ${sizes(decision.final)}`;
    const button = el(
      "button",
      { type: "button", class: "decision", tabindex: -1, "aria-haspopup": "dialog" },
      icon(decision.action),
      el(
        "span",
        {},
        el("span", { class: "what" }, el("b", {}, `${name} `, change), el("time", { class: "quiet" }, clock(record.now))),
        el("span", { class: "why" }, decision.reason),
      ),
    );
    button.dataset.action = decision.action;
    button.dataset.seq = String(record.seq);
    button.addEventListener("click", () => this.open(record));
    return el("li", {}, button);
  }

  open(record) {
    const { decision } = record;
    const name = NAMES[decision.action] ?? decision.action;
    const title = [icon(decision.action), `#${record.seq} ${name}`];
    const opener = this.list.querySelector(`[data-seq="${record.seq}"]`) ?? this.list;
    const step = (by) => {
      const all = this.shown();
      const next = all[all.findIndex((each) => each.seq === record.seq) + by];
      if (next !== undefined) this.open(next);
    };
    this.opened = record;
    this.drawer.show(this, title, this.explain(record), step, opener);
  }

  explain(record) {
    const { decision, state } = record;
    return [
      el("p", { class: "note" }, decision.reason),
      block("From what was asked to what was done", this.steps(decision)),
      block("Inputs", table(decision.inputs.map(([name, value]) => reading(name, value)))),
      block("Outcome", el("p", { class: "note outcome" }, this.outcome(record))),
      block("Everything it could see", table(snapshotRows(record.snapshot))),
      block("What it remembered", table(stateRows(state, record.now))),
      el("p", { class: "quiet" }, `${new Date(record.now * 1000).toLocaleString()} · driver ${decision.driver}`),
    ];
  }

  steps(decision) {
    const step = (label, size, law, isLast = false) =>
      el(
        "li",
        { class: isLast ? "last" : null },
        el("span", { class: "quiet" }, label),
        el("span", {}, el("span", { class: "size" }, size), " ", el("span", { class: "law" }, law)),
      );
    const driver = LAWS[decision.driver] ?? words(decision.driver);
    const name = NAMES[decision.action] ?? decision.action;
    return el(
      "ol",
      { class: "steps" },
      step("before", sizes(decision.current), ""),
      decision.raw === null ? step("raw target", "none", "nothing asked for a change") : step("raw target", sizes(decision.raw), driver),
      ...decision.clamps.map(([law, before, after, reason]) =>
        step("clamp", `${sizes(before)} → ${sizes(after)}`, `${words(law)}: ${reason}`),
      ),
      step("final", sizes(decision.final), ""),
      step("action", name.toLowerCase(), driver, true),
    );
  }

  /** What came of it, by the samples after it. @returns {string} */
  outcome(record) {
    const { decision } = record;
    const next = this.records.find((each) => each.seq > record.seq && each.decision.action !== "hold");
    const until = next?.now ?? Infinity;
    if (decision.action === "hold") return `The pools stay at ${sizes(decision.final)}.`;
    if (this.state?.autoscaler === "advise" && decision.driver !== "pin") return "Advice only: nothing was changed.";
    const from = this.samples.from(record.now);
    if (from > 0 || this.samples.times[0] <= record.now + 2) {
      for (let index = from; index < this.samples.times.length; index += 1) {
        const at = this.samples.times[index];
        if (at > until) break;
        if (this.isReached(index, decision.final)) {
          return `${sizes(decision.final)} were ready after ${span(Math.max(0, at - record.now))}.${this.effect(record.now, at)}`;
        }
      }
    } else return "It is older than the samples kept.";
    if (next !== undefined) return `Decision #${next.seq} came before ${sizes(decision.final)} were ready.`;
    const now = this.samples.times.length - 1;
    const ready = sizes([this.samples.value("prefill_ready", now), this.samples.value("decode_ready", now)]);
    return `Under way for ${span(Math.max(0, (this.state?.at ?? record.now) - record.now))}: ${ready} ready.`;
  }

  isReached(index, [prefill, decode]) {
    const ready = (role) => this.samples.value(`${role}_ready`, index);
    return ready("prefill") === prefill && ready("decode") === decode;
  }

  /** How the signal stood against what the pools carry, before and a moment after. */
  effect(before, after) {
    const load = (at) => {
      const index = this.samples.nearest(at);
      const capacity = this.samples.value("capacity", index);
      const value = this.samples.value("signal", index);
      return capacity && value !== null ? Math.round((100 * value) / capacity) : null;
    };
    const [was, is] = [load(before), load(after + 5)];
    return was === null || is === null ? "" : ` Load went from ${was} % to ${is} % of capacity.`;
  }
}

const LABELS = {
  decode_tps: "decode tokens/s",
  prefill_tps: "prefill tokens/s",
  arriving_tps: "arriving tokens/s",
  arrivals_per_s: "requests/s",
  prefill_util: "prefill busy",
  decode_util: "decode busy",
  ttft_s: "TTFT",
  tbt_s: "time between tokens",
  prompt_tokens: "prompt tokens per request",
  output_tokens: "output tokens per request",
  latency_ratio: "latency over objective",
};

/** A name and its number, or why there is none. @returns {[string, string]} */
function reading(name, value) {
  const label = LABELS[name] ?? words(name);
  if (value !== null && typeof value === "object") {
    return [label, `${value.is_idle ? "idle" : "missing"}: ${value.missing}`];
  }
  if (name.endsWith("_s") && !name.endsWith("_per_s")) return [label, seconds(value)];
  return [label, name.endsWith("_util") ? percent(value) : count(value)];
}

function snapshotRows(snapshot) {
  const pools = ["prefill", "decode"].map((role) => {
    const parts = Object.entries(snapshot[role]).filter(([, number]) => number > 0);
    return [role, parts.map(([kind, number]) => `${number} ${words(kind)}`).join(", ") || "none"];
  });
  const rest = Object.entries(snapshot).filter(([name]) => !["prefill", "decode", "worker_gpus"].includes(name));
  return [...pools, ...rest.map(([name, value]) => reading(name, value))];
}

function stateRows(state, now) {
  const ago = (at) => (at === null ? "never" : `${span(Math.max(0, now - at))} before`);
  const rows = [
    ["target", sizes(state.target)],
    ["last scale-out", ago(state.last_out_at)],
    ["last scale-in", ago(state.last_in_at)],
  ];
  if (state.backoff_until !== null) rows.push(["no scale-in until", clock(state.backoff_until)]);
  if (state.size_before_in !== null) rows.push(["may go back to", sizes(state.size_before_in)]);
  if (state.pin !== null) rows.push(["held by hand", `${sizes(state.pin[0])}: ${state.pin[1]}`]);
  return rows;
}
