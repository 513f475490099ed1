// Runs: a table of all runs. Selected runs are overlaid on the page of curves.

import {html, useMemo, useRef, useState} from "preact";
import {useGet} from "view/api.js";
import {count, number, time} from "view/format.js";
import {Keys, useKeys} from "view/keyboard.js";
import {curvesLink} from "view/pages/curves.js";
import {go, link, setQuery, useRoute} from "view/router.js";
import {AlarmBadge, Damaged, Field, Nothing, Pending, Select} from "view/ui.js";

const STATUSES = ["running", "finished", "stopped", "unfinished"];

export function Runs() {
  const {query} = useRoute();
  const {data, error} = useGet("/api/runs");
  if (!data) return html`<${Pending} error=${error} what="runs" />`;
  if (!data.runs.length && !data.evaluations?.length && !data.damaged?.length) {
    return html`<${Nothing}>There are no runs in these directories yet. A run appears here when it starts.</${Nothing}>`;
  }
  return html`<section class="page">
    ${error && html`<${Pending} error=${error} />`}
    <${RunTable} runs=${data.runs} query=${query} />
    <${Evaluations} evaluations=${data.evaluations ?? []} />
    <${Damaged} messages=${data.damaged} />
  </section>`;
}

function RunTable({runs, query}) {
  const {q: words = "", status = "", sort = "-started"} = query;
  const names = useMemo(() => frequent(runs.flatMap((run) => Object.keys(run.last ?? {}))), [runs]);
  const reward = names.includes(query.reward) ? query.reward : names[0];
  const [selected, setSelected] = useState(new Set());
  const search = useRef(null);
  const columns = useMemo(() => tableColumns(reward), [reward]);
  const shown = useMemo(() => sorted(runs.filter((run) => matches(run, words, status)), columns, sort), [runs, words, status, columns, sort]);
  const chosen = runs.filter((run) => selected.has(run.id)).map((run) => run.id);
  const toggle = (ids, on) => {
    const next = new Set(selected);
    for (const id of ids) (on ?? !next.has(id)) ? next.add(id) : next.delete(id);
    setSelected(next);
  };
  const overlay = () => chosen.length && go(curvesLink(chosen));
  useKeys({"/": () => search.current.focus(), o: overlay});
  const all = shown.length > 0 && shown.every((run) => selected.has(run.id));
  return html`<div>
    <div class="controls">
      <${Field} label="Search" wide><input ref=${search} type="search" placeholder="name, method, reward, model" value=${words}
        onInput=${(event) => setQuery({q: event.target.value})} /></${Field}>
      <${Select} label="Status" value=${status} options=${[["", "all"], ...STATUSES]} onChange=${(v) => setQuery({status: v})} />
      ${names.length > 1 && html`<${Select} label="Values of" value=${reward} options=${names} onChange=${(v) => setQuery({reward: v})} />`}
      <button type="button" class="primary end" disabled=${!chosen.length} onClick=${overlay}>
        ${chosen.length ? `Overlay ${chosen.length} ${chosen.length === 1 ? "run" : "runs"}` : "Overlay selected runs"}
      </button>
    </div>
    <p class="faint" role="status">${shown.length} of ${runs.length} runs</p>
    <div class="scroll"><table class="runs" onKeyDown=${(event) => rowKeys(event, toggle)}>
      <thead><tr>
        <th class="select"><input type="checkbox" aria-label="Select all shown runs" checked=${all} onChange=${() => toggle(shown.map((run) => run.id), !all)} /></th>
        ${columns.map((column) => html`<${Header} key=${column.key} column=${column} sort=${sort} />`)}
      </tr></thead>
      <tbody>${shown.map((run) => html`<${Row} key=${run.id} run=${run} columns=${columns} on=${selected.has(run.id)} toggle=${toggle} />`)}</tbody>
    </table></div>
    ${!shown.length && runs.length > 0 && html`<${Nothing}>No run matches the search.</${Nothing}>`}
    <${Keys} of=${[["/", "search"], ["↑ ↓", "between runs"], ["Space", "select"], ["Enter", "open the curves"], ["o", "overlay the selected runs"]]} />
  </div>`;
}

/** Values of a list without repetition, the most frequent first. */
function frequent(values) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  return [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a) || a.localeCompare(b));
}

function tableColumns(reward) {
  const value = (run, name) => run[name]?.[reward]?.value ?? run[name]?.[reward];
  const show = (run, name) => {
    const other = Object.keys(run[name] ?? {})[0];
    if (value(run, name) !== undefined || !other) return number(value(run, name));
    const found = run[name][other]; // a run without the chosen reward
    return html`${number(found?.value ?? found)} <span class="faint">${other}</span>`;
  };
  return [
    {key: "name", title: "Run", of: (run) => run.id, show: (run) => html`<a href=${curvesLink([run.id])} class="run-name">${run.id}</a>`},
    {key: "status", title: "Status", of: (run) => run.status, show: (run) => html`<span class="badge status ${run.status}">${run.status}</span>`},
    {key: "method", title: "Method", of: (run) => run.method, show: (run) => run.title ?? run.method},
    {key: "rewards", title: "Rewards", of: (run) => run.rewards.join(), show: (run) => run.rewards.join(", ")},
    {key: "step", title: "Step", number: true, of: (run) => run.step, show: (run) => html`${count(run.step)}<span class="faint"> / ${count(run.max_steps)}</span>`},
    {key: "first", title: "First", number: true, of: (run) => value(run, "first"), show: (run) => show(run, "first")},
    {key: "best", title: "Best", number: true, of: (run) => value(run, "best"), show: (run) => show(run, "best"),
      hint: (run) => run.best?.[reward]?.step !== undefined && `at step ${run.best[reward].step}`},
    {key: "last", title: "Last", number: true, of: (run) => value(run, "last"), show: (run) => show(run, "last")},
    {key: "alarms", title: "Alarms", number: true, of: (run) => run.alarms, show: (run) => html`<${AlarmBadge} count=${run.alarms} />`},
    {key: "seed", title: "Seed", number: true, of: (run) => run.seed, show: (run) => run.seed ?? "–"},
    {key: "started", title: "Started", of: (run) => run.started, show: (run) => time(run.started)},
    {key: "links", title: "", show: (run) => html`<span class="links">
      <a href=${link("group", [run.id])}>group</a> <a href=${link("tree", [run.id])}>tree</a> <a href=${link("config", [run.id])}>config</a>
    </span>`},
  ];
}

function matches(run, words, status) {
  if (status && run.status !== status) return false;
  const text = [run.id, run.name, run.method, run.title, run.model, run.status, ...run.rewards].join(" ").toLowerCase();
  return words.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

function sorted(runs, columns, sort) {
  const down = sort.startsWith("-");
  const of = columns.find(({key}) => key === sort.replace("-", ""))?.of ?? columns[0].of;
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", {numeric: true}));
  return [...runs].sort((x, y) => {
    const [a, b] = [of(x), of(y)];
    if (a == null || b == null) return (a == null) - (b == null); // missing values come last
    return (down ? -1 : 1) * compare(a, b) || x.id.localeCompare(y.id);
  });
}

function Header({column, sort}) {
  const {key, title, number: numeric, of} = column;
  const state = sort === key ? "ascending" : sort === `-${key}` ? "descending" : "none";
  const next = state === "none" ? (numeric ? `-${key}` : key) : state === "ascending" ? `-${key}` : key;
  return html`<th class=${numeric ? "number" : ""} aria-sort=${of && state}>
    ${of && html`<button type="button" class="plain" onClick=${() => setQuery({sort: next})}>${title}<i aria-hidden="true">${{ascending: "▲", descending: "▼", none: ""}[state]}</i></button>`}
  </th>`;
}

const Row = ({run, columns, on, toggle}) => html`<tr tabindex="0" data-run=${run.id} class=${on ? "on" : ""} aria-label=${`${run.id}${on ? ", selected" : ""}`}>
  <td class="select"><input type="checkbox" tabindex="-1" aria-label=${`Select ${run.id}`} checked=${on} onChange=${() => toggle([run.id])} /></td>
  ${columns.map((column) => html`<td key=${column.key} class="col-${column.key} ${column.number ? "number" : ""}" data-title=${column.title} title=${(column.hint && column.hint(run)) || undefined}>${column.show(run)}</td>`)}
</tr>`;

function rowKeys(event, toggle) {
  const row = event.target.closest("tbody tr");
  if (!row || event.target !== row) return;
  const run = row.dataset.run;
  if (event.key === "ArrowDown") row.nextElementSibling?.focus();
  else if (event.key === "ArrowUp") row.previousElementSibling?.focus();
  else if (event.key === " ") toggle([run]);
  else if (event.key === "Enter") go(curvesLink([run]));
  else return;
  event.preventDefault();
}

/** Directories of `flowgrain evaluate`, which the pages Compare and Arena show. */
function Evaluations({evaluations}) {
  if (!evaluations.length) return null;
  return html`<div>
    <h2>Evaluations</h2>
    <div class="scroll"><table>
      <thead><tr><th>Directory</th><th>Models</th><th>Sampling steps</th><th></th></tr></thead>
      <tbody>${evaluations.map((found) => html`<tr key=${found.id}>
        <td>${found.id}</td><td>${found.labels.join(", ")}</td><td>${found.steps.join(", ")}</td>
        <td class="links"><a href=${link("compare", [], {of: found.id})}>compare</a> <a href=${link("arena", [], {of: found.id})}>arena</a></td>
      </tr>`)}</tbody>
    </table></div>
  </div>`;
}
