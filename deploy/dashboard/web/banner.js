// Says when the page no longer follows, since when, and when it does again.

import { byId, say } from "./dom.js";
import { clock, span } from "./format.js";
import { Locked } from "./key.js";
import { Away } from "./link.js";

const NEWS_MS = 8000;

export class Banner {
  constructor() {
    this.goodAt = null;
    this.since = null;
    setInterval(() => this.age(), 1000);
  }

  /** @param {Error | null} trouble of the last round */
  tell(trouble) {
    const now = Date.now() / 1000;
    if (trouble === null) {
      if (this.since !== null) this.recover(now - this.since);
      this.goodAt = now;
      this.since = null;
      byId("banner").hidden = true;
      say(byId("footer"), `Live: read at ${clock(now)}.`);
      return;
    }
    if (trouble instanceof Locked) {
      byId("banner").hidden = true;
      return;
    }
    this.since ??= this.goodAt ?? now;
    const since = `since ${clock(this.since)}`;
    const text =
      trouble instanceof Away
        ? `The controller is away ${since}; requests go on with the workers last known. ${trouble.message}`
        : `Connection lost ${since}. What you see is from then; trying again every second.`;
    say(byId("banner-text"), text);
    byId("banner").hidden = false;
    say(byId("footer"), `Not live: last read at ${this.goodAt === null ? "no time" : clock(this.goodAt)}.`);
    this.age();
  }

  recover(lostS) {
    say(byId("news"), `Live again after ${span(lostS)}.`);
    setTimeout(() => say(byId("news"), ""), NEWS_MS);
  }

  age() {
    if (this.since !== null) say(byId("banner-age"), `${span(Date.now() / 1000 - this.since)} ago`);
  }
}
