// What /metrics says: its text, and quantiles of its histograms.

const LINE = /^(\w+)(?:\{(.*)\})? ([^ ]+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Samples by name: [{labels, value}]. */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = line[0] === "#" ? null : LINE.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(LABEL)].map(([, key, value]) => [key, value]));
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: Number(match[3]) });
  }
  return found;
}

/** The sum of a metric over all instances, of one class if it is named. */
export function total(samples, name, sloClass) {
  const all = samples.get(`tailserve_${name}`) ?? [];
  return all
    .filter(({ labels }) => sloClass === undefined || labels.slo_class === sloClass)
    .reduce((sum, { value }) => sum + value, 0);
}

/** The mean over all instances. */
export function mean(samples, name) {
  const count = samples.get(`tailserve_${name}`)?.length ?? 0;
  return count ? total(samples, name) / count : 0;
}

/** A histogram's cumulative counts by upper bound, over all instances. */
export function histogram(samples, name, sloClass) {
  const counts = new Map();
  for (const { labels, value } of samples.get(`tailserve_${name}_bucket`) ?? []) {
    if (labels.slo_class !== sloClass) continue;
    const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
    counts.set(bound, (counts.get(bound) ?? 0) + value);
  }
  return counts;
}

/** What was added between two states of a histogram. */
export function between(before, after) {
  return new Map([...after].map(([bound, count]) => [bound, Math.max(count - (before?.get(bound) ?? 0), 0)]));
}

/** As PromQL's histogram_quantile: linear within a bucket. null of nothing. */
export function quantile(counts, share) {
  const bounds = [...counts.keys()].sort((a, b) => a - b);
  const all = counts.get(Infinity) ?? 0;
  if (!all) return null;
  let below = 0;
  let before = 0;
  for (const bound of bounds) {
    const count = counts.get(bound);
    if (count >= share * all) {
      if (bound === Infinity) return below;
      return below + ((bound - below) * (share * all - before)) / Math.max(count - before, 1e-9);
    }
    below = bound;
    before = count;
  }
  return below;
}
