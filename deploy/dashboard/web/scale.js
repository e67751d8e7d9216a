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

/** Return a logarithmic axis of whole decades around both ends. @returns {Axis} */
export function logAxis(least, most) {
  const first = Math.floor(Math.log10(Math.max(least, 1e-4)) + 1e-9);
  const last = Math.max(first + 1, Math.ceil(Math.log10(Math.max(most, 1e-4)) - 1e-9));
  const ticks = [];
  for (let power = first; power <= last; power += 1) ticks.push(10 ** power);
  return { low: 10 ** first, high: 10 ** last, ticks, isLog: true };
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
