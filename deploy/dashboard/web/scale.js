// From values to pixels and back: the axes of a chart. Nothing here touches the page.

/** @typedef {{ low: number, high: number, ticks: number[], isLog: boolean }} Axis */

/** Return a linear axis from 0 that holds `most`. @returns {Axis} */
export function linearAxis(most, isWhole = false) {
  const top = most > 0 ? most : 1;
  const rough = top / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? rough;
  if (isWhole) step = Math.max(1, Math.ceil(step));
  const high = Math.ceil(top / step - 1e-9) * step;
  const ticks = [];
  for (let tick = 0; tick <= high + step / 2; tick += step) ticks.push(tick);
  return { low: 0, high, ticks, isLog: false };
}

const LEAST_S = 1e-4;

/** Return a logarithmic axis around both ends, with few enough round ticks. @returns {Axis} */
export function logAxis(least, most) {
  const [low, high] = [Math.max(least, LEAST_S) * 0.95, Math.max(most, LEAST_S) * 1.15];
  const all = [];
  for (let power = -4; power <= 4; power += 1) all.push(...[1, 2, 5].map((each) => each * 10 ** power));
  const first = Math.max(0, all.findLastIndex((tick) => tick <= low));
  const last = Math.max(first + 2, all.findIndex((tick) => tick >= high));
  const between = all.slice(first, last + 1);
  const ticks = between.length <= 5 ? between : between.filter((_, index) => (first + index) % 3 === 0);
  return { low: all[first], high: all[Math.min(last, all.length - 1)], ticks, isLog: true };
}

/** Return the share of the axis below `value`. @param {Axis} axis */
export function placeOn(axis, value) {
  if (!axis.isLog) return (value - axis.low) / (axis.high - axis.low);
  const bounded = Math.max(value, axis.low);
  return Math.log(bounded / axis.low) / Math.log(axis.high / axis.low);
}

const TIME_STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];

/** Return round moments between two Unix seconds, `most` of them at most. */
export function timeTicks(from, to, most) {
  const step = TIME_STEPS.find((each) => (to - from) / each <= most) ?? 3600;
  // Whole hours and quarters of the local day.
  const shift = new Date(from * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let at = Math.ceil((from - shift) / step) * step + shift; at <= to; at += step) ticks.push(at);
  return ticks;
}

/**
 * Return one [time, value] per `step` of time, its peak, so that no spike is lost; a hole longer
 * than `gap` becomes a null.
 * @param {number[]} times @param {(number | null)[]} values
 * @returns {([number, number] | null)[]}
 */
export function thin(times, values, first, step, gap) {
  const points = [];
  for (let index = first; index < times.length; index += 1) {
    const value = values[index];
    const last = points.at(-1);
    const isHole = index > first && times[index] - times[index - 1] > gap;
    if (value === null || value === undefined || isHole) {
      if (last) points.push(null);
      if (value === null || value === undefined) continue;
    }
    const before = points.at(-1);
    if (before && Math.floor(times[index] / step) === Math.floor(before[0] / step)) {
      if (value >= before[1]) before[1] = value;
    } else points.push([times[index], value]);
  }
  return points;
}
