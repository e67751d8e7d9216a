// The request explorer: the last few hundred requests, each with its stages as a bar.

import { byId, choices, el, keep, rove, roveAgain, say, set, widen } from "./dom.js";
import { block, table } from "./drawer.js";
import { bytes, clock, count, NOTHING, seconds, words } from "./format.js";
import { icon } from "./icons.js";
import { NUM_REQUESTS } from "./link.js";

const STAGE_AFTER = {
  arrived: "queued",
  placed: "prefill",
  prefilled: "transfer",
  set_back: "queued",
  decoding: "decode",
};
const STAGES = ["queued", "prefill", "transfer", "decode"];
const GOOD = new Set(["stop", "length", "repetition"]);
const isBad = (request) => request.outcome !== null && !GOOD.has(request.outcome) && request.outcome !== "cancelled";
const KINDS = {
  all: () => true,
  open: (request) => request.outcome === null,
  failed: (request) => isBad(request) || request.attempts.some((attempt) => attempt.cause !== null),
};

/** The stages one after the other; the last one lasts until `now`. */
function stagesOf(request, now) {
  const end = Math.max(request.events.at(-1).at_s, now - request.arrived_at);
  const events = request.events.filter(({ event }) => event !== "first_token");
  return events.flatMap(({ event, at_s: from }, index) => {
    const stage = STAGE_AFTER[event];
    if (stage === undefined) return [];
    const to = events[index + 1]?.at_s ?? end;
    // Without a hand-off the decode worker computes the prompt itself.
    const isLocal = stage === "prefill" && events[index + 1]?.event === "decoding";
    return [{ stage, label: isLocal ? "prefill on decode" : stage, from, to }];
  });
}

export class Requests {
  /** @param {import("./drawer.js").Drawer} drawer */
  constructor(drawer) {
    this.drawer = drawer;
    /** @type {Map<string, any>} */
    this.known = new Map();
    this.routers = new Set();
    this.numRouters = 1;
    this.kind = "all";
    this.isPaused = false;
    this.isVisible = true;
    this.ahead = 0;
    this.opened = "";
    this.isInFlight = false;
    this.list = byId("request-list");
    rove(this.list);
    this.listen();
    byId("stage-key").append(
      ...STAGES.map((stage) => el("li", {}, el("span", { class: `stage ${stage}` }), stage)),
    );
  }

  listen() {
    const kinds = [["all", "All"], ["open", "In flight"], ["failed", "Set back or failed"]];
    choices(byId("outcomes"), kinds, this.kind, (kind) => {
      this.kind = kind;
      this.draw();
    });
    byId("find").addEventListener("input", () => this.draw());
    const pause = byId("pause");
    pause.addEventListener("click", () => {
      this.isPaused = !this.isPaused;
      set(pause, "aria-pressed", this.isPaused);
      say(pause, this.isPaused ? "Paused" : "Pause");
      this.draw();
    });
    const watcher = new IntersectionObserver(([entry]) => {
      this.isVisible = entry.isIntersecting;
    });
    watcher.observe(this.list.closest("section"));
  }

  get isWanted() {
    return this.isVisible && !this.isPaused;
  }

  /** Take in what one router answered. @param {any[]} requests */
  add(requests) {
    for (const request of requests) {
      this.routers.add(request.router_id);
      this.known.set(`${request.router_id} ${request.request_id}`, request);
    }
    this.forget(requests);
    this.draw();
    const isShown = this.drawer.isOpen && this.drawer.owner === this;
    if (isShown && this.isInFlight) this.open(this.opened);
  }

  /** What a router no longer lists as open has ended unseen; then only the newest are kept. */
  forget(requests) {
    const listed = new Set(requests);
    const routers = new Set(requests.map((request) => request.router_id));
    const open = requests.filter((request) => request.outcome === null);
    // Open ones get half of the page at least: if they fill it, older ones may be cut off.
    const since = open.length < NUM_REQUESTS / 2 ? 0 : open.at(-1).arrived_at;
    const isMissed = (request) => routers.has(request.router_id) && !listed.has(request);
    for (const [key, request] of this.known) {
      const isLost = request.outcome === null && isMissed(request) && request.arrived_at >= since;
      if (isLost) this.known.delete(key);
    }
    const byAge = [...this.known].sort(([, a], [, b]) => b.arrived_at - a.arrived_at);
    this.known = new Map(byAge.slice(0, NUM_REQUESTS));
  }

  /** Unix seconds by the server's clock. */
  get now() {
    return Date.now() / 1000 + this.ahead;
  }

  show(state) {
    this.ahead = state.at - Date.now() / 1000;
    this.numRouters = state.routers.length;
    const present = new Set(state.routers.map((router) => router.router_id));
    const seen = [...this.routers].filter((id) => present.has(id)).length;
    const source =
      this.numRouters > 1
        ? `gathered from ${seen} of ${this.numRouters} router replicas, each of which knows its own`
        : "as the router recorded them";
    say(byId("gathered"), `The last ${count(this.known.size)}, ${source}.`);
    const empty = byId("no-requests");
    empty.hidden = this.list.childElementCount > 0;
    if (!empty.hidden) say(empty, this.known.size > 0 ? "None like this." : "No request yet.");
  }

  shown() {
    const sought = byId("find").value.trim().toLowerCase();
    const isFound = (request) =>
      sought === "" ||
      [request.exchange_id, request.request_id, request.prefill_worker, request.decode_worker, request.outcome ?? request.stage]
        .some((text) => String(text ?? "").toLowerCase().includes(sought));
    return [...this.known.values()].filter((request) => KINDS[this.kind](request) && isFound(request));
  }

  draw() {
    const shown = this.shown();
    const lengths = shown.map((request) => request.e2e_s ?? Math.max(0, this.now - request.arrived_at));
    // One scale for all, so that bars can be compared.
    this.longest = lengths.reduce((a, b) => Math.max(a, b), 1e-3);
    const keyOf = (request) => `${request.router_id} ${request.request_id}`;
    keep(this.list, shown, keyOf, () => this.row(), (node, request) => this.update(node, request));
    roveAgain(this.list);
  }

  row() {
    const button = el(
      "button",
      { type: "button", class: "request", tabindex: -1, "aria-haspopup": "dialog" },
      el("time", { class: "quiet when" }),
      el("span", { class: "state" }),
      el("span", { class: "bar", "aria-hidden": "true" }),
      el("span", { class: "took" }),
      el("span", { class: "path" }),
    );
    button.addEventListener("click", () => this.open(button.parentElement.dataset.key));
    return el("li", {}, button);
  }

  update(node, request) {
    const said = `${request.outcome}${request.stage}${request.events.length}${this.longest}`;
    if (node.dataset.said === said && request.outcome !== null) return;
    node.dataset.said = said;
    const part = (name) => node.querySelector(`.${name}`);
    say(part("when"), clock(request.arrived_at));
    const is = request.outcome === null ? "busy" : isBad(request) ? "bad" : "good";
    set(node.firstElementChild, "data-is", is);
    part("state").replaceChildren(icon(is), request.outcome ?? words(request.stage));
    paint(part("bar"), stagesOf(request, this.now), this.longest);
    say(part("took"), seconds(request.e2e_s ?? Math.max(0, this.now - request.arrived_at)));
    say(part("path"), `${request.prefill_worker ?? "local"} → ${request.decode_worker ?? NOTHING}`);
  }

  open(key) {
    const request = this.known.get(key);
    if (request === undefined) return;
    this.opened = key;
    this.isInFlight = request.outcome === null;
    const keys = Array.from(this.list.children, (child) => child.dataset.key);
    const at = keys.indexOf(key);
    const opener = this.list.children[at]?.firstElementChild ?? this.list;
    const step = (by) => keys[at + by] !== undefined && this.open(keys[at + by]);
    const is = request.outcome === null ? "busy" : isBad(request) ? "bad" : "good";
    const title = [icon(is), request.outcome ?? words(request.stage)];
    this.drawer.show(this, title, this.explain(request), step, opener);
  }

  explain(request) {
    const stages = stagesOf(request, this.now);
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    paint(bar, stages, stages.at(-1)?.to ?? 1);
    const key = el("ul", { class: "key" }, ...STAGES.map((stage) => el("li", {}, el("span", { class: `stage ${stage}` }), stage)));
    const error = request.error === null ? [] : [el("p", { class: "note" }, request.error)];
    const tokens = request.prompt_tokens ?? {};
    return [
      ...error,
      block("Stages", bar, key, table(stages.map(({ label, from, to }) => [`${label}, at ${seconds(from)}`, seconds(to - from)]))),
      block("Latency", table([
        ["to the first token", seconds(request.ttft_s)],
        ["per token after", seconds(request.tpot_s)],
        ["longest gap", seconds(request.max_itl_s)],
        ["altogether", seconds(request.e2e_s)],
      ])),
      block("Tokens", table([
        ["prompt", count(request.num_prompt_tokens)],
        ...Object.entries(tokens).map(([origin, number]) => [`prompt, ${words(origin)}`, count(number)]),
        ["output", count(request.output_tokens)],
      ])),
      block("Hand-off", table([
        ["received", bytes(request.received_bytes)],
        ["sent", bytes(request.produced_bytes)],
        ["they agree", { true: "yes", false: "no", null: "nothing was moved" }[request.bytes_agree]],
        ["pull", seconds(request.pull_s)],
      ])),
      block("Placements", table(request.attempts.map((attempt, number) => [
        `${number + 1}: ${attempt.prefill_worker ?? "local"} → ${attempt.decode_worker}`,
        attempt.cause === null ? attempt.reason : `${words(attempt.cause)}: ${attempt.detail}`,
      ]))),
      block("Names", table([
        ["exchange", request.exchange_id],
        ["request", request.request_id],
        ["router", request.router_id],
        ["arrived", new Date(request.arrived_at * 1000).toLocaleString()],
      ])),
    ];
  }
}

/** Draw the stages over a scale that ends at `longest` seconds. */
function paint(bar, stages, longest) {
  const pieces = stages.map(({ stage, label, from, to }) => {
    const piece = el("i", { class: `stage ${stage}`, title: `${label} ${seconds(to - from)}` });
    widen(piece, (to - from) / longest);
    return piece;
  });
  bar.replaceChildren(...pieces);
}
