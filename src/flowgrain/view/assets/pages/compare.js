// Compare: the same prompt and the same noise from two checkpoints, runs or numbers of steps.

import {html, useEffect, useRef, useState} from "preact";
import {number, signed} from "view/format.js";
import {VirtualGrid} from "view/grid.js";
import {Keys, useKeys} from "view/keyboard.js";
import {setQuery, useRoute} from "view/router.js";
import {comparable, PairPicker, partners, sourceImage, usePair} from "view/sources.js";
import {Choice, Field, Nothing, Pending, Picture} from "view/ui.js";

const MODES = [["side", "Side by side"], ["slider", "Slider"], ["fade", "Fade"], ["difference", "Difference"]];
const GAIN = 4;

export function Compare() {
  const {query} = useRoute();
  const {sources, a, b, pairs, scores, loading, error} = usePair();
  const place = Math.max(0, pairs.findIndex((pair) => String(pair.key) === query.image));
  const pair = pairs[place];
  const move = (by) => pairs[place + by] && setQuery({image: String(pairs[place + by].key)});
  const mode = query.mode ?? "side";
  useKeys({
    "[": () => move(-1), "]": () => move(1),
    x: () => a && b && setQuery({a: b.id, b: a.id}),
    ...Object.fromEntries(MODES.map(([name], i) => [String(i + 1), () => setQuery({mode: name})])),
  });
  if (error || (loading && !a)) return html`<${Pending} error=${error} what="sources" />`;
  if (!a) return html`<${Nothing}>There are no evaluations with images yet. Training evaluates before the first and after the last step.</${Nothing}>`;
  return html`<section class="page">
    <div class="controls">
      <${PairPicker} sources=${sources} a=${a} b=${b} />
      <button type="button" disabled=${!b} title="Exchange A and B" onClick=${() => setQuery({a: b.id, b: a.id})}>⇄</button>
      <${Choice} label="View" value=${mode} options=${MODES} onChange=${(v) => setQuery({mode: v})} />
    </div>
    ${!b && html`<${Nothing}>No other source shows the same prompts with the same noise. Select one for B.</${Nothing}>`}
    ${b && !comparable(a, b) && html`<p class="notice">A and B have other prompts or other noise. Images of equal prompts are shown side by side.</p>`}
    ${b && loading && html`<${Pending} what="images" />`}
    ${b && !loading && !pairs.length && html`<${Nothing}>A and B have no common prompt.</${Nothing}>`}
    ${pair && html`<div>
      <div class="row title-row">
        <button type="button" disabled=${place === 0} onClick=${() => move(-1)} aria-label="Previous prompt">‹</button>
        <h1 class="prompt-title">${pair.text}</h1>
        <span class="faint">${place + 1} of ${pairs.length}</span>
        <button type="button" disabled=${place >= pairs.length - 1} onClick=${() => move(1)} aria-label="Next prompt">›</button>
      </div>
      <div class="stage-row">
        <${Stage} key=${mode} mode=${mode} a=${a} b=${b} pair=${pair} />
        <${Scores} scores=${scores} pair=${pair} />
      </div>
      <${OtherSources} sources=${sources} a=${a} b=${b} place=${pair.a} />
      <h2>All prompts</h2>
      <${VirtualGrid} label="All prompts" items=${pairs} cellWidth=${200} aspect=${0.5} text=${46}
        render=${(other, i) => html`<button type="button" class="pair" aria-pressed=${i === place} onClick=${() => setQuery({image: String(other.key)})}>
          <span class="two"><${Picture} src=${sourceImage(a, other.a)} alt="A" eager /><${Picture} src=${sourceImage(b, other.b)} alt="B" eager /></span>
          <span class="text">${other.text}</span>
        </button>`} />
    </div>`}
    <${Keys} of=${[["1 2 3 4", "view"], ["[ ]", "prompt"], ["x", "exchange A and B"], ["+ − 0", "zoom"], ["← → ↑ ↓", "move a zoomed image"]]} />
  </section>`;
}

/** The two images. All views share the zoom. */
function Stage({mode, a, b, pair}) {
  const [share, setShare] = useState(50);
  const [zoom, setZoom] = useState({scale: 1, x: 0, y: 0});
  const [left, right] = [sourceImage(a, pair.a), sourceImage(b, pair.b)];
  const change = (update) => setZoom((old) => bounded({...old, ...update(old)}));
  const scaleBy = (factor) => change((old) => ({scale: old.scale * factor}));
  const shift = (x, y) => change((old) => ({x: old.x + x / old.scale, y: old.y + y / old.scale}));
  useKeys({
    "+": () => scaleBy(1.5), "=": () => scaleBy(1.5), "-": () => scaleBy(1 / 1.5), 0: () => setZoom({scale: 1, x: 0, y: 0}),
    ...(zoom.scale > 1 ? {ArrowLeft: () => shift(12, 0), ArrowRight: () => shift(-12, 0), ArrowUp: () => shift(0, 12), ArrowDown: () => shift(0, -12)} : {}),
  });
  const style = {transform: `scale(${zoom.scale}) translate(${zoom.x}%, ${zoom.y}%)`};
  const layers = {
    slider: {clipPath: `inset(0 0 0 ${share}%)`},
    fade: {opacity: share / 100},
  };
  const image = (src, alt) => html`<div class="layer" style=${style}><${Picture} src=${src} alt=${alt} eager /></div>`;
  return html`<div class="compare ${mode}">
    <${Panes} change=${change} scaleBy=${scaleBy}>
      ${mode === "side" && html`<figure><div class="pane">${image(left, `A: ${pair.text}`)}</div><figcaption>A · ${a.label}</figcaption></figure>
        <figure><div class="pane">${image(right, `B: ${pair.text}`)}</div><figcaption>B · ${b.label}</figcaption></figure>`}
      ${layers[mode] && html`<div class="pane">
        ${image(left, `A: ${pair.text}`)}
        <div class="over" style=${layers[mode]}>${image(right, `B: ${pair.text}`)}</div>
        ${mode === "slider" && html`<div class="divider" style=${{left: `${share}%`}}></div>`}
        <span class="corner">A</span><span class="corner right">B</span>
      </div>`}
      ${mode === "difference" && html`<${Difference} left=${left} right=${right} style=${style} />`}
    </${Panes}>
    ${layers[mode] && html`<${Field} label=${mode === "slider" ? "Position" : "Share of B"} wide>
      <input type="range" min="0" max="100" value=${share} onInput=${(event) => setShare(Number(event.target.value))} /></${Field}>`}
    <div class="row zoom-row">
      <button type="button" aria-label="Zoom out" onClick=${() => scaleBy(1 / 1.5)}>−</button>
      <span class="faint">${Math.round(100 * zoom.scale)}%</span>
      <button type="button" aria-label="Zoom in" onClick=${() => scaleBy(1.5)}>+</button>
      <button type="button" onClick=${() => setZoom({scale: 1, x: 0, y: 0})}>Fit</button>
    </div>
  </div>`;
}

/** A zoom between 1 and 16 whose image covers its pane. */
function bounded({scale, x, y}) {
  const size = Math.min(16, Math.max(1, scale));
  const limit = 50 * (1 - 1 / size);
  const inside = (value) => Math.min(limit, Math.max(-limit, value));
  return {scale: size, x: inside(x), y: inside(y)};
}

/** The panes, which the pointer drags and the wheel with Ctrl zooms. */
function Panes({change, scaleBy, children}) {
  const ref = useRef(null);
  const drag = useRef(null);
  useEffect(() => {
    const wheel = (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      scaleBy(Math.exp(-event.deltaY * 0.01));
    };
    ref.current.addEventListener("wheel", wheel, {passive: false});
    return () => ref.current?.removeEventListener("wheel", wheel);
  }, []);
  const move = (event) => {
    if (!drag.current) return;
    const size = drag.current.size;
    const [dx, dy] = [event.clientX - drag.current.x, event.clientY - drag.current.y];
    Object.assign(drag.current, {x: event.clientX, y: event.clientY});
    change((old) => ({x: old.x + (100 * dx) / size / old.scale, y: old.y + (100 * dy) / size / old.scale}));
  };
  const down = (event) => {
    const pane = event.target.closest(".pane");
    if (!pane) return;
    drag.current = {x: event.clientX, y: event.clientY, size: pane.clientWidth};
    event.currentTarget.setPointerCapture(event.pointerId);
  };
  return html`<div class="panes" ref=${ref} onPointerDown=${down} onPointerMove=${move} onPointerUp=${() => (drag.current = null)} onPointerCancel=${() => (drag.current = null)}>${children}</div>`;
}

/** The absolute difference of the pixels. */
function Difference({left, right, style}) {
  const canvas = useRef(null);
  const [result, setResult] = useState({});
  useEffect(() => {
    let current = true;
    Promise.all([pixels(left), pixels(right)])
      .then(([a, b]) => current && setResult({mean: drawDifference(canvas.current, a, b), small: a.width <= 128}))
      .catch(() => current && setResult({error: "An image is missing."}));
    return () => (current = false);
  }, [left, right]);
  return html`<figure>
    <div class="pane"><div class="layer" style=${style}><canvas ref=${canvas} class=${result.small ? "picture pixels" : "picture"} role="img" aria-label="Difference of the pixels"></canvas></div></div>
    <figcaption>${result.error ?? `|A − B|, ${GAIN} times as bright. Mean difference ${number(result.mean)} of 255.`}</figcaption>
  </figure>`;
}

async function pixels(src) {
  const image = new Image();
  image.src = src;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** Draw |a - b| and return its mean. Images of other sizes are compared where they overlap. */
function drawDifference(canvas, a, b) {
  const [width, height] = [Math.min(a.width, b.width), Math.min(a.height, b.height)];
  const drawn = new ImageData(width, height);
  let sum = 0;
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const [to, i, j] = [4 * (y * width + x), 4 * (y * a.width + x), 4 * (y * b.width + x)];
      for (let c = 0; c < 3; c += 1) {
        const value = Math.abs(a.data[i + c] - b.data[j + c]);
        sum += value;
        drawn.data[to + c] = GAIN * value;
      }
      drawn.data[to + 3] = 255;
    }
  }
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(drawn, 0, 0);
  return sum / (3 * width * height);
}

/** The scores of the two images. */
function Scores({scores: [first, second], pair}) {
  const names = [...new Set([...Object.keys(first), ...Object.keys(second)])];
  if (!names.length) return null;
  return html`<div class="scroll"><table class="scores">
    <thead><tr><th>Score</th><th class="number">A</th><th class="number">B</th><th class="number">B − A</th></tr></thead>
    <tbody>${names.map((name) => {
      const [x, y] = [first[name]?.[pair.a], second[name]?.[pair.b]];
      const difference = x == null || y == null ? null : y - x;
      return html`<tr key=${name}><td>${name}</td><td class="number">${number(x)}</td><td class="number">${number(y)}</td>
        <td class="number ${difference > 0 ? "good" : difference < 0 ? "bad" : ""}">${difference === null ? "–" : signed(difference)}</td></tr>`;
    })}</tbody>
  </table></div>`;
}

/** The same prompt and noise in all sources: checkpoints, runs and numbers of sampling steps. */
function OtherSources({sources, a, b, place}) {
  const others = [a, ...partners(sources, a)];
  if (others.length < 3) return null;
  return html`<div>
    <h2>The same prompt and noise</h2>
    <p class="faint">Select an image as B. With Shift, select it as A.</p>
    <${VirtualGrid} label="The same prompt and noise" items=${others.map((source) => ({...source, key: source.id}))} cellWidth=${110} text=${40}
      render=${(source) => html`<button type="button" class="pair" aria-pressed=${source.id === a.id || source.id === b.id}
        onClick=${(event) => setQuery(event.shiftKey ? {a: source.id, b: b.id} : {a: a.id, b: source.id})}>
        <${Picture} src=${sourceImage(source, place)} alt=${source.label} eager />
        <span class="text">${source.id === a.id ? "A · " : source.id === b.id ? "B · " : ""}${source.label}</span>
      </button>`} />
  </div>`;
}
