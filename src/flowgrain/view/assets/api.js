// Data of the pages: from the server, or from the object inside a static export.

import {useEffect, useState} from "preact";

const embedded = document.getElementById("data");
const data = embedded ? JSON.parse(embedded.textContent) : null;
export const exported = data !== null;

const cache = new Map();
const CACHE_SIZE = 300;
const listeners = new Set();

/** The URL of a path of segments: every segment is encoded, so that run ids may contain slashes. */
export const apiPath = (...segments) => "/api/" + segments.map(encodeURIComponent).join("/");

/** The address of an image: the path itself, or the data URI of a static export. */
export const imageUrl = (path) => (exported ? (data[path] ?? data[path.split("?")[0]] ?? "") : path);

/** The JSON of `path`. Answers are kept until `forget` drops them. */
export function get(path) {
  if (exported) return fromExport(path);
  if (!cache.has(path)) {
    if (cache.size >= CACHE_SIZE) cache.delete(cache.keys().next().value);
    const answer = request(path);
    answer.catch(() => cache.delete(path));
    cache.set(path, answer);
  }
  return cache.get(path);
}

async function fromExport(path) {
  const [bare, query] = path.split("?");
  const found = data[path] ?? data[bare];
  if (found === undefined) throw new Error("This part of the run is not in the exported file.");
  const keys = new URLSearchParams(query).get("keys")?.split(",");
  if (!keys || !found.columns) return found;
  return {...found, columns: Object.fromEntries(keys.map((key) => [key, found.columns[key]]))};
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is `flowgrain view` still running?");
  }
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(body.error ?? body.detail ?? `${path}: status ${response.status}`);
  return body;
}

/** Store a vote of the arena. */
export async function postVote(vote) {
  const headers = {"Content-Type": "application/json", "X-Flowgrain": "1"};
  await request("/api/votes", {method: "POST", headers, body: JSON.stringify(vote)});
  forget((path) => path.startsWith("/api/votes"));
}

function forget(stale) {
  for (const path of cache.keys()) if (stale(path)) cache.delete(path);
}

/** Call `listener({runs, connected})` when files of runs have changed, or the connection has. */
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/** Follow the changes that the server reports. At most one update a second reaches the pages. */
export function followChanges() {
  if (exported) return;
  const changed = new Set();
  let timer = null;
  let lost = false;
  const tell = (connected) => {
    timer = null;
    const runs = [...changed];
    changed.clear();
    forget((path) => isStale(path, runs));
    for (const listener of [...listeners]) listener({runs, connected});
  };
  const events = new EventSource("/api/events");
  events.addEventListener("change", (event) => {
    for (const run of JSON.parse(event.data).runs) changed.add(run);
    timer ??= setTimeout(tell, 1000, true);
  });
  events.onopen = () => {
    if (lost) changed.add("*"); // changes may have been missed
    if (lost) tell(true);
    lost = false;
  };
  events.onerror = () => {
    lost = true;
    tell(false);
  };
}

const LISTS = ["/api/runs", "/api/sources"];

/** Whether the answer to `path` may have changed with the files of `runs`. "*" is every run. */
function isStale(path, runs) {
  if (!runs.length) return false;
  if (runs.includes("*") || LISTS.includes(path)) return true;
  return runs.some((run) => path.startsWith(apiPath("runs", run)));
}

/** State `{data, error}` of `path`. Earlier data of the same path stays visible during an update.
 *
 * Without a path (null), nothing is requested.
 */
export function useGet(path) {
  const [answer] = useAll([path]);
  return answer;
}

/** States `{data, error}` of several paths, in their order. */
export function useAll(paths) {
  const key = paths.join("\n");
  const [state, setState] = useState({});
  useEffect(() => {
    let current = true;
    const wanted = key.split("\n").filter(Boolean);
    const load = (path) =>
      get(path).then(
        (found) => current && setState((old) => put(old, wanted, path, {data: found})),
        (error) =>
          current && setState((old) => put(old, wanted, path, {...old[path], error: error.message})),
      );
    wanted.forEach(load);
    const stop = onChange(({runs}) => wanted.filter((path) => isStale(path, runs)).forEach(load));
    return () => {
      current = false;
      stop();
    };
  }, [key]);
  return paths.map((path) => (path && state[path]) || {});
}

function put(old, wanted, path, value) {
  if (old[path] && old[path].data === value.data && !value.error && !old[path].error) return old;
  const kept = Object.fromEntries(wanted.filter((p) => old[p]).map((p) => [p, old[p]]));
  return {...kept, [path]: value};
}
