// Arena: which of two images is better, without knowing which source made it.

import {html, useEffect, useMemo, useState} from "preact";
import {exported, get, postVote, useGet} from "view/api.js";
import {percent} from "view/format.js";
import {Keys, useKeys} from "view/keyboard.js";
import {comparable, PairPicker, sourceImage, usePair} from "view/sources.js";
import {Nothing, Pending, Picture} from "view/ui.js";

export function Arena() {
  const {sources, a, b, pairs: common, loading, error} = usePair();
  const pairs = useMemo(() => common.filter((pair) => pair.a === pair.b), [common]); // a vote has one place
  if (error || (loading && !a)) return html`<${Pending} error=${error} what="sources" />`;
  if (exported) return html`<${Nothing}>An exported file stores no votes. Use flowgrain view for the arena.</${Nothing}>`;
  if (!a) return html`<${Nothing}>There are no evaluations with images yet. Training evaluates before the first and after the last step.</${Nothing}>`;
  return html`<section class="page">
    <div class="controls"><${PairPicker} sources=${sources} a=${a} b=${b} /></div>
    ${!b && html`<${Nothing}>No other source shows the same prompts with the same noise. Select one for B.</${Nothing}>`}
    ${b && !comparable(a, b) && html`<p class="notice">A and B have other prompts or other noise. Only equal prompts at equal places are shown.</p>`}
    ${b && loading && html`<${Pending} what="images" />`}
    ${b && !loading && !pairs.length && html`<${Nothing}>A and B have no common prompt at the same place.</${Nothing}>`}
    ${pairs.length > 0 && html`<${Votes} key=${`${a.id} ${b.id}`} a=${a} b=${b} pairs=${pairs} />`}
  </section>`;
}

function Votes({a, b, pairs}) {
  const query = new URLSearchParams({a: a.id, b: b.id}).toString();
  const stored = useGet(`/api/votes?${query}`);
  const [round, setRound] = useState(null);
  const [shown, setShown] = useState(false);
  useEffect(() => {
    if (stored.data && !round) setRound(start(pairs, stored.data.votes));
  }, [stored.data]);
  if (!round) return html`<${Pending} error=${stored.error} what="votes" />`;
  const again = () => setRound({...start(pairs, []), earlier: 0});
  const done = round.place >= round.order.length;
  return html`<div>
    ${done
      ? html`<div class="card judged">
          <h1>${round.order.length || pairs.length} of ${pairs.length} images are judged</h1>
          <button type="button" onClick=${again}>Judge all again</button>
        </div>`
      : html`<${Question} a=${a} b=${b} round=${round} setRound=${setRound} />`}
    <div class="row">
      ${!done && html`<button type="button" aria-expanded=${shown} onClick=${() => setShown(!shown)}>${shown ? "Hide" : "Show"} the result</button>`}
      <a class="button" href=${`/api/votes/export?${query}`} download>Export the votes</a>
    </div>
    ${(shown || done) && html`<${Result} a=${a} b=${b} query=${query} votes=${round.place} />`}
  </div>`;
}

/** A round of questions: the images without a vote, in random order, with random sides. */
function start(pairs, votes) {
  const judged = new Set(votes.map((vote) => vote.place));
  const open = pairs.filter((pair) => !judged.has(pair.a));
  const order = open.map((pair) => ({pair, at: Math.random()})).sort((x, y) => x.at - y.at);
  return {order: order.map(({pair}) => ({pair, left: Math.random() < 0.5 ? "a" : "b"})), place: 0, earlier: pairs.length - open.length};
}

function Question({a, b, round, setRound}) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const {pair, left} = round.order[round.place];
  const right = left === "a" ? "b" : "a";
  const image = (side, of) => (side === "a" ? sourceImage(a, of.a) : sourceImage(b, of.b));
  const vote = async (choice) => {
    if (busy) return;
    setBusy(true);
    try {
      await postVote({a: a.id, b: b.id, place: pair.a, left, vote: choice});
      setError(null);
      setRound({...round, place: round.place + 1});
    } catch (caught) {
      setError(caught.message);
    }
    setBusy(false);
  };
  const keys = {ArrowLeft: () => vote(left), ArrowRight: () => vote(right), ArrowDown: () => vote("tie"), " ": () => vote("tie")};
  useKeys(keys);
  const following = round.order[round.place + 1]?.pair;
  useEffect(() => {
    if (following) for (const side of ["a", "b"]) new Image().src = image(side, following);
  }, [following]);
  return html`<div>
    <p class="faint" role="status">Image ${round.earlier + round.place + 1} of ${round.earlier + round.order.length}. Which one shows the prompt better?</p>
    <h1 class="prompt-title center">${pair.text}</h1>
    <div class="arena">
      ${[["left", left], ["right", right]].map(([name, side]) => html`<button type="button" class="choice-image" key=${name} disabled=${busy && "busy"} onClick=${() => vote(side)}>
        <${Picture} src=${image(side, pair)} alt=${`The ${name} image`} eager />
        <span>${name === "left" ? "← Left" : "Right →"}</span>
      </button>`)}
    </div>
    <p class="center"><button type="button" onClick=${() => vote("tie")}>↓ Equal</button></p>
    ${error && html`<p class="message bad" role="alert">The vote was not stored: ${error}</p>`}
    <${Keys} of=${[["←", "left is better"], ["→", "right is better"], ["↓ Space", "equal"]]} />
  </div>`;
}

/** The win rate of B with its interval. */
function Result({a, b, query, votes}) {
  const [{data, error}, setState] = useState({});
  useEffect(() => {
    get(`/api/votes?${query}`).then((found) => setState({data: found}), (caught) => setState({error: caught.message}));
  }, [query, votes]);
  if (!data) return html`<${Pending} error=${error} what="result" />`;
  const {mean, low, high} = data.win_rate ?? {};
  return html`<div class="card result">
    <h2>B wins ${percent(mean)}</h2>
    <p>95% confidence interval ${percent(low)} to ${percent(high)}. A tie counts half.</p>
    <div class="interval" role="img" aria-label=${`Win rate ${percent(mean)}, interval ${percent(low)} to ${percent(high)}`}>
      <i class="half"></i>
      ${mean != null && html`<i class="range" style=${{left: `${100 * low}%`, width: `${100 * (high - low)}%`}}></i><i class="point" style=${{left: `${100 * mean}%`}}></i>`}
    </div>
    <dl class="facts">
      <dt>A · ${a.label}</dt><dd>${data.wins_a} wins</dd>
      <dt>B · ${b.label}</dt><dd>${data.wins_b} wins</dd>
      <dt>ties</dt><dd>${data.ties}</dd>
    </dl>
  </div>`;
}
