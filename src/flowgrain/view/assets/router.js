// Routes in the hash of the address: #/page/segment/segment?key=value

import {useEffect, useState} from "preact";

/** The route of the current address: `{page, parts, query}`. */
export function route() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...parts] = path.split("/").map(decode);
  return {page: page || "runs", parts, query: Object.fromEntries(new URLSearchParams(query))};
}

/** A part of an address without its percent signs. */
export function decode(segment) {
  try {
    return decodeURIComponent(segment);
  } catch {
    return segment; // a stray percent sign, for example of a shortened link
  }
}

/** The address of a page. Empty values of `query` are left out. */
export function link(page, parts = [], query = {}) {
  const path = [page, ...parts].map((part) => encodeURIComponent(part)).join("/");
  const set = Object.entries(query).filter(([, value]) => value !== "" && value != null);
  const search = new URLSearchParams(set).toString();
  return `#/${path}${search ? "?" + search : ""}`;
}

/** Go to an address. `replace` changes the current entry of the browser's history. */
export function go(address, {replace = false} = {}) {
  if (!replace) {
    location.hash = address;
  } else if (address !== location.hash) {
    history.replaceState(null, "", address);
    dispatchEvent(new HashChangeEvent("hashchange"));
  }
}

/** Change values of the query of the current address. */
export function setQuery(values, options = {replace: true}) {
  const {page, parts, query} = route();
  go(link(page, parts, {...query, ...values}), options);
}

/** The current route, as state of a component. */
export function useRoute() {
  const [current, setCurrent] = useState(route);
  useEffect(() => {
    const update = () => setCurrent(route());
    addEventListener("hashchange", update);
    return () => removeEventListener("hashchange", update);
  }, []);
  return current;
}
