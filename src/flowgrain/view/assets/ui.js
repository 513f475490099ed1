// Small parts that several pages share.

import {html, useEffect, useState} from "preact";
import {useGet} from "view/api.js";

/** A message in place of content: still loading, or what went wrong. */
export function Pending({error, what}) {
  if (error) return html`<p class="message bad" role="alert">${error}</p>`;
  return html`<p class="message faint" role="status">Loading ${what} …</p>`;
}

/** A message in place of content that does not exist. */
export const Nothing = ({children}) => html`<p class="message faint">${children}</p>`;

/** A form control with its label. */
export const Field = ({label, children, wide}) =>
  html`<label class="field ${wide ? "wide" : ""}"><span>${label}</span>${children}</label>`;

/** A select. `options` are values, or pairs of value and text. */
export function Select({label, value, options, onChange, wide}) {
  const pairs = options.map((option) => (Array.isArray(option) ? option : [option, String(option)]));
  return html`<${Field} label=${label} wide=${wide}>
    <select aria-label=${label} value=${String(value)} onChange=${(event) => onChange(event.target.value)}>
      ${pairs.map(
        ([option, text]) =>
          html`<option key=${option} value=${option} selected=${String(option) === String(value)}>${text}</option>`,
      )}
    </select>
  </${Field}>`;
}

/** One of a few values, as a row of radio buttons. */
export function Choice({label, value, options, onChange}) {
  return html`<fieldset class="choice">
    <legend>${label}</legend>
    ${options.map(
      ([option, text]) => html`<label key=${option} class=${option === value ? "on" : ""}>
        <input type="radio" name=${label} checked=${option === value} onChange=${() => onChange(option)} />
        ${text}
      </label>`,
    )}
  </fieldset>`;
}

/** A slider over a list of steps, with buttons for the previous and the next one. */
export function StepSlider({label, steps, value, onChange}) {
  const place = Math.max(0, steps.indexOf(value));
  const move = (to) => steps[to] !== undefined && onChange(steps[to]);
  return html`<div class="field slider">
    <label for="step-slider"><span>${label}</span> <b class="current">${value}</b></label>
    <div class="row">
      <button type="button" title="Previous step" disabled=${place === 0} onClick=${() => move(place - 1)}>‹</button>
      <input
        id="step-slider" type="range" min="0" max=${Math.max(0, steps.length - 1)} value=${place}
        aria-valuetext=${`step ${value}`} onInput=${(event) => move(Number(event.target.value))}
      />
      <button type="button" title="Next step" disabled=${place >= steps.length - 1} onClick=${() => move(place + 1)}>›</button>
    </div>
  </div>`;
}

let lastRun = null;

/** The run of a page: the one of the address, else the one last looked at, else the newest. */
export function usePageRun(id) {
  const {data, error} = useGet("/api/runs");
  if (id) lastRun = id;
  const runs = data?.runs ?? [];
  const known = (wanted) => runs.some((run) => run.id === wanted);
  const run = id ?? (known(lastRun) ? lastRun : newestFirst(runs)[0]?.id) ?? null;
  return {runs, run, error, loaded: Boolean(data)};
}

/** Runs by their start, the newest first. */
export const newestFirst = (runs) =>
  [...runs].sort((a, b) => String(b.started).localeCompare(String(a.started)));

/** A select of all runs. */
export function RunPicker({runs, value, onChange}) {
  const options = newestFirst(runs).map((run) => [run.id, run.id]);
  return html`<${Select} label="Run" wide value=${value} options=${options} onChange=${onChange} />`;
}

/** An image. Images of up to 128 pixels are enlarged with sharp pixels. */
export function Picture({src, alt, eager}) {
  const [state, setState] = useState("");
  useEffect(() => setState(""), [src]);
  const loaded = ({target}) => {
    if (Math.max(target.naturalWidth, target.naturalHeight) <= 128) target.classList.add("pixels");
  };
  if (state === "missing" || !src) return html`<span class="picture missing">not recorded</span>`;
  return html`<img
    class="picture" src=${src} alt=${alt} loading=${eager ? "eager" : "lazy"} decoding="async" draggable=${false}
    onLoad=${loaded} onError=${() => setState("missing")}
  />`;
}

/** The scale of colors of an advantage: green for positive, red for negative numbers. */
export function advantageStyle(value, largest) {
  if (!Number.isFinite(value)) return {};
  const share = Math.round(20 + 80 * Math.min(1, Math.abs(value) / (largest || 1)));
  const color = value >= 0 ? "var(--good)" : "var(--bad)";
  return {"--tone": `color-mix(in oklab, ${color} ${share}%, var(--edge))`};
}

/** The number of alarms of a run, as a badge. */
export const AlarmBadge = ({count}) =>
  count ? html`<span class="badge alarm" title="Alarms of the watch">▲ ${count}</span>` : html`<span class="faint">–</span>`;

/** The alarms of runs in words, folded: a run can have many. With several runs, every alarm names its `run`. */
export function Alarms({alarms}) {
  if (!alarms?.length) return null;
  const first = alarms.reduce((a, b) => (b.step < a.step ? b : a));
  return html`<details class="alarms">
    <summary>
      <span class="badge alarm">▲ ${alarms.length} ${alarms.length === 1 ? "alarm" : "alarms"}</span>
      ${" "}The first: ${first.run && html`<b>${first.run}</b>, `}${first.monitor} at step ${first.step}.
    </summary>
    <ul aria-label="Alarms">
      ${alarms.map(
        (alarm) => html`<li key=${`${alarm.run} ${alarm.step} ${alarm.monitor}`}>
          <span class="badge alarm">▲ ${alarm.monitor}, step ${alarm.step}</span> ${alarm.run && html`<b>${alarm.run}</b> `}${alarm.message}
        </li>`,
      )}
    </ul>
  </details>`;
}

/** Files that are left out because they are damaged. */
export function Damaged({messages}) {
  if (!messages?.length) return null;
  return html`<div>
    <h3>Damaged files, left out</h3>
    <ul class="damaged">${messages.map((message) => html`<li key=${message}>${message}</li>`)}</ul>
  </div>`;
}
