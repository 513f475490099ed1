// Group: the images of a prompt at a training step, with every reward and the advantage.

import {html, useMemo, useState} from "preact";
import {number, signed} from "view/format.js";
import {Lightbox, VirtualGrid} from "view/grid.js";
import {Keys} from "view/keyboard.js";
import {comparisonGroups, groupTitle, promptImages, promptSummary, readTree, rewardUpMonitorDown} from "view/records.js";
import {RecordedPage, useRecordedStep} from "view/recorded.js";
import {link, setQuery} from "view/router.js";
import {advantageStyle, Field, Picture, Select} from "view/ui.js";

const CELL = 150;
const LINE = 18;
const SHOWN = [
  ["all", "All images"],
  ["highest", "Highest advantage"],
  ["lowest", "Lowest advantage"],
  ["failed", "Failed rewards"],
  ["gamed", "Reward up, monitor down"],
];
const PROMPTS = [["all", "All prompts"], ["recorded", "With images"], ["zero", "Zero variance"], ["failed", "Failed rewards"]];

export function Group() {
  const state = useRecordedStep("group");
  const {record, run, prompt, query, open} = state;
  const keys = html`<${Keys} of=${[["[ ]", "previous and next step"], ["← → ↑ ↓", "between images"], ["Enter", "enlarge"]]} />`;
  return html`<${RecordedPage} state=${state} keepQuery keys=${keys} what="group">
    <${Prompts} record=${record.data} run=${run} chosen=${prompt} query=${query} open=${open} />
  </${RecordedPage}>`;
}

/** The list of prompts, and the images of the chosen one. */
function Prompts({record, run, chosen, query, open}) {
  const {tree, images, summaries} = useMemo(() => {
    const tree = readTree(record);
    const images = record.prompts.map((_, i) => promptImages(record, tree, run, i));
    return {tree, images, summaries: images.map(promptSummary)};
  }, [record, run]);
  const [filter, setFilter] = useState("all");
  const keep = {all: () => true, recorded: (p) => p.recorded, zero: (_, s) => s.zero, failed: (_, s) => s.failed};
  const listed = record.prompts.map((_, i) => i).filter((i) => keep[filter](record.prompts[i], summaries[i]));
  const all = chosen === "all";
  const numbers = all ? listed.filter((i) => record.prompts[i].recorded) : [Math.min(Number(chosen) || 0, images.length - 1)];
  const shown = useMemo(() => numbers.flatMap((i) => images[i]), [images, numbers.join()]);
  return html`<div class="columns">
    <aside class="card prompts">
      <${Select} label="Prompts" value=${filter} options=${PROMPTS} onChange=${setFilter} />
      <ul>
        <li><button type="button" class="prompt" aria-pressed=${all} onClick=${() => open({prompt: "all"})}>All recorded prompts</button></li>
        ${listed.map((i) => html`<li key=${i}><${PromptButton}
          prompt=${record.prompts[i]} summary=${summaries[i]} on=${!all && numbers[0] === i} onClick=${() => open({prompt: i})}
        /></li>`)}
      </ul>
      ${!listed.length && html`<p class="faint">No prompt of this step.</p>`}
    </aside>
    <${Images} record=${record} run=${run} tree=${tree} images=${shown} query=${query}
      title=${all ? `${numbers.length} recorded prompts` : record.prompts[numbers[0]].text} prompt=${all ? null : numbers[0]} />
  </div>`;
}

const PromptButton = ({prompt, summary, on, onClick}) => html`<button type="button" class="prompt" aria-pressed=${on} onClick=${onClick}>
  <span class="text">${prompt.text}</span>
  <span class="faint numbers">
    reward ${number(summary.mean, 3)} ± ${number(summary.std, 3)}
    ${summary.zero && html` <span class="badge">zero variance</span>`}
    ${summary.failed > 0 && html` <span class="badge alarm">${summary.failed} failed</span>`}
    ${prompt.recorded && html` <span class="badge quiet">images</span>`}
  </span>
</button>`;

/** The grid of images with its filters. */
function Images({record, run, tree, images, query, title, prompt}) {
  const [opened, setOpened] = useState(null);
  const monitors = Object.keys(record.prompts[0].monitors ?? {});
  const groups = useMemo(() => comparisonGroups(tree), [tree]);
  const {sort = "advantage", show = "all", monitor = monitors[0], group = "all"} = query;
  const withMonitors = (query.monitors ?? (monitors.length <= 2 ? "on" : "off")) === "on";
  const items = useMemo(
    () => select(images, {sort, show, monitor, leaves: groups.find((g) => g.key === group)?.leaves}),
    [images, sort, show, monitor, group, groups],
  );
  const largest = Math.max(...images.slice(0, 20000).map((image) => Math.abs(image.advantage ?? 0)), 1e-9);
  const values = (image) => [...Object.entries(image.rewards), ...(withMonitors ? Object.entries(image.monitors) : [])];
  const lines = 1 + record.rewards.length + (withMonitors ? monitors.length : 0);
  const [height, width] = record.image_size ?? [1, 1];
  const sorts = [
    ["advantage", "Advantage"], ["-advantage", "Advantage, lowest first"], ["total", "Total reward"], ["place", "Order in the tree"],
    ...[...record.rewards, ...monitors].map((name) => [name, name]),
  ];
  return html`<div class="main">
    <h1 class="prompt-title">${title}</h1>
    <div class="controls">
      <${Select} label="Sort by" value=${sort} options=${sorts} onChange=${(v) => setQuery({sort: v})} />
      <${Select} label="Show" value=${show} options=${monitors.length ? SHOWN : SHOWN.slice(0, -1)} onChange=${(v) => setQuery({show: v})} />
      ${show === "gamed" && html`<${Select} label="Monitor" value=${monitor} options=${monitors} onChange=${(v) => setQuery({monitor: v})} />`}
      ${groups.length > 1 && html`<${Select} label="Compared at" value=${group} onChange=${(v) => setQuery({group: v})}
        options=${[["all", "All grid steps"], ...groups.map((g) => [g.key, groupTitle(g)])]} />`}
      ${monitors.length > 0 && html`<${Field} label="Monitors"><input type="checkbox" checked=${withMonitors}
        onChange=${(event) => setQuery({monitors: event.target.checked ? "on" : "off"})} /></${Field}>`}
      ${prompt !== null && html`<a class="button end" href=${link("tree", [run, record.step, prompt])}>Show the tree</a>`}
    </div>
    <p class="faint" role="status">${items.length} of ${images.length} images. ${explain(show, monitor)}</p>
    <${VirtualGrid} label="Images" items=${items} cellWidth=${CELL} aspect=${height / width} text=${lines * LINE + 14}
      render=${(image, i) => html`<${Card} image=${image} values=${values(image)} largest=${largest} tree=${tree} onOpen=${() => setOpened(i)} />`} />
    ${opened !== null && items[opened] && html`<${Lightbox} items=${items} index=${opened} onMove=${setOpened}
      onClose=${() => setOpened(null)} describe=${(image) => html`<${Description} image=${image} run=${run} step=${record.step} tree=${tree} />`} />`}
  </div>`;
}

function explain(show, monitor) {
  if (show === "gamed") return `The reward is one standard deviation above the mean of its prompt, and ${monitor} is one below.`;
  return {highest: "The highest tenth, at least 4.", lowest: "The lowest tenth, at least 4."}[show] ?? "";
}

/** The images to show, in their order. */
export function select(images, {sort, show, monitor, leaves}) {
  const falling = (of) => (a, b) => (of(b) ?? -Infinity) - (of(a) ?? -Infinity) || a.prompt - b.prompt || a.place - b.place;
  const orders = {
    advantage: falling((image) => image.advantage),
    "-advantage": falling((image) => (image.advantage === null ? null : -image.advantage)),
    total: falling((image) => image.total),
    place: (a, b) => a.prompt - b.prompt || a.place - b.place,
  };
  const order = orders[sort] ?? falling((image) => image.rewards[sort] ?? image.monitors[sort]);
  let chosen = leaves ? images.filter((image) => leaves.has(image.row)) : images;
  const tenth = Math.max(4, Math.ceil(chosen.length / 10));
  const credited = () => chosen.filter((image) => image.advantage !== null);
  if (show === "highest") chosen = credited().sort(orders.advantage).slice(0, tenth);
  if (show === "lowest") chosen = credited().sort(orders["-advantage"]).slice(0, tenth);
  if (show === "failed") chosen = chosen.filter((image) => image.failed);
  if (show === "gamed") chosen = rewardUpMonitorDown(chosen, monitor);
  return [...chosen].sort(order);
}

const Card = ({image, values, largest, tree, onOpen}) => html`<figure class="shot" style=${advantageStyle(image.advantage, largest)}>
  <button type="button" class="zoom" onClick=${onOpen} aria-label=${`Enlarge image ${image.place}`}><${Picture} src=${image.src} alt=${image.alt} eager /></button>
  <figcaption>
    <span class="value tone"><span>${image.advantage === null ? "no credit" : "advantage"}</span><b>${image.advantage === null ? "" : signed(image.advantage)}</b></span>
    ${values.map(([name, value]) => html`<span class="value" key=${name}><span>${name}</span><b class=${value === null ? "bad" : ""}>${value === null ? "failed" : number(value)}</b></span>`)}
  </figcaption>
</figure>`;

/** All values of an image, below its enlarged view. */
function Description({image, run, step, tree}) {
  return html`<div>
    <h2>${image.text}</h2>
    <dl class="facts">
      ${image.advantage !== null && html`<dt>advantage</dt><dd>${signed(image.advantage)}</dd>`}
      ${Object.entries({...image.rewards, ...image.monitors}).map(([name, value]) => html`<dt key=${name}>${name}</dt><dd>${value === null ? "failed" : number(value)}</dd>`)}
      <dt>place</dt><dd>${image.place}</dd>
      ${tree.severalChannels && html`<dt>channel</dt><dd>${image.channels.join(", ")}</dd>`}
    </dl>
    ${image.edges.length > 1 && html`<p class="faint">The advantage is the mean over ${image.edges.length} credited steps.</p>`}
    <a href=${link("tree", [run, step, image.prompt], {row: image.row})}>Show in the tree</a>
  </div>`;
}
