// What the page asks of its own endpoint, once a second while somebody looks.

import { keyHeaders, Locked } from "./key.js";

const TIMEOUT_MS = 5000;
const PERIOD_MS = 1000;
const FIRST_DECISIONS = 300;
/** How many requests a page of theirs has at most; half of it is for those that have ended. */
export const NUM_REQUESTS = 400;

/** The endpoint answered that it cannot say: the controller is away. */
export class Away extends Error {}

/** @param {string} path relative to the page @returns {Promise<any>} */
async function ask(path) {
  const answer = await fetch(path, {
    cache: "no-store",
    credentials: "same-origin",
    headers: keyHeaders(),
    signal: AbortSignal.timeout(TIMEOUT_MS),
  });
  if (answer.ok) return answer.json();
  let message = null;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // Not the router's words but those of a proxy before it.
  }
  if (answer.status === 401 || answer.status === 403) {
    throw new Locked(message ?? `HTTP ${answer.status}`);
  }
  if (message === null) throw new Error(`HTTP ${answer.status}`);
  throw new Away(String(message));
}

/**
 * @typedef {object} Sink
 * @property {(state: any) => void} state
 * @property {(history: any) => void} history
 * @property {(decisions: any[], isNew: boolean) => void} decisions `isNew`: forget the earlier ones
 * @property {(requests: any[]) => void} requests
 * @property {() => boolean} wantsRequests
 * @property {(trouble: Error | null) => void} trouble what the last round met, null for nothing
 */

/** Asks, and passes on what comes; whatever fails is tried again in the next round. */
export class Link {
  /** @param {Sink} sink */
  constructor(sink) {
    this.sink = sink;
    this.sample = 0;
    this.seq = null;
    this.hasRequests = false;
    this.round = 0;
    this.timer = 0;
    this.isAsking = false;
    document.addEventListener("visibilitychange", () => this.wake());
  }

  /** Ask now, and then every second until the page is hidden. */
  wake() {
    clearTimeout(this.timer);
    if (!document.hidden && !this.isAsking) this.turn();
  }

  async turn() {
    const beganAt = performance.now();
    this.isAsking = true;
    const results = await Promise.allSettled([this.follow(), this.explore()]);
    this.isAsking = false;
    const failed = results.find((result) => result.status === "rejected");
    this.sink.trouble(failed === undefined ? null : failed.reason);
    // Nobody is asked again until somebody has given a key.
    if (failed !== undefined && failed.reason instanceof Locked) return;
    this.round += 1;
    const rest = Math.max(100, PERIOD_MS - (performance.now() - beganAt));
    if (!document.hidden) this.timer = setTimeout(() => this.turn(), rest);
  }

  async follow() {
    const [state, history] = await Promise.all([
      ask("admin/state"),
      ask(`admin/history?after=${this.sample}`),
    ]);
    this.sample = history.next;
    this.sink.history(history);
    this.sink.state(state);
    await this.decide(state.scaling.last_seq);
  }

  /** Fetch the decisions up to number `last` that are not here yet. */
  async decide(last) {
    const isNew = this.seq === null || last < this.seq;
    if (isNew) this.seq = Math.max(0, last - FIRST_DECISIONS);
    if (last <= this.seq && !isNew) return;
    const page = await ask(`admin/decisions?after=${this.seq}&limit=${FIRST_DECISIONS}`);
    this.seq = page.next;
    this.sink.decisions(page.decisions, isNew);
  }

  /** Each replica of the router knows its own requests; round after round all of them answer. */
  async explore() {
    if (this.hasRequests && !(this.round % 2 === 0 && this.sink.wantsRequests())) return;
    this.sink.requests((await ask(`admin/requests?limit=${NUM_REQUESTS}`)).requests);
    this.hasRequests = true;
  }
}
