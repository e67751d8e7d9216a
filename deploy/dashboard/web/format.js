// Numbers, times and words as people read them. A dash is what is not known.

export const NOTHING = "–";

/** @param {number | null | undefined} value */
const isKnown = (value) => value !== null && value !== undefined && !Number.isNaN(value);

const round = (value, digits) =>
  value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: 0 });

/** Three figures at most, thousands apart. @param {number | null} value */
export function count(value) {
  if (!isKnown(value)) return NOTHING;
  const size = Math.abs(value);
  return round(value, size >= 100 || Number.isInteger(value) ? 0 : size >= 10 ? 1 : 2);
}

/** @param {number | null} value seconds @returns {[string, string]} number and unit */
export function secondsParts(value) {
  if (!isKnown(value)) return [NOTHING, ""];
  if (value < 0.0095) return [round(value * 1e3, 1), "ms"];
  if (value < 0.9995) return [round(value * 1e3, 0), "ms"];
  if (value < 120) return [round(value, value < 10 ? 2 : 1), "s"];
  return [`${Math.floor(value / 60)}:${String(Math.round(value % 60)).padStart(2, "0")}`, "min"];
}

/** @param {number | null} value bytes @returns {[string, string]} number and unit */
export function bytesParts(value) {
  if (!isKnown(value)) return [NOTHING, ""];
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 999.5 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return [count(value), units[power]];
}

const joined = ([number, unit]) => (unit ? `${number} ${unit}` : number);
export const seconds = (value) => joined(secondsParts(value));
export const bytes = (value) => joined(bytesParts(value));
export const bytesPerSecond = (value) => (isKnown(value) ? `${bytes(value)}/s` : NOTHING);
export const percent = (value) => (isKnown(value) ? `${Math.round(value * 100)} %` : NOTHING);
export const perSecond = (value) => (isKnown(value) ? `${count(value)}/s` : NOTHING);

/** A value of the signal. @param {number | null} value @param {string} unit */
export function ofUnit(value, unit) {
  if (unit === "s") return seconds(value);
  if (unit === "share") return percent(value);
  return count(value);
}

/** @param {[number, number]} pair prefill and decode workers */
export const sizes = ([prefill, decode]) => `${prefill}P${decode}D`;

const pad = (number) => String(number).padStart(2, "0");

/** Local time of day. @param {number} unix seconds */
export function clock(unix, hasSeconds = true) {
  const date = new Date(unix * 1000);
  const minutes = `${pad(date.getHours())}:${pad(date.getMinutes())}`;
  return hasSeconds ? `${minutes}:${pad(date.getSeconds())}` : minutes;
}

/** How long, roughly. @param {number} value seconds */
export function span(value) {
  if (value < 60) return `${Math.round(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

/** `soft_out` as people say it. @param {string} word */
export const words = (word) => word.replaceAll("_", " ");
