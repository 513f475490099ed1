// Lines of the curves: smoothing, alarms, and runs that differ only in their seed.

import {mean} from "view/format.js";

const SMOOTHED = 20;
export const COLORS = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];

const SECTIONS = [
  ["Rewards", /^(reward\/|eval\/(?!monitor\/)[^/]+$)/],
  ["Monitors", /^(eval\/)?monitor\//],
  ["Policy", /^(ratio|clip_fraction|kl|grad_norm|loss)/],
  ["Advantages and failures", /^(advantage|failed)\//],
  ["Parts of the evaluation", /^eval\/[^/]+\//],
  ["Cost", /^(seconds|.*forward_passes$|decodes|memory)/],
  ["Other", /./],
];
export const OPEN_SECTIONS = ["Rewards", "Monitors", "Policy"];

/** Metric names by section: `[[title, names], ...]`, without empty sections. */
export function sections(keys) {
  const left = new Set(keys.filter((key) => key !== "step"));
  return SECTIONS.map(([title, pattern]) => {
    const names = [...left].filter((key) => pattern.test(key)).sort();
    names.forEach((name) => left.delete(name));
    return [title, names];
  }).filter(([, names]) => names.length);
}

/** Lists of runs that differ only in their seed. Without `combine`, every run is on its own. */
export function seedGroups(runs, combine) {
  const groups = new Map();
  for (const run of runs) {
    const name = String(run.name).replace(/[-_+ ]?(seed)?[-_=]?\d+$/, "");
    const key = combine ? JSON.stringify([name, run.method, run.model, run.rewards]) : run.id;
    const group = groups.get(key) ?? [];
    const repeated = group.some((other) => other.seed === run.seed);
    if (repeated) groups.set(run.id, [run]);
    else groups.set(key, [...group, run]);
  }
  return [...groups.values()];
}

/** The label of a group of runs. */
export const groupLabel = (group) =>
  group.length === 1 ? group[0].id : `${group[0].id.replace(/[^/]*$/, "")}${group[0].name}, ${group.length} seeds`;

/** The line of a metric for a run: `{x, y, raw, steps}`, or null without values.
 *
 * Fewer than 20 values, such as those of evaluations, are not smoothed.
 */
function runLine(metrics, key, axis, smoothing) {
  const column = metrics?.columns?.[key];
  if (!column) return null;
  const rows = column.flatMap((value, i) => (Number.isFinite(value) && metrics[axis][i] !== null ? [i] : []));
  if (!rows.length) return null;
  const values = rows.map((i) => column[i]);
  const line = {x: rows.map((i) => metrics[axis][i]), y: values, steps: rows.map((i) => metrics.step[i])};
  return smoothing > 0 && values.length >= SMOOTHED ? {...line, y: smooth(values, smoothing), raw: values} : line;
}

/** Exponential mean without the bias of its start. */
function smooth(values, weight) {
  let [sum, total] = [0, 0];
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + 1 - weight;
    return sum / total;
  });
}

/** The line of a group of runs: one run, or the mean of its seeds with a band from lowest to highest. */
export function groupLine(group, metrics, key, {axis, smoothing}) {
  const lines = group.flatMap((run) => {
    const line = runLine(metrics[run.id], key, axis, smoothing);
    return line ? [{...line, run: run.id}] : [];
  });
  if (lines.length < 2) return lines[0] ? {...lines[0], runs: lines} : null;
  const [start, end] = [Math.max(...lines.map((line) => line.x[0])), Math.min(...lines.map((line) => line.x.at(-1)))];
  const x = [...new Set(lines.flatMap((line) => line.x))].filter((v) => v >= start && v <= end).sort((a, b) => a - b);
  const values = lines.map((line) => x.map((v) => interpolate(line, v)));
  const at = (i) => values.map((column) => column[i]);
  return {
    x, runs: lines,
    y: x.map((_, i) => mean(at(i))),
    low: x.map((_, i) => Math.min(...at(i))),
    high: x.map((_, i) => Math.max(...at(i))),
  };
}

function interpolate({x, y}, at) {
  let [low, high] = [0, x.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle;
    else high = middle;
  }
  if (x[high] === x[low] || at <= x[low]) return y[low];
  return y[low] + ((y[high] - y[low]) * (at - x[low])) / (x[high] - x[low]);
}

/** The training step of a run at a place of the x-axis. */
export function stepAt(line, x) {
  let best = 0;
  line.x.forEach((value, i) => {
    if (Math.abs(value - x) < Math.abs(line.x[best] - x)) best = i;
  });
  return line.steps[best];
}

/** Markers of the alarms of a run at a chart: alarms of its monitor, and all alarms at rewards. */
export function alarmMarkers(details, metrics, key, axis) {
  const monitor = /^(?:eval\/)?monitor\/(.+)$/.exec(key)?.[1];
  if (!monitor && !/^(reward|eval)\//.test(key)) return [];
  return details.flatMap((detail) => {
    const table = metrics[detail.id];
    if (!table) return [];
    return (detail.alarms ?? [])
      .filter((alarm) => !monitor || alarm.monitor === monitor)
      .map((alarm) => {
        const row = table.step.findIndex((step) => step >= alarm.step);
        return {x: table[axis][row < 0 ? table.step.length - 1 : row], label: `${alarm.monitor}, step ${alarm.step} (${detail.id})`};
      });
  });
}
