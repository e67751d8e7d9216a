// Reads every plot at the place of the pointer, or of the arrow keys; plots over time together.
"use strict";
const charts = [...document.querySelectorAll(".chart")].map((figure) => {
  const axis = (text) => {
    const [low, high, kind] = text.split(" ");
    const [a, b] = [low, high].map(kind === "log" ? (v) => Math.log(v) : Number);
    const back = kind === "log" ? Math.exp : (v) => v;
    return (share) => back(a + (b - a) * share);
  };
  const lines = [...figure.querySelectorAll(".area path[data-style]")].map((path) => {
    const points = [];
    let x = 0, y = 0;
    for (const [, command, rest] of path.getAttribute("d").matchAll(/([MLHVh])([^MLHVh]*)/g)) {
      const numbers = rest.trim().split(/\s+/).map(Number);
      if (command === "H") { points.push([numbers[0], y]); x = numbers[0]; }
      else if (command === "V") { y = numbers[0]; points.push([x, y]); }
      else if (command !== "h") { [x, y] = numbers; points.push([x, y, command === "M"]); }
    }
    const output = figure.querySelector(`.legend li[data-style="${path.dataset.style}"] output`);
    return { points, output };
  });
  return {
    figure, lines, area: figure.querySelector(".area"), cursor: figure.querySelector(".cursor"),
    at: figure.querySelector(".at"), isTime: figure.dataset.axis === "time",
    unit: figure.dataset.unit, x: axis(figure.dataset.x), y: axis(figure.dataset.y),
  };
});
const digits = (v) => (v === 0 ? "0" : Number(v.toPrecision(3)).toLocaleString("en"));
const seconds = (v) =>
  v >= 0.9995 ? digits(v) + " s" : v >= 0.0009995 ? digits(v * 1e3) + " ms" : digits(v * 1e6) + " µs";
const clock = (v) => {
  if (120 > v) return digits(v) + " s";
  const [hours, rest] = [Math.floor(v / 3600), Math.round(v % 3600)];
  const tail = String(rest % 60).padStart(2, "0"), minutes = Math.floor(rest / 60);
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${tail}` : `${minutes}:${tail}`;
};
const write = (unit, v) =>
  unit === "s" ? seconds(v) : unit === "%" ? digits(v * 100) + " %" : digits(v) + unit;
const valueAt = (points, x) => {
  let last = null;
  for (const point of points) {
    if (point[0] > x) {
      if (last === null || point[2]) return null;
      const share = (x - last[0]) / (point[0] - last[0]);
      return last[1] + (point[1] - last[1]) * share;
    }
    last = point;
  }
  return last === null || x - last[0] > 1 ? null : last[1];
};
const show = (chart, share) => {
  for (const each of charts) {
    if (each !== chart ? !(each.isTime ? chart.isTime : false) : false) continue;
    each.cursor.hidden = share === null;
    each.cursor.style.left = `${100 * (share ?? 0)}%`;
    for (const { points, output } of each.lines) {
      const y = share === null ? null : valueAt(points, share * 1000);
      if (output) output.value = y === null ? "" : write(each.unit, each.y(1 - y / 1000));
    }
    const x = share === null ? 0 : each.x(share);
    const place = each.isTime ? clock(x) : write(each.figure.dataset.xUnit, x);
    each.at.value = share === null ? "" : `at ${place}`;
  }
};
for (const chart of charts) {
  let share = null;
  const move = (to) => { share = to === null ? null : Math.min(1, Math.max(0, to)); show(chart, share); };
  chart.area.tabIndex = 0;
  chart.area.addEventListener("pointermove", (event) => {
    const box = chart.area.getBoundingClientRect();
    move((event.clientX - box.left) / box.width);
  });
  chart.area.addEventListener("pointerleave", () => move(null));
  chart.area.addEventListener("blur", () => move(null));
  chart.area.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -0.01, ArrowRight: 0.01 };
    if (event.key === "Escape") move(null);
    else if (event.key in steps) { event.preventDefault(); move((share ?? 0.5) + steps[event.key]); }
  });
}
