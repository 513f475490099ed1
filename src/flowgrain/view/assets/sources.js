// Two sources of images that are compared: evaluations of runs, and models of `flowgrain evaluate`.

import {html, useMemo} from "preact";
import {apiPath, imageUrl, useAll, useGet} from "view/api.js";
import {setQuery, useRoute} from "view/router.js";
import {Select} from "view/ui.js";

/** The sources of a page: all of them, the chosen two, and their common images.
 *
 * Without a choice, these are the first source and the last one of the same run. `pairs` are `{text, a, b}` with
 * the places of the same prompt in both sources.
 */
export function usePair() {
  const {query} = useRoute();
  const {data, error} = useGet("/api/sources");
  const sources = data?.sources ?? [];
  const [a, b] = chosen(sources, query);
  const [first, second] = useAll([a && apiPath("sources", a.id), b && apiPath("sources", b.id)]);
  const pairs = useMemo(
    () => (a && b && first.data && second.data ? commonPlaces(a, b, first.data, second.data) : []),
    [a?.id, b?.id, first.data, second.data],
  );
  const loading = !data || Boolean(a && b && !(first.data && second.data));
  return {sources, a, b, pairs, scores: [first.data?.scores ?? {}, second.data?.scores ?? {}], loading, error: error ?? first.error ?? second.error};
}

function chosen(sources, query) {
  const find = (id) => sources.find((source) => source.id === id);
  const near = sources.filter((source) => !query.of || source.id.includes(query.of));
  const a = find(query.a) ?? near.find((source) => partners(sources, source).length) ?? near[0];
  const others = a ? partners(sources, a) : [];
  const b = find(query.b) ?? others.findLast((source) => source.run === a.run) ?? others.at(-1);
  return [a, b];
}

/** The other sources that show the same prompts with the same noise. */
export function partners(sources, source) {
  return sources.filter((other) => other.id !== source.id && comparable(other, source));
}

export const comparable = (a, b) => a.prompts_key === b.prompts_key && a.seed === b.seed;

/** Places of the same prompt. Repeated prompts are matched in their order. */
function commonPlaces(a, b, first, second) {
  const places = new Map();
  second.prompts.slice(0, b.images).forEach((text, i) => places.set(text, [...(places.get(text) ?? []), i]));
  return first.prompts.slice(0, a.images).flatMap((text, i) => {
    const place = places.get(text)?.shift();
    return place === undefined ? [] : [{key: i, text, a: i, b: place}];
  });
}

/** The address of an image of a source. */
export const sourceImage = (source, place) => imageUrl(`${apiPath("sources", source.id)}/${place}.webp`);

/** Selects of the two sources. Sources that share prompts and noise with the first come first. */
export function PairPicker({sources, a, b}) {
  const options = (of) => of.map((source) => [source.id, source.label]);
  const same = partners(sources, a);
  const others = sources.filter((source) => source.id !== a.id && !same.includes(source));
  return html`<${Select} label="A" wide value=${a.id} options=${options(sources)} onChange=${(id) => setQuery({a: id, b: b?.id})} />
    <${Select} label="B" wide value=${b?.id ?? ""} options=${[...(b ? [] : [["", "choose a source"]]), ...options(same), ...others.map((source) => [source.id, `${source.label} (other prompts or noise)`])]}
      onChange=${(id) => setQuery({a: a.id, b: id})} />`;
}
