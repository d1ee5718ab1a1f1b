// The server as it is now: tails by class against their targets, and how full it is.

import { metrics } from "./api.js";
import { between, histogram, mean, parse, quantile, total } from "./metrics.js";

const EVERY_MS = 1000;
const WINDOW_S = 60;
const KEPT = 300;
const SHARES = [["p50", 0.5], ["p95", 0.95], ["p99", 0.99], ["p999", 0.999]];
const LATENCIES = [
  ["First token", "time_to_first_token_seconds", "slo_ttft_target_seconds"],
  ["Per token", "request_time_per_output_token_seconds", "slo_tpot_target_seconds"],
];
const short = new Intl.NumberFormat("en", { notation: "compact" });
const dark = matchMedia("(prefers-color-scheme: dark)");

const history = []; // {at, samples}, of the last minute
const plots = new Map(); // title to {chart, data, values}
let on = false;
let timer = null;

export function setLive(wanted) {
  on = wanted;
  restart();
}

document.addEventListener("visibilitychange", restart);

function restart() {
  clearTimeout(timer);
  if (on && !document.hidden) poll();
}

async function poll() {
  clearTimeout(timer);
  try {
    take(parse(await metrics()));
  } catch (error) {
    say(`No figures: ${error.message}`);
  }
  if (on && !document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function take(samples) {
  const now = Date.now() / 1000;
  history.push({ at: now, samples });
  while (history[0].at < now - WINDOW_S) history.shift();
  const names = [...new Set((samples.get("tailserve_slo_ttft_target_seconds") ?? []).map(({ labels }) => labels.slo_class))];
  definePlots(names);
  table(names);
  for (const plot of plots.values()) extend(plot);
  const instances = samples.get("tailserve_kv_cache_usage_perc")?.length ?? 0;
  say(`${instances} instance${instances === 1 ? "" : "s"}, ${names.length} classes`);
}

// A screen reader says it again when it is written again.
function say(text) {
  const state = document.getElementById("live-state");
  if (state.textContent !== text) state.textContent = text;
}

function inWindow(name, sloClass) {
  return between(histogram(history[0].samples, name, sloClass), histogram(history.at(-1).samples, name, sloClass));
}

// Growth between two moments; an instance that came or went meanwhile is no growth below 0.
function grown(name, before) {
  return Math.max(total(history.at(-1).samples, name) - total(before.samples, name), 0);
}

function rate(name) {
  const before = history.at(-2);
  return before ? grown(name, before) / (history.at(-1).at - before.at) : null;
}

function accepted() {
  const drafted = grown("spec_decode_num_draft_tokens_total", history[0]);
  return drafted ? (100 * grown("spec_decode_num_accepted_tokens_total", history[0])) / drafted : null;
}

function target(name, sloClass) {
  const found = (history.at(-1).samples.get(`tailserve_${name}`) ?? []).find(({ labels }) => labels.slo_class === sloClass);
  return found?.value ?? null;
}

function table(names) {
  const body = document.querySelector("#tails tbody");
  body.replaceChildren(
    ...names.flatMap((name) =>
      LATENCIES.map(([label, metric, wanted]) => {
        const row = document.createElement("tr");
        const counts = inWindow(metric, name);
        const limit = target(wanted, name);
        const cells = [name, label, ...SHARES.map(([, share]) => quantile(counts, share)), limit];
        cells.forEach((value, place) => {
          const cell = document.createElement(place ? "td" : "th");
          if (!place) cell.scope = "row";
          cell.textContent = typeof value === "string" ? value : milliseconds(value);
          if (place > 1 && place < cells.length - 1 && value !== null && limit !== null && value > limit) {
            cell.className = "over";
            cell.append(unseen(", above the target"));
          }
          row.append(cell);
        });
        return row;
      }),
    ),
  );
}

function unseen(text) {
  const span = document.createElement("span");
  span.className = "unseen";
  span.textContent = text;
  return span;
}

function milliseconds(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${(1000 * seconds).toFixed(seconds < 0.1 ? 1 : 0)} ms` : `${seconds.toFixed(2)} s`;
}

function definePlots(names) {
  for (const name of names) {
    for (const [label, metric, wanted] of LATENCIES) {
      const lines = SHARES.map(([share, value]) => [share, () => scaled(quantile(inWindow(metric, name), value))]);
      plot(`${label}, ${name} (ms)`, [...lines, ["target", () => scaled(target(wanted, name))]], true);
    }
  }
  plot("Sequences", [
    ["running", () => total(history.at(-1).samples, "num_requests_running")],
    ["waiting", () => total(history.at(-1).samples, "num_requests_waiting")],
  ]);
  plot("Tokens a second", [["tokens/s", () => rate("generation_tokens_total")]]);
  plot("KV blocks in use (%)", [["in use", () => 100 * mean(history.at(-1).samples, "kv_cache_usage_perc")]]);
  plot("Draft tokens accepted (%)", [["accepted", accepted]]);
}

function scaled(seconds) {
  return seconds === null ? null : 1000 * seconds;
}

function plot(title, lines, latency = false) {
  if (plots.has(title)) return;
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(caption);
  document.getElementById("plots").append(figure);
  const text = getComputedStyle(document.body).color;
  const grid = getComputedStyle(document.querySelector("header")).borderBottomColor;
  const colors = dark.matches ? ["#7cbcf8", "#9be37f", "#f7c65b", "#ff9a92", "#a4adb6"] : ["#0a5ba8", "#2b7a0b", "#8a5a00", "#a3161b", "#565e66"];
  const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 } };
  const series = lines.map(([label], place) => ({
    label,
    stroke: colors[place],
    width: 2,
    spanGaps: true,
    points: { show: false },
    dash: label === "target" ? [6, 4] : undefined,
    value: (_, value) => (value === null || value === undefined ? "–" : value.toFixed(1)),
  }));
  const data = [[], ...lines.map(() => [])];
  const chart = new uPlot(
    {
      width: figure.clientWidth,
      height: 180,
      series: [{ label: "time" }, ...series],
      // On a logarithmic scale ticks that have no room come as null.
      axes: [axis, { ...axis, size: 60, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short.format(tick))) }],
      // A target and what is far below it are both to be seen.
      scales: { y: latency ? { distr: 3 } : { range: (_, least, most) => [0, Math.max(most ?? 0, 1) * 1.1] } },
      legend: { live: true },
      cursor: { drag: { x: false, y: false } },
    },
    data,
    figure,
  );
  // The last values are in the legend, as text.
  chart.root.querySelector("canvas").setAttribute("role", "img");
  chart.root.querySelector("canvas").setAttribute("aria-label", title);
  new ResizeObserver(() => chart.setSize({ width: figure.clientWidth, height: 180 })).observe(figure);
  plots.set(title, { chart, data, values: lines.map(([, value]) => value) });
}

function extend({ chart, data, values }) {
  data[0].push(history.at(-1).at);
  values.forEach((value, place) => data[place + 1].push(value()));
  if (data[0].length > KEPT) data.forEach((line) => line.shift());
  chart.setData(data);
  if (chart.cursor.idx == null) chart.setLegend({ idx: data[0].length - 1 });
}
