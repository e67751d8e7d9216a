// The two pools: a tile per worker.

import { el, keep, say, set, widen } from "./dom.js";
import { count, NOTHING, percent, span, words } from "./format.js";
import { stateIcon } from "./icons.js";

const RATE_S = 5;
const COUNTER = { prefill: "computed_prompt_tokens", decode: "generated_tokens" };

/** What each worker did lately, from counters that only grow within one life of it. */
class Rates {
  constructor() {
    /** @type {Map<string, { at: number, tokens: number, busy: number }[]>} */
    this.seen = new Map();
  }

  /** Take in the workers as they are at `at`. */
  add(at, workers) {
    const present = new Map();
    for (const worker of workers) {
      if (worker.busy_s === null) continue;
      const points = this.seen.get(lifeOf(worker)) ?? [];
      points.push({ at, tokens: worker[COUNTER[worker.role]], busy: worker.busy_s });
      while (points.length > 2 && points[1].at <= at - RATE_S) points.shift();
      present.set(lifeOf(worker), points);
    }
    this.seen = present;
  }

  /** @returns {{ tokens: number | null, busy: number | null }} per second, and a share of 1 */
  of(worker) {
    const points = this.seen.get(lifeOf(worker)) ?? [];
    const [first, last] = [points[0], points.at(-1)];
    if (first === undefined || last.at === first.at) return { tokens: null, busy: null };
    const elapsed = last.at - first.at;
    const grown = Math.max(0, last.tokens - first.tokens) / elapsed;
    return { tokens: grown, busy: Math.min(1, Math.max(0, last.busy - first.busy) / elapsed) };
  }
}

const lifeOf = (worker) => `${worker.worker_id}@${worker.epoch}@${worker.role}`;

export class Pools {
  constructor() {
    this.rates = new Rates();
  }

  show(state) {
    this.rates.add(state.at, state.workers);
    for (const panel of document.querySelectorAll(".pool")) {
      const { role } = panel.dataset;
      const workers = state.workers.filter((worker) => worker.role === role);
      showSizes(panel.querySelector(".sizes"), state, role, workers);
      const list = panel.querySelector(".workers");
      keep(list, workers, (worker) => worker.worker_id, tile, (node, worker) => {
        this.update(node, worker, state);
      });
    }
  }

  update(node, worker, state) {
    const { tokens, busy } = this.rates.of(worker);
    const part = (name) => node.querySelector(`.${name}`);
    if (node.dataset.state !== worker.state) {
      set(node, "data-state", worker.state);
      part("state").replaceChildren(stateIcon(worker.state), words(worker.state));
    }
    widen(part("busy"), busy ?? 0);
    say(part("busy-share"), percent(busy));
    say(part("load-says"), `${count(worker.num_running)} running · ${count(worker.num_waiting)} waiting`);
    showBlocks(part, worker);
    const rate = tokens === null ? "" : `${count(tokens)} tokens/s`;
    const age = worker.state === "ready" ? "" : `for ${span(Math.max(0, state.at - worker.since))}`;
    say(part("does"), [rate, age].filter(Boolean).join(" · ") || NOTHING);
    const domain = worker.domain ? `domain ${worker.domain}` : "no network domain";
    say(part("where"), worker.node === null ? "no place yet" : `${domain} · ${cores(worker)}`);
    set(part("where"), "title", worker.node === null ? "" : `node ${worker.node}`);
  }
}

const cores = (worker) => `core${worker.cpus.length === 1 ? "" : "s"} ${worker.cpus.join(", ")}`;

function showSizes(node, state, role, workers) {
  const others = new Map();
  for (const worker of workers) {
    if (worker.state !== "ready") others.set(worker.state, (others.get(worker.state) ?? 0) + 1);
  }
  const rest = Array.from(others, ([kind, number]) => `, ${number} ${words(kind)}`);
  const ready = el("b", { class: "ready" }, String(state.ready[role]));
  node.replaceChildren(ready, ` ready of ${state.desired[role]} wanted`, ...rest);
}

function showBlocks(part, worker) {
  const { num_blocks: all, num_free_blocks: free, num_held_blocks: pinned } = worker;
  if (!all) {
    widen(part("used"), 0);
    widen(part("pinned"), 0);
    say(part("kv-share"), NOTHING);
    return say(part("kv-says"), "no blocks yet");
  }
  const used = Math.max(0, all - free - pinned);
  widen(part("used"), used / all);
  widen(part("pinned"), pinned / all);
  say(part("kv-share"), percent((pinned + used) / all));
  return say(part("kv-says"), `${count(pinned)} pinned of ${count(all)}`);
}

function tile(worker) {
  return el(
    "li",
    { class: "worker" },
    el(
      "header",
      {},
      el("span", { class: "mono id" }, worker.worker_id),
      el("span", { class: "state" }),
    ),
    measure("busy", "busy-share", "load-says", [el("i", { class: "busy" })]),
    measure("KV", "kv-share", "kv-says", [el("i", { class: "pinned" }), el("i", { class: "used" })]),
    el("footer", {}, el("div", { class: "does" }), el("div", { class: "where" })),
  );
}

function measure(label, share, says, pieces) {
  return el(
    "div",
    { class: "measure" },
    el("span", {}, label),
    el("span", { class: "meter", "aria-hidden": "true" }, ...pieces),
    el("span", { class: `share ${share}` }),
    el("span", { class: `says ${says}` }),
  );
}
