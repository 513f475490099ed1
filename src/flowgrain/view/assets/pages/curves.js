// Curves: metrics of one or several runs.

import {html, useEffect, useMemo, useRef, useState} from "preact";
import {apiPath, useAll, useGet} from "view/api.js";
import {Chart} from "view/chart.js";
import {alarmMarkers, COLORS, groupLabel, groupLine, OPEN_SECTIONS, sections, seedGroups, stepAt} from "view/curve_data.js";
import {nearest} from "view/format.js";
import {Keys} from "view/keyboard.js";
import {decode, go, link, setQuery, useRoute} from "view/router.js";
import {Alarms, Choice, Field, newestFirst, Nothing, Pending, Select, usePageRun} from "view/ui.js";

const POINTS = 1000;
const AXES = [["step", "Steps"], ["passes", "Passes"], ["seconds", "Seconds"]];
const X_LABEL = {step: "step", passes: "forward passes", seconds: "seconds"};

export function Curves() {
  const {query} = useRoute();
  const named = (query.runs ?? "").split(",").filter(Boolean).map(decode);
  const {runs, run, error, loaded} = usePageRun(named[0]);
  const chosen = named.length ? runs.filter(({id}) => named.includes(id)) : runs.filter(({id}) => id === run);
  if (!loaded || error) return html`<${Pending} error=${error} what="runs" />`;
  if (!run) return html`<${Nothing}>There are no runs yet.</${Nothing}>`;
  return html`<section class="page">
    <${Overlay} runs=${runs} chosen=${chosen} query=${query} />
    <${Keys} of=${[["← →", "move over a focused chart"], ["Enter", "images at this point"]]} />
  </section>`;
}

/** The address of the curves of several runs. */
export const curvesLink = (ids) => link("curves", [], {runs: ids.map(encodeURIComponent).join(",")});

function Overlay({runs, chosen, query}) {
  const {x: axis = "step", log = "off", seeds = "on", keys: filter = ""} = query;
  const smoothing = Number(query.smooth ?? 0);
  const details = useAll(chosen.map(({id}) => apiPath("runs", id)));
  const loaded = details.flatMap(({data}) => data ?? []);
  const error = details.find((detail) => detail.error)?.error;
  const keys = useMemo(() => [...new Set(loaded.flatMap((detail) => detail.keys))], [loaded.map((d) => d.keys.join()).join("\n")]);
  const [opened, setOpened] = useState(new Set(OPEN_SECTIONS));
  const shown = sections(keys.filter((key) => key.toLowerCase().includes(filter.toLowerCase())));
  const wanted = shown.flatMap(([title, names]) => (opened.has(title) || filter ? names : []));
  const metrics = useMetrics(chosen, wanted);
  const groups = useMemo(() => seedGroups(chosen, seeds === "on"), [chosen.map(({id}) => id).join("\n"), seeds]);
  const several = seedGroups(chosen, true).some((group) => group.length > 1);
  const settings = {axis, smoothing, log: log === "on"};
  const toggle = (title, isOpen) => {
    const next = new Set(opened);
    if (isOpen) next.add(title);
    else next.delete(title);
    setOpened(next);
  };
  return html`<div>
    <${Chips} runs=${runs} chosen=${chosen} groups=${groups} />
    <div class="controls sticky">
      <${Choice} label="x-axis" value=${axis} options=${AXES} onChange=${(v) => setQuery({x: v})} />
      <${Field} label=${`Smoothing ${smoothing.toFixed(2)}`}>
        <input type="range" min="0" max="0.98" step="0.02" value=${smoothing} onInput=${(event) => setQuery({smooth: event.target.value})} />
      </${Field}>
      <${Field} label="Log scale"><input type="checkbox" checked=${log === "on"} onChange=${(event) => setQuery({log: event.target.checked ? "on" : "off"})} /></${Field}>
      ${several && html`<${Field} label="Combine seeds"><input type="checkbox" checked=${seeds === "on"} onChange=${(event) => setQuery({seeds: event.target.checked ? "on" : "off"})} /></${Field}>`}
      <${Field} label="Metrics"><input type="search" placeholder="part of a name" value=${filter} onInput=${(event) => setQuery({keys: event.target.value})} /></${Field}>
    </div>
    ${groups.some((group) => group.length > 1) && html`<p class="faint">Lines are means over seeds. Bands are from the lowest to the highest seed.</p>`}
    <${Alarms} alarms=${loaded.flatMap((d) => (d.alarms ?? []).map((alarm) => (loaded.length > 1 ? {...alarm, run: d.id} : alarm)))} />
    ${error && html`<${Pending} error=${error} />`}
    ${!error && !loaded.length && html`<${Pending} what="metrics" />`}
    ${loaded.length > 0 && !keys.length && html`<${Nothing}>No metrics yet. The first line is written after the evaluation before training.</${Nothing}>`}
    ${shown.map(([title, names]) => html`<details key=${title} class="section" open=${opened.has(title) || Boolean(filter)}
      onToggle=${(event) => !filter && toggle(title, event.target.open)}>
      <summary>${title} <span class="faint">${names.length}</span></summary>
      <div class="charts">
        ${(opened.has(title) || filter) && names.map((name) => html`<${OnScreen} key=${name}>
          <${MetricChart} name=${name} groups=${groups} metrics=${metrics} settings=${settings} details=${loaded} />
        </${OnScreen}>`)}
      </div>
    </details>`)}
  </div>`;
}

/** Metrics by run id, in one request per run. The earlier ones stay until the answer to a new request. */
function useMetrics(chosen, keys) {
  const query = `?${new URLSearchParams({keys: keys.join(","), points: POINTS})}`;
  const answers = useAll(keys.length ? chosen.map(({id}) => apiPath("runs", id, "metrics") + query) : []);
  const kept = useRef({});
  const fresh = answers.flatMap(({data}, i) => (data && kept.current[chosen[i].id] !== data ? [[chosen[i].id, data]] : []));
  if (fresh.length) kept.current = {...kept.current, ...Object.fromEntries(fresh)};
  return kept.current;
}

/** The chosen runs with their colors, and a select to add another. */
function Chips({runs, chosen, groups}) {
  const show = (ids) => go(curvesLink(ids), {replace: true});
  const ids = chosen.map(({id}) => id);
  const others = newestFirst(runs).filter(({id}) => !ids.includes(id));
  return html`<div class="chips">
    ${groups.map((group, i) => html`<span class="chip" key=${group[0].id}>
      <i class=${`swatch ${COLORS[i % COLORS.length]}`}></i>
      <a href=${link("config", [group[0].id])}>${groupLabel(group)}</a>
      ${groups.length > 1 && html`<button type="button" class="plain" aria-label=${`Remove ${groupLabel(group)}`}
        onClick=${() => show(ids.filter((id) => !group.some((run) => run.id === id)))}>×</button>`}
    </span>`)}
    ${others.length > 0 && html`<select aria-label="Add a run" value="" onChange=${(event) => {
      show([...ids, event.target.value]);
      event.target.value = "";
    }}>
      <option value="">Add a run …</option>
      ${others.map(({id}) => html`<option key=${id} value=${id}>${id}</option>`)}
    </select>`}
  </div>`;
}

function MetricChart({name, groups, metrics, settings, details}) {
  const lines = useMemo(() => groups.flatMap((group, i) => {
    const line = groupLine(group, metrics, name, settings);
    return line ? [{...line, label: groupLabel(group), color: COLORS[i % COLORS.length]}] : [];
  }), [name, groups, metrics, settings.axis, settings.smoothing]);
  const markers = useMemo(() => alarmMarkers(details, metrics, name, settings.axis), [details, metrics, name, settings.axis]);
  const open = (line, x) => {
    const {run} = line.runs[0];
    const at = stepAt(line.runs[0], x);
    const detail = details.find(({id}) => id === run);
    const evaluated = nearest(detail.evaluation_steps ?? [], at);
    const recorded = nearest(detail.group_steps ?? [], at);
    if ((name.startsWith("eval/") || recorded === null) && evaluated !== null) {
      const first = detail.evaluation_steps[0];
      go(link("compare", [], {a: `run:${run}@${first}`, b: `run:${run}@${evaluated}`}));
    } else if (recorded !== null) {
      go(link("group", [run, recorded, 0]));
    }
  };
  return html`<${Chart} title=${name} lines=${lines} markers=${markers} log=${settings.log} xLabel=${X_LABEL[settings.axis]} onPick=${open} />`;
}

/** Content that is drawn when it comes near the screen. Its place has a fixed height. */
function OnScreen({children}) {
  const place = useRef(null);
  const [seen, setSeen] = useState(false);
  useEffect(() => {
    const observer = new IntersectionObserver(([entry]) => entry.isIntersecting && setSeen(true), {rootMargin: "400px"});
    observer.observe(place.current);
    return () => observer.disconnect();
  }, []);
  return html`<div class="card chart-card" ref=${place}>${seen && children}</div>`;
}
