// Tree: the rollout of a prompt. Stochastic and deterministic steps, their advantages and images.

import {html, useEffect, useMemo, useState} from "preact";
import {number, signed} from "view/format.js";
import {Lightbox} from "view/grid.js";
import {Keys} from "view/keyboard.js";
import {promptImages, readTree} from "view/records.js";
import {RecordedPage, useRecordedStep} from "view/recorded.js";
import {link, setQuery} from "view/router.js";
import {edgePath, layout, THUMBNAIL} from "view/tree_layout.js";
import {advantageStyle, Field, Picture, Select} from "view/ui.js";
import {usePanZoom} from "view/zoom.js";

const MARGIN = 30;
const MANY = 120;

export function Tree() {
  const state = useRecordedStep("tree");
  const {record, run, query, open} = state;
  const prompts = record.data?.prompts ?? [];
  const prompt = Math.min(Number(state.prompt) || 0, Math.max(0, prompts.length - 1));
  const options = prompts.map((p, i) => [i, p.recorded ? p.text : `${p.text} (numbers only)`]);
  const more = prompts.length > 0 && html`<${Select} label="Prompt" wide value=${prompt} options=${options}
    onChange=${(to) => open({prompt: to})} />`;
  const keys = html`<${Keys} of=${[["← → ↑ ↓", "walk through the tree"], ["Enter", "open the image"], ["Space", "fold a branch"], ["+ − 0", "zoom"], ["[ ]", "previous and next step"]]} />`;
  return html`<${RecordedPage} state=${state} more=${more} keys=${keys} what="tree">
    <${Drawing} record=${record.data} run=${run} prompt=${prompt} query=${query} />
  </${RecordedPage}>`;
}

function Drawing({record, run, prompt, query}) {
  const tree = useMemo(() => readTree(record), [record]);
  const images = useMemo(() => promptImages(record, tree, run, prompt), [record, tree, run, prompt]);
  const byRow = useMemo(() => new Map(images.map((image) => [image.row, image])), [images]);
  const advantage = useMemo(
    () => new Map(tree.edges.map((edge, i) => [edge, record.prompts[prompt].advantage?.[i] ?? null])),
    [tree, record, prompt],
  );
  const chains = (query.chains ?? "on") === "on";
  const [folded, setFolded] = useState(new Set());
  useEffect(() => setFolded(new Set()), [tree]);
  const drawn = useMemo(() => layout(tree, advantage, {folded, chains}), [tree, advantage, folded, chains]);
  const row = query.row === undefined ? null : Number(query.row);
  const chosen = drawn.byRow.get(row) ?? null;
  const [opened, setOpened] = useState(null);
  const largest = Math.max(1e-9, ...[...advantage.values()].map((value) => Math.abs(value ?? 0)));
  const zoom = usePanZoom({width: drawn.width + THUMBNAIL + 110, height: drawn.height, margin: MARGIN, middle: drawn.nodes[0].y});
  const choose = (node) => {
    setQuery({row: node.row});
    zoom.show(node.x, node.y);
  };
  const fold = (node) => {
    if (!tree.children[node.row].length) return;
    const next = new Set(folded);
    if (!next.delete(node.row)) next.add(node.row);
    setFolded(next);
  };
  const openImage = (node) => byRow.has(node.row) && setOpened(images.indexOf(byRow.get(node.row)));
  const keys = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = {"+": zoom.in, "=": zoom.in, "-": zoom.out, 0: zoom.fit}[event.key];
    const to = step(drawn, chosen, event.key);
    if (action) action();
    else if (to) choose(to);
    else if (event.key === "Enter" && chosen) openImage(chosen);
    else if (event.key === " " && chosen) fold(chosen);
    else return;
    event.preventDefault();
  };
  return html`<div class="columns tree-page">
    <div class="main card flush">
      <div class="row tools">
        <button type="button" onClick=${zoom.out} aria-label="Zoom out">−</button>
        <button type="button" onClick=${zoom.in} aria-label="Zoom in">+</button>
        <button type="button" onClick=${zoom.fit}>Fit</button>
        <${Field} label="Join chains"><input type="checkbox" checked=${chains}
          onChange=${(event) => setQuery({chains: event.target.checked ? "on" : "off"})} /></${Field}>
        <${Legend} tree=${tree} />
      </div>
      <div class="canvas" tabindex="0" role="group" aria-label="Tree. Walk through it with the arrow keys." ref=${zoom.ref} onKeyDown=${keys}>
        <svg width="100%" height="100%">
          <g transform=${zoom.transform}>
            <${Edges} edges=${drawn.edges} area=${zoom.area} largest=${largest} scale=${zoom.scale} />
            <${Nodes} nodes=${drawn.nodes} area=${zoom.area} largest=${largest} byRow=${byRow} tree=${tree} chosen=${row} rewards=${record.rewards}
              onClick=${(node) => !zoom.dragged() && (chosen === node ? openImage(node) : choose(node))} />
          </g>
        </svg>
        <${Axis} drawn=${drawn} zoom=${zoom} steps=${record.num_steps} />
      </div>
    </div>
    <aside class="card details" aria-live="polite">
      <${Details} node=${chosen} record=${record} tree=${tree} advantage=${advantage} byRow=${byRow} images=${images} folded=${folded} onFold=${fold}
        onOpen=${(image) => setOpened(images.indexOf(image))} />
      <p><a class="button" href=${link("group", [run, record.step, prompt])}>Show the group</a></p>
    </aside>
    ${opened !== null && html`<${Lightbox} items=${images} index=${opened} onMove=${setOpened} onClose=${() => setOpened(null)}
      describe=${(image) => html`<${ImageFacts} image=${image} tree=${tree} />`} />`}
  </div>`;
}

/** The node that an arrow key leads to. */
function step(drawn, chosen, key) {
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(key)) return null;
  if (!chosen) return drawn.nodes[0];
  if (key === "ArrowLeft") return chosen.above ?? null;
  if (key === "ArrowRight") return drawn.nodes.find((node) => node.above === chosen) ?? null;
  const column = drawn.nodes.filter((node) => node.x === chosen.x).sort((a, b) => a.y - b.y);
  return column[column.indexOf(chosen) + (key === "ArrowDown" ? 1 : -1)] ?? null;
}

const Legend = ({tree}) => html`<span class="legend">
  <svg width="34" height="10" aria-hidden="true"><path class="edge stochastic" d="M1 5H33" /></svg> stochastic step
  <svg width="34" height="10" aria-hidden="true"><path class="edge ode" d="M1 5H33" /></svg> ODE step
  <span class="scale" aria-hidden="true"></span> advantage ${tree.onImages ? "of an image" : "of a step"}: low to high
</span>`;

function Edges({edges, area, largest, scale}) {
  const inside = edges.filter(({from, to}) => Math.max(from.y, to.y) >= area.top && Math.min(from.y, to.y) <= area.bottom);
  return inside.map(
    (edge) => html`<g key=${edge.to.row}>
      <path class="edge ${edge.stochastic ? "stochastic" : "ode"} ${edge.credited ? "credited" : ""}" d=${edgePath(edge)}
        style=${edge.credited ? advantageStyle(edge.advantage, largest) : {}} />
      ${edge.steps > 1 && scale > 0.45 && html`<text class="chain" x=${edge.to.x - 16} y=${edge.to.y - 6}>${edge.steps} steps</text>`}
    </g>`,
  );
}

function Nodes({nodes, area, largest, byRow, tree, chosen, rewards, onClick}) {
  const inside = nodes.filter((node) => node.y >= area.top && node.y <= area.bottom);
  return inside.map((node) => {
    const image = byRow.get(node.row);
    const name = node.row === chosen ? "node chosen" : "node";
    if (!image) {
      return html`<g key=${node.row} class=${name} transform="translate(${node.x} ${node.y})" onClick=${() => onClick(node)}>
        <circle class="hit" r="13" />
        <circle class=${node.folded ? "dot folded" : "dot"} r=${node.folded ? 8 : 4} />
        ${node.folded && html`<text class="plus" y="3.5">+</text>`}
      </g>`;
    }
    const half = THUMBNAIL / 2;
    const value = image.failed ? "failed" : number(image.total, 3);
    return html`<g key=${node.row} class="${name} leaf" transform="translate(${node.x} ${node.y})" onClick=${() => onClick(node)}
      style=${advantageStyle(image.advantage, largest)}>
      <title>${rewards.map((reward) => `${reward} ${number(image.rewards[reward])}`).join("\n")}</title>
      <rect class="frame" x="6" y=${-half - 1} width=${THUMBNAIL + 2} height=${THUMBNAIL + 2} rx="3" />
      ${image.src && html`<image class="pixels" href=${image.src} x="7" y=${-half} width=${THUMBNAIL} height=${THUMBNAIL} />`}
      <text class="value ${image.failed ? "bad" : ""}" x=${THUMBNAIL + 14} y=${tree.severalChannels ? -2 : 4}>${value}</text>
      ${tree.severalChannels && html`<text class="channel c${image.channels[0] % 3}" x=${THUMBNAIL + 14} y="13">${channelName(tree)} ${image.channels.join(", ")}</text>`}
    </g>`;
  });
}

/** A channel is a granularity, or the state that the image completes. */
const channelName = (tree) => (tree.perState ? "state" : "channel");

/** The grid indices above the columns. */
function Axis({drawn, zoom, steps}) {
  const every = Math.max(1, Math.ceil(34 / (drawn.column * zoom.scale)));
  const ticks = Array.from({length: steps + 1}, (_, i) => i).filter((i) => i % every === 0 || i === steps);
  return html`<div class="axis" aria-hidden="true">
    ${ticks.map((i) => html`<span key=${i} style=${{left: `${zoom.x + i * drawn.column * zoom.scale}px`}}>${i === 0 ? "noise" : i === steps ? "image" : i}</span>`)}
  </div>`;
}

/** The chosen row in words. */
function Details({node, record, tree, advantage, byRow, images, folded, onFold, onOpen}) {
  if (!node) {
    return html`<div>
      <h2>${record.method}, step ${record.step}</h2>
      <p>${tree.parent.length} states, ${tree.leaves.length} images, ${tree.edges.length} credited ${tree.onImages ? "images" : "steps"} of this prompt.</p>
      <p class="faint">Select a state or an image of the tree.</p>
    </div>`;
  }
  const {row} = node;
  const parent = tree.parent[row];
  const [from, to] = [parent < 0 ? null : tree.grid_index[parent], tree.grid_index[row]];
  const below = byRow.has(row) ? [byRow.get(row)] : images.filter((image) => isAbove(tree, row, image.row));
  const kind = parent < 0 ? "Initial noise" : `${tree.stochastic[row] ? "Stochastic" : "ODE"} step ${from} → ${to}`;
  return html`<div>
    <h2>${kind}</h2>
    <dl class="facts">
      <dt>noise level σ</dt><dd>${from !== null && `${number(record.sigmas?.[from], 3)} → `}${number(record.sigmas?.[to], 3)}</dd>
      ${advantage.has(row) && html`<dt>advantage</dt><dd>${signed(advantage.get(row))}</dd>`}
      ${byRow.has(row) && html`<${ImageRows} image=${byRow.get(row)} tree=${tree} />`}
      <dt>row</dt><dd>${row}</dd>
    </dl>
    ${tree.children[row].length > 0 && html`<button type="button" onClick=${() => onFold(node)}>${folded.has(row) ? "Unfold" : "Fold"} this branch</button>`}
    <h3>${below.length} ${below.length === 1 ? "image" : "images"}</h3>
    <div class="thumbs">
      ${below.slice(0, MANY).map((image) => html`<button type="button" class="zoom" key=${image.key} onClick=${() => onOpen(image)}
        title=${`reward ${number(image.total)}`} aria-label=${`Enlarge image ${image.place}`}><${Picture} src=${image.src} alt=${image.alt} /></button>`)}
    </div>
    ${below.length > MANY && html`<p class="faint">The first ${MANY} are shown.</p>`}
  </div>`;
}

function isAbove(tree, row, leaf) {
  for (let at = leaf; at >= row; at = tree.parent[at]) if (at === row) return true; // parents come first
  return false;
}

const ImageRows = ({image, tree}) => [
  ...Object.entries({...image.rewards, ...image.monitors}).map(
    ([name, value]) => html`<dt key=${name}>${name}</dt><dd>${value === null ? "failed" : number(value)}</dd>`,
  ),
  tree.severalChannels && html`<dt>${channelName(tree)}</dt><dd>${image.channels.join(", ")}</dd>`,
];

const ImageFacts = ({image, tree}) => html`<div>
  <h2>${image.text}</h2>
  <dl class="facts">
    ${image.advantage !== null && html`<dt>advantage</dt><dd>${signed(image.advantage)}</dd>`}
    <${ImageRows} image=${image} tree=${tree} />
  </dl>
</div>`;
