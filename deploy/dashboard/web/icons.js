// Shapes that say by themselves what colour also says.

import { svg } from "./dom.js";

const PATHS = {
  good: "M2.5 8.5 6.5 12.5 13.5 4",
  bad: "M8 2 14.5 13.5H1.5ZM8 6.5v3.2M8 11.6v.2",
  busy: "M8 1.8A6.2 6.2 0 1 1 1.8 8M8 4.5V8l2.6 1.6",
  out: "M8 2.5 13.5 12.5H2.5Z",
  in: "M8 13.5 2.5 3.5H13.5Z",
  hold: "M8 6a2 2 0 1 1 0 4a2 2 0 1 1 0-4",
  repair: "M8 1.8 14.2 8 8 14.2 1.8 8Z",
  restore: "M3 8a5 5 0 1 0 1.6-3.7M3 2.2v3h3",
  ready: "M8 3.2a4.8 4.8 0 1 1 0 9.6a4.8 4.8 0 1 1 0-9.6M5.8 8.1l1.6 1.6 2.9-3.3",
  waiting: "M8 3.2a4.8 4.8 0 1 1 0 9.6a4.8 4.8 0 1 1 0-9.6",
  half: "M8 3.2a4.8 4.8 0 1 1 0 9.6ZM8 3.2a4.8 4.8 0 1 0 0 9.6",
  pause: "M5.5 3.5v9M10.5 3.5v9",
  swap: "M2.5 5.5h10l-2.5-2.5M13.5 10.5h-10l2.5 2.5",
  leave: "M8 2.5v10M4 8.5 8 12.5l4-4",
};
const SOLID = new Set(["out", "in", "hold", "repair"]);
const OF_STATE = {
  ready: "ready",
  held: "pause",
  standby: "pause",
  flipping: "swap",
  pending: "waiting",
  starting: "half",
  warming: "half",
  soft_out: "leave",
  draining: "leave",
  stopping: "leave",
};

/** Return a shape of the height of the text. @param {string} name @returns {SVGElement} */
export function icon(name) {
  const fill = SOLID.has(name) ? "currentColor" : "none";
  return svg(
    "svg",
    { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true", focusable: "false" },
    svg("path", {
      d: PATHS[name] ?? PATHS.waiting,
      fill,
      stroke: "currentColor",
      "stroke-width": 1.6,
      "stroke-linecap": "round",
      "stroke-linejoin": "round",
    }),
  );
}

/** @param {string} state of a worker */
export const stateIcon = (state) => icon(OF_STATE[state] ?? "waiting");
