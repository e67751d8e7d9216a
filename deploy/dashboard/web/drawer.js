// The drawer: a modal dialog at the side. The browser keeps the focus in it, closes it on Escape
// and gives the focus back.

import { byId, el } from "./dom.js";

export class Drawer {
  constructor() {
    /** @type {HTMLDialogElement} */
    this.dialog = byId("drawer");
    this.owner = null;
    this.onStep = null;
    this.opener = null;
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("close", () => this.opener?.focus());
    this.dialog.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by === undefined || this.onStep === null) return;
      event.preventDefault();
      this.onStep(by);
    });
  }

  get isOpen() {
    return this.dialog.open;
  }

  /**
   * Show `title` and `parts` of `owner`; `onStep` goes to the neighbour in the list, 1 to
   * the older one. `opener` gets the focus
   * when the drawer closes.
   * @param {object} owner @param {(Node | string)[]} title @param {Node[]} parts
   * @param {(by: number) => void} onStep @param {HTMLElement} opener
   */
  show(owner, title, parts, onStep, opener) {
    this.owner = owner;
    this.onStep = onStep;
    this.opener = opener;
    const held = this.dialog.contains(document.activeElement) ? document.activeElement.id : null;
    const tool = (id, label, said, act) => {
      const button = el("button", { type: "button", class: "tool", id, "aria-label": said }, label);
      button.addEventListener("click", act);
      return button;
    };
    const heading = el("h2", { id: "drawer-title" }, ...title);
    const nav = el(
      "nav",
      { "aria-label": "Drawer" },
      tool("drawer-newer", "←", "newer", () => onStep(-1)),
      tool("drawer-older", "→", "older", () => onStep(1)),
      tool("drawer-close", "Close", "close", () => this.dialog.close()),
    );
    const header = el("header", {}, heading, nav);
    this.dialog.replaceChildren(el("div", { class: "sheet" }, header, ...parts));
    if (!this.dialog.open) this.dialog.showModal();
    byId(held && document.getElementById(held) ? held : "drawer-close").focus();
  }
}

/** A block of the drawer. @param {string} title @param {...(Node | string)} children */
export const block = (title, ...children) => el("section", {}, el("h3", {}, title), ...children);

/** Names and values, one below the other. @param {[string, string][]} rows */
export function table(rows) {
  const body = rows.map(([name, value]) =>
    el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value)),
  );
  return el("table", {}, el("tbody", {}, ...body));
}
