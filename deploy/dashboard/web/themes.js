// Light, dark, or what the system says; remembered where the browser lets us.

import { byId, say } from "./dom.js";

const KEY = "tandem-theme";
const ORDER = ["auto", "light", "dark"];
const LABELS = { auto: "Theme: auto", light: "Theme: light", dark: "Theme: dark" };

function remembered() {
  try {
    const theme = localStorage.getItem(KEY);
    return ORDER.includes(theme) ? theme : "auto";
  } catch {
    return "auto"; // storage is switched off
  }
}

function wear(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say(byId("theme"), LABELS[theme]);
}

/** Wear the remembered theme, and let the button change it. */
export function offerThemes() {
  let theme = remembered();
  wear(theme);
  byId("theme").addEventListener("click", () => {
    theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
    wear(theme);
    try {
      localStorage.setItem(KEY, theme);
    } catch {
      // It holds until the page is left.
    }
  });
}
