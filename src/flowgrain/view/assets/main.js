// The frame of all pages: navigation, colors, and the state of the connection.

import {html, render, useEffect, useErrorBoundary, useState} from "preact";
import {exported, followChanges, onChange} from "view/api.js";
import {Arena} from "view/pages/arena.js";
import {Compare} from "view/pages/compare.js";
import {Config} from "view/pages/config.js";
import {Curves} from "view/pages/curves.js";
import {Group} from "view/pages/group.js";
import {Runs} from "view/pages/runs.js";
import {Tree} from "view/pages/tree.js";
import {Choice} from "view/ui.js";
import {link, route, useRoute} from "view/router.js";
import {setTheme, theme} from "view/theme.js";

const PAGES = {
  runs: ["Runs", Runs],
  curves: ["Curves", Curves],
  group: ["Group", Group],
  tree: ["Tree", Tree],
  compare: ["Compare", Compare],
  arena: ["Arena", Arena],
  config: ["Configuration", Config],
};
const RECORDED = ["group", "tree"];
const THEMES = [["", "Auto"], ["light", "Light"], ["dark", "Dark"]];

function App() {
  const {page, parts} = useRoute();
  const [title, Page] = PAGES[page] ?? ["Not found", NotFound];
  useEffect(() => {
    document.title = `${[title, parts[0]].filter(Boolean).join(" · ")} · flowgrain`;
  }, [title, parts[0]]);
  useEffect(() => {
    document.querySelector("nav [aria-current]")?.scrollIntoView({block: "nearest", inline: "nearest"});
  }, [page]);
  return html`
    <a class="skip" href="#main" onClick=${skip}>Skip to the content</a>
    <header>
      <a class="brand" href="#/runs">flowgrain</a>
      <nav aria-label="Pages">
        ${Object.entries(PAGES).map(([name, [text]]) => html`<a
          key=${name} href=${pageLink(name)} aria-current=${name === page ? "page" : undefined}>${text}</a>`)}
      </nav>
      <${Connection} />
      <${ThemeChoice} />
    </header>
    <main id="main" tabindex="-1"><${Safe} key=${page}><${Page} /></${Safe}></main>
  `;
}

/** The link to a page. Group and Tree keep the run, the step and the prompt of each other. */
function pageLink(name) {
  const {page, parts} = route();
  if (RECORDED.includes(name) && RECORDED.includes(page)) return link(name, parts);
  return link(name);
}

function skip(event) {
  event.preventDefault(); // the hash is the route
  document.getElementById("main").focus();
}

const NotFound = () => html`<p class="message">This page does not exist. <a href="#/runs">Show the runs</a></p>`;

/** Shows an error of a page in place of the page. */
function Safe({children}) {
  const [error] = useErrorBoundary((caught) => console.error(caught));
  if (error) return html`<p class="message bad" role="alert">This page failed: ${error.message}</p>`;
  return children;
}

function Connection() {
  const [lost, setLost] = useState(false);
  useEffect(() => onChange(({connected}) => setLost(!connected)), []);
  if (exported) return html`<span class="connection faint">static export</span>`;
  return html`<span class="connection ${lost ? "bad" : "faint"}" role="status">${lost ? "● disconnected" : "● live"}</span>`;
}

function ThemeChoice() {
  const [value, setValue] = useState(theme);
  const choose = (to) => {
    setValue(to);
    setTheme(to);
  };
  return html`<div class="themes"><${Choice} label="Colors" value=${value} options=${THEMES} onChange=${choose} /></div>`;
}

document.documentElement.dataset.theme = theme();
render(html`<${App} />`, document.getElementById("app"));
followChanges();
