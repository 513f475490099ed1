// A line chart: hover shows the values, a click picks a point, dragging zooms.

import {html, useEffect, useRef, useState} from "preact";
import uPlot from "uplot";
import {number} from "view/format.js";
import {color, useTheme} from "view/theme.js";

const HEIGHT = 222;

/** A chart of lines over x.
 *
 * A line has `label`, `color` (a name of the style sheet), `x`, `y`, and optionally `low` and `high` (a band) and
 * `raw` (the values before smoothing). `markers` are `{x, label}` of vertical lines. `onPick(line, x)` gets the
 * point nearest to a click.
 */
export function Chart({title, lines, log, markers, xLabel, onPick}) {
  const holder = useRef(null);
  const plot = useRef(null);
  const theme = useTheme();
  const [hover, setHover] = useState(null);
  const aligned = align(lines, log);
  const latest = useRef();
  latest.current = {lines, aligned, markers, onPick, setHover};
  const shape = JSON.stringify([theme, log, lines.map((line) => [line.color, Boolean(line.low), Boolean(line.raw)])]);
  useEffect(() => {
    const element = holder.current;
    const size = () => ({width: Math.max(120, element.clientWidth), height: HEIGHT});
    const made = new uPlot({...size(), ...options(latest, log)}, latest.current.aligned.data, element);
    plot.current = made;
    const observer = new ResizeObserver(() => made.setSize(size()));
    observer.observe(element);
    return () => {
      observer.disconnect();
      made.destroy();
      plot.current = null;
    };
  }, [shape]);
  useEffect(() => {
    if (plot.current && plot.current.data !== aligned.data) update(plot.current, aligned.data);
  }, [lines, markers]);
  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    <div
      class="plot" ref=${holder} tabindex="0" role="img" aria-label=${describe(title, lines)}
      onKeyDown=${(event) => keys(event, plot.current, latest.current)}
      onBlur=${() => plot.current?.setCursor({left: -10, top: -10})}
    ></div>
    ${hover && html`<${Tooltip} hover=${hover} lines=${lines} xLabel=${xLabel} />`}
  </figure>`;
}

function Tooltip({hover, lines, xLabel}) {
  return html`<div class="tooltip ${hover.flip ? "flip" : ""}" style=${{left: `${hover.left}px`, top: `${hover.top}px`}}>
    <div class="faint">${xLabel} ${number(hover.x)}</div>
    ${hover.values.map(({line, value, low, high}) => html`<div key=${line} class="value ${line === hover.nearest ? "near" : ""}">
      <i class=${`swatch ${lines[line]?.color}`}></i><span>${lines[line]?.label}</span>
      <b>${number(value)}${low !== undefined && html` <small>${number(low, 3)} to ${number(high, 3)}</small>`}</b>
    </div>`)}
    ${hover.markers.map((label) => html`<div key=${label} class="alarm-text">▲ ${label}</div>`)}
  </div>`;
}

const describe = (title, lines) =>
  `${title}. ${lines.map((line) => `${line.label}: last value ${number(line.y.findLast((v) => v !== null))}`).join(". ")}`;

/** One list of x for all lines, as uPlot needs it, and the column of every line. */
function align(lines, log) {
  const xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, i) => [x, i]));
  const data = [xs];
  const columns = lines.map((line) => {
    const spread = (values) => {
      const column = new Array(xs.length).fill(undefined); // undefined joins, null is a gap
      line.x.forEach((x, i) => {
        const value = values[i];
        column[place.get(x)] = value === null || (log && value <= 0) ? undefined : value;
      });
      return data.push(column) - 1;
    };
    const found = {};
    for (const name of ["low", "high", "raw", "y"]) if (line[name]) found[name] = spread(line[name]);
    return found;
  });
  return {data, columns};
}

function options(latest, log) {
  const {lines, aligned} = latest.current;
  const series = [{}];
  const bands = [];
  lines.forEach((line, i) => {
    const columns = aligned.columns[i];
    for (const [name, column] of Object.entries(columns)) series[column] = style(line, name);
    if (columns.low) bands.push({series: [columns.high, columns.low], fill: color(line.color, 0.18)});
  });
  const font = "11px system-ui, sans-serif";
  const axis = {stroke: color("muted"), font, grid: {stroke: color("grid"), width: 1}, ticks: {show: false}};
  return {
    series, bands, legend: {show: false}, padding: [8, 12, 0, 0],
    scales: {x: {time: false}, y: {distr: log ? 3 : 1}},
    axes: [{...axis, size: 26, gap: 2, space: 56}, {...axis, size: 52, gap: 4, space: 30, values: (_, ticks) => ticks.map((v) => (v === null ? "" : number(v, 3)))}],
    cursor: {drag: {x: true, y: false}, sync: {key: "curves"}, points: {size: 7}},
    hooks: {
      setCursor: [(plot) => latest.current.setHover(hovered(plot, latest.current))],
      setSelect: [(plot) => (plot.zoomed = plot.select.width > 0)],
      draw: [(plot) => drawMarkers(plot, latest.current.markers)],
      ready: [(plot) => listen(plot, latest)],
    },
  };
}

function style(line, name) {
  const stroke = {low: "transparent", high: "transparent", raw: color(line.color, 0.28), y: color(line.color)}[name];
  return {
    stroke, width: name === "y" ? 1.75 : 1, spanGaps: true,
    points: {show: name === "y" && line.x.length <= 40, size: 4, fill: stroke},
  };
}

function listen(plot, latest) {
  let start = null;
  plot.over.addEventListener("pointerdown", (event) => (start = event.clientX));
  plot.over.addEventListener("click", (event) => {
    if (Math.abs(event.clientX - start) < 4) pick(plot, latest.current);
  });
  plot.over.addEventListener("dblclick", () => (plot.zoomed = false));
}

/** New data. A zoomed chart keeps its range. */
function update(plot, data) {
  const {min, max} = plot.scales.x;
  plot.batch(() => {
    plot.setData(data, !plot.zoomed);
    if (plot.zoomed) plot.setScale("x", {min, max});
  });
}

/** The values below the cursor, or null outside of the chart. */
function hovered(plot, {aligned, markers}) {
  const {left, top, idx} = plot.cursor;
  const active = plot.over.matches(":hover") || plot.root.parentElement === document.activeElement;
  if (left < 0 || idx == null || !active) return null;
  const values = aligned.columns.flatMap((columns, line) => {
    const at = closest(plot.data[columns.y], idx);
    if (at === null) return [];
    const range = columns.low ? {low: plot.data[columns.low][at], high: plot.data[columns.high][at]} : {};
    return [{line, at, value: plot.data[columns.y][at], ...range}];
  });
  if (!values.length) return null;
  const distance = ({value, at}) =>
    Math.hypot(plot.valToPos(value, "y") - top, plot.valToPos(plot.data[0][at], "x") - left);
  const near = values.reduce((best, value) => (distance(value) < distance(best) ? value : best));
  const close = markers.filter(({x}) => Math.abs(plot.valToPos(x, "x") - left) < 8);
  return {
    values: values.sort((a, b) => b.value - a.value).slice(0, 12), nearest: near.line, at: near.at, x: plot.data[0][near.at],
    markers: close.map(({label}) => label),
    left: plot.over.offsetLeft + left, top: plot.over.offsetTop, flip: left > plot.over.clientWidth / 2,
  };
}

/** The index of a value that is nearest to `idx`, or null. */
function closest(column, idx) {
  for (let by = 0; by < column.length; by += 1) {
    if (column[idx - by] !== undefined) return idx - by;
    if (column[idx + by] !== undefined) return idx + by;
  }
  return null;
}

function pick(plot, current) {
  const point = hovered(plot, current);
  if (point) current.onPick?.(current.lines[point.nearest], point.x);
}

function keys(event, plot, current) {
  if (!plot || event.ctrlKey || event.metaKey || event.altKey) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by) {
    const last = plot.data[0].length - 1;
    const to = Math.max(0, Math.min(last, plot.cursor.left < 0 ? last : (plot.cursor.idx ?? 0) + by));
    plot.setCursor({left: plot.valToPos(plot.data[0][to], "x"), top: 1});
  } else if (event.key === "Enter") {
    pick(plot, current);
  } else {
    return;
  }
  event.preventDefault();
}

function drawMarkers(plot, markers) {
  const {ctx, bbox} = plot;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = color("bad");
  ctx.setLineDash([4 * devicePixelRatio, 3 * devicePixelRatio]);
  for (const {x} of markers) {
    const left = plot.valToPos(x, "x", true);
    if (left < bbox.left || left > bbox.left + bbox.width) continue;
    const size = 5 * devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
    ctx.beginPath();
    ctx.moveTo(left, bbox.top - size);
    ctx.lineTo(left - size, bbox.top + size);
    ctx.lineTo(left + size, bbox.top + size);
    ctx.fill();
  }
  ctx.restore();
}
