// The API key of an endpoint that asks for one: kept in this tab only, sent to nobody else.

import { byId, say } from "./dom.js";

const PLACE = "tandem-api-key";

/** The endpoint wants a key, or another one than it was sent. */
export class Locked extends Error {}

/** Return what goes along with every question. @returns {Record<string, string>} */
export function keyHeaders() {
  const key = sessionStorage.getItem(PLACE);
  return key === null ? {} : { authorization: `Bearer ${key}` };
}

export class KeyForm {
  /** @param {() => void} onKey called when there is another key to try */
  constructor(onKey) {
    byId("key").addEventListener("submit", (event) => {
      event.preventDefault();
      sessionStorage.setItem(PLACE, byId("key-text").value.trim());
      byId("key-text").value = "";
      onKey();
    });
  }

  /** @param {Error | null} trouble of the last round */
  tell(trouble) {
    const isLocked = trouble instanceof Locked;
    if (isLocked) {
      say(byId("key-why"), trouble.message);
      if (byId("key").hidden) {
        byId("key").hidden = false;
        byId("key-text").focus();
      }
    } else {
      byId("key").hidden = true;
    }
  }
}
