// Configuration: the settings of a run, differences to another run, its cost and its alarms.

import {html} from "preact";
import {apiPath, useGet} from "view/api.js";
import {count, duration, number, percent} from "view/format.js";
import {go, link, setQuery, useRoute} from "view/router.js";
import {Alarms, Damaged, newestFirst, Nothing, Pending, RunPicker, Select, usePageRun} from "view/ui.js";
import {yamlLines} from "view/yaml.js";

const COUNTS = [
  ["forward_passes", "forward passes of sampling"],
  ["train_forward_passes", "forward passes with gradient"],
  ["decodes", "decoded images"],
];

export function Config() {
  const {parts, query} = useRoute();
  const {runs, run, error, loaded} = usePageRun(parts[0]);
  const detail = useGet(run && apiPath("runs", run));
  if (!loaded || error) return html`<${Pending} error=${error} what="runs" />`;
  if (!run) return html`<${Nothing}>There are no runs yet.</${Nothing}>`;
  const others = newestFirst(runs).filter(({id}) => id !== run);
  return html`<section class="page">
    <div class="controls">
      <${RunPicker} runs=${runs} value=${run} onChange=${(id) => go(link("config", [id], query))} />
      ${others.length > 0 && html`<${Select} label="Differences to" wide value=${query.diff ?? ""} options=${[["", "no other run"], ...others.map(({id}) => [id, id])]}
        onChange=${(id) => setQuery({diff: id})} />`}
    </div>
    ${detail.data ? html`<${Details} detail=${detail.data} other=${query.diff} />` : html`<${Pending} error=${detail.error} what="configuration" />`}
  </section>`;
}

function Details({detail, other}) {
  const {config, cost, alarms, versions, history, best_checkpoint: best, status} = detail;
  return html`<div class="config">
    <div class="config-side">
      <div class="card">
        <h2>Cost</h2>
        <${Cost} cost=${cost} />
      </div>
      <div class="card">
        <h2>State</h2>
        <dl class="facts">
          <dt>status</dt><dd><span class="badge status ${status}">${status}</span></dd>
          ${best && html`<dt>best checkpoint</dt><dd>step ${best.step}, ${number(best.score)}</dd>`}
          ${Object.entries(versions ?? {}).map(([name, value]) => html`<dt key=${name}>${name}</dt><dd>${String(value)}</dd>`)}
        </dl>
        ${best?.rule && html`<p class="faint">Best: ${best.rule}.</p>`}
        <${Alarms} alarms=${alarms} />
        ${!alarms?.length && html`<p class="faint">No alarms.</p>`}
        <${Damaged} messages=${detail.damaged} />
      </div>
      ${history?.length > 1 && html`<div class="card"><h2>History</h2><${Yaml} value=${history} /></div>`}
      ${detail.calibration && html`<details class="card"><summary>Calibrated noise</summary><${Yaml} value=${detail.calibration} /></details>`}
    </div>
    <div class="config-main">
      ${other && html`<${Differences} a=${detail.id} b=${other} />`}
      <div class="card"><h2>Settings</h2><${Yaml} value=${config} /></div>
    </div>
  </div>`;
}

function Cost({cost}) {
  if (!cost) return html`<p class="faint">No steps yet.</p>`;
  const stages = Object.entries(cost.stages ?? {}).sort(([, a], [, b]) => b - a);
  const total = stages.reduce((sum, [, seconds]) => sum + seconds, 0) || 1;
  return html`<dl class="facts">
      ${COUNTS.map(([key, text]) => html`<dt key=${key}>${text}</dt><dd>${count(cost[key])}</dd>`)}
      <dt>time of the steps</dt><dd>${duration(cost.seconds)}</dd>
    </dl>
    ${stages.length > 0 && html`<h3>Seconds by stage</h3>
      <dl class="stages">${stages.map(([name, seconds]) => html`<div key=${name}>
        <dt>${name}</dt><dd><i class="bar" style=${{width: `${(100 * seconds) / stages[0][1]}%`}}></i></dd>
        <dd class="number">${duration(seconds)}</dd><dd class="number faint">${percent(seconds / total)}</dd>
      </div>`)}</dl>`}`;
}

function Differences({a, b}) {
  const {data, error} = useGet(`/api/diff?${new URLSearchParams({a, b})}`);
  if (!data) return html`<div class="card"><${Pending} error=${error} what="differences" /></div>`;
  const text = (value) => (value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value));
  return html`<div class="card">
    <h2>Differences</h2>
    ${data.rows.length === 0
      ? html`<p class="faint">The settings are equal.</p>`
      : html`<div class="scroll"><table class="differences">
          <thead><tr><th>Setting</th><th>${a}</th><th>${b}</th></tr></thead>
          <tbody>${data.rows.map((row) => html`<tr key=${row.path}><td><code>${row.path}</code></td><td>${text(row.a)}</td><td>${text(row.b)}</td></tr>`)}</tbody>
        </table></div>`}
  </div>`;
}

/** A value as YAML. */
const Yaml = ({value}) => html`<pre class="yaml">${yamlLines(value).map(
  ({indent, key, text}, i) => html`<span key=${i} style=${{"--indent": indent}}><b>${key}</b>${text}</span>`,
)}</pre>`;
