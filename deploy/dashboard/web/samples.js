// The last hour as it came, one sample a second, by column.

const LENGTH = 3600;

export class Samples {
  constructor() {
    /** @type {number[]} Unix seconds, ascending */
    this.times = [];
    /** @type {Record<string, (number | null)[]>} */
    this.columns = {};
  }

  /** Take in a page of `/admin/history`. @param {any} page */
  add(page) {
    for (const row of page.rows) {
      const at = row[page.columns.indexOf("at")];
      const last = this.times.at(-1);
      if (last !== undefined && at === last) continue;
      if (last !== undefined && at < last) this.forget();
      page.columns.forEach((name, index) => (this.columns[name] ??= []).push(row[index]));
      this.times.push(at);
    }
    const excess = this.times.length - LENGTH;
    if (excess <= 0) return;
    this.times.splice(0, excess);
    for (const column of Object.values(this.columns)) column.splice(0, excess);
  }

  forget() {
    this.times = [];
    this.columns = {};
  }

  get latest() {
    return this.times.at(-1) ?? null;
  }

  /** Index of the first sample at or after `at`. @param {number} at */
  from(at) {
    let [low, high] = [0, this.times.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.times[middle] < at) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  /** Index of the sample closest to `at`, -1 if there is none. @param {number} at */
  nearest(at) {
    const after = this.from(at);
    if (after === 0) return this.times.length > 0 ? 0 : -1;
    if (after === this.times.length) return after - 1;
    return at - this.times[after - 1] < this.times[after] - at ? after - 1 : after;
  }

  /** One value. @param {string} name @param {number} index */
  value(name, index) {
    return this.columns[name]?.[index] ?? null;
  }
}
