// The recorded group of a training step: its tree, and the values of its images.

import {apiPath, imageUrl} from "view/api.js";
import {deviation, mean} from "view/format.js";

const ROOT = -1;

/** The tree of one prompt, from the columns of `tree` in a recorded step.
 *
 * `leaves` are the rows with an image, `children` the rows below every row, `above` the credited rows
 * on the way from a leaf to the root, and `credit` the leaves that every credited row is credited for.
 */
export function readTree({tree, num_steps}) {
  const children = tree.parent.map(() => []);
  tree.parent.forEach((parent, row) => parent !== ROOT && children[parent].push(row));
  const trained = new Set(tree.edges);
  const channels = new Map(tree.leaves.map((leaf) => [leaf, []]));
  tree.image.forEach((row, i) => channels.get(row)?.push(tree.channel[i]));
  const perState = tree.channel.includes(num_steps); // channel k: completions of states at grid index k
  const credit = new Map(tree.edges.map((edge) => [edge, []]));
  const above = new Map();
  for (const leaf of tree.leaves) {
    const found = [];
    for (let row = leaf; row !== ROOT; row = tree.parent[row]) {
      const counts = !perState || channels.get(leaf).includes(tree.grid_index[row]);
      if (trained.has(row) && counts) found.push(row);
    }
    above.set(leaf, found);
    for (const edge of found) credit.get(edge).push(leaf);
  }
  const severalChannels = new Set(tree.channel).size > 1;
  const onImages = tree.edges.every((edge) => channels.has(edge) && !tree.stochastic[edge]);
  return {...tree, num_steps, children, channels, credit, above, severalChannels, perState, onImages};
}

/** Comparison groups: credited rows of the same grid step. Steps with the same images are one group.
 *
 * Each group has `steps`, its grid indices, and `leaves`, a set of rows.
 */
export function comparisonGroups(tree) {
  const bySteps = new Map();
  for (const edge of tree.edges) {
    const from = tree.parent[edge] === ROOT ? 0 : tree.grid_index[tree.parent[edge]];
    if (!bySteps.has(from)) bySteps.set(from, new Set());
    for (const leaf of tree.credit.get(edge)) bySteps.get(from).add(leaf);
  }
  const groups = new Map();
  for (const step of [...bySteps.keys()].sort((a, b) => a - b)) {
    const leaves = bySteps.get(step);
    const key = [...leaves].sort((a, b) => a - b).join();
    if (groups.has(key)) groups.get(key).steps.push(step);
    else groups.set(key, {key: String(step), steps: [step], leaves});
  }
  return [...groups.values()];
}

/** The steps of a comparison group in words. */
export function groupTitle({steps}) {
  const [first, last] = [steps[0], steps.at(-1)];
  if (first === last) return `Step ${first}`;
  return steps.length === last - first + 1 ? `Steps ${first} to ${last}` : `Steps ${steps.join(", ")}`;
}

/** The images of a prompt with their values.
 *
 * An image has `row`, `place`, `rewards`, `total` (the weighted sum), `monitors`, `advantage` (the mean over
 * `edges`, its credited steps; null without any), `failed`, and addresses of its thumbnail and full size.
 */
export function promptImages(record, tree, run, number) {
  const prompt = record.prompts[number];
  const advantage = new Map(tree.edges.map((edge, i) => [edge, prompt.advantage?.[i] ?? null]));
  const weights = record.reward_weights ?? {};
  const full = new Set(prompt.full ?? []);
  const base = apiPath("runs", run, "groups", record.step, number);
  const at = (columns, place) =>
    Object.fromEntries(Object.entries(columns ?? {}).map(([name, values]) => [name, values[place]]));
  return tree.leaves.map((row, place) => {
    const rewards = at(prompt.rewards, place);
    const failed = Object.values(rewards).some((value) => value === null);
    const edges = tree.above.get(row).map((edge) => ({edge, advantage: advantage.get(edge)}));
    const source = prompt.recorded ? `${base}/${place}.webp` : null;
    return {
      key: `${number}-${place}`, prompt: number, text: prompt.text, row, place, rewards, failed, edges,
      channels: tree.channels.get(row),
      monitors: at(prompt.monitors, place),
      total: failed ? null : Object.entries(rewards).reduce((sum, [name, v]) => sum + (weights[name] ?? 1) * v, 0),
      advantage: mean(edges.map((edge) => edge.advantage)),
      src: source && imageUrl(source),
      full: source && imageUrl(full.has(place) ? `${source}?full=1` : source),
      alt: `Image ${place} of “${prompt.text}”`,
    };
  });
}

/** Mean, deviation and failures of the rewards of a prompt. `zero`: all images have the same reward. */
export function promptSummary(images) {
  const totals = images.map((image) => image.total);
  const std = deviation(totals);
  return {
    mean: mean(totals), std,
    failed: images.filter((image) => image.failed).length,
    zero: std !== null && std < 1e-8,
  };
}

/** Images whose reward is one deviation above the mean of their prompt while the monitor is one below. */
export function rewardUpMonitorDown(images, monitor) {
  const limits = new Map();
  for (const number of new Set(images.map((image) => image.prompt))) {
    const own = images.filter((image) => image.prompt === number);
    const side = (values, sign) => mean(values) + sign * deviation(values);
    limits.set(number, {
      reward: side(own.map((image) => image.total), 1),
      monitor: side(own.map((image) => image.monitors[monitor]), -1),
    });
  }
  return images.filter((image) => {
    const limit = limits.get(image.prompt);
    const value = image.monitors[monitor];
    return Number.isFinite(value) && image.total !== null && image.total >= limit.reward && value <= limit.monitor;
  });
}
