// What the pages Group and Tree share: a run, one of its recorded steps, and a prompt.

import {html} from "preact";
import {apiPath, useGet} from "view/api.js";
import {useKeys} from "view/keyboard.js";
import {go, link, useRoute} from "view/router.js";
import {Nothing, Pending, RunPicker, StepSlider, usePageRun} from "view/ui.js";

/** The run, step and prompt in the address of a page, the record of the step, and how to open another one. */
export function useRecordedStep(page) {
  const {parts, query} = useRoute();
  const {runs, run, error, loaded} = usePageRun(parts[0]);
  const detail = useGet(run && apiPath("runs", run));
  const steps = detail.data?.group_steps ?? [];
  const step = parts[1] ? Number(parts[1]) : (steps.at(-1) ?? null);
  const record = useGet(run && step !== null ? apiPath("runs", run, "groups", step) : null);
  const prompt = parts[2] ?? "0";
  const open = (to) => go(link(page, [run, to.step ?? step, to.prompt ?? prompt], query), {replace: true});
  const move = (by) => {
    const to = steps[steps.indexOf(step) + by];
    if (to !== undefined) open({step: to});
  };
  useKeys({"[": () => move(-1), "]": () => move(1)});
  return {page, query, runs, run, error, loaded, detail, steps, step, record, prompt, open};
}

/** The frame of such a page. `more` are further controls, `children` the page of a record. */
export function RecordedPage({state, keepQuery, more, keys, what, children}) {
  const {page, query, runs, run, error, loaded, detail, steps, step, record, open} = state;
  if (!loaded || error) return html`<${Pending} error=${error} what="runs" />`;
  if (!run) return html`<${Nothing}>There are no runs yet.</${Nothing}>`;
  const waiting = !record.data && !record.error && steps.length > 0;
  return html`<section class="page">
    <div class="controls">
      <${RunPicker} runs=${runs} value=${run} onChange=${(id) => go(link(page, [id], keepQuery ? query : undefined))} />
      ${steps.length > 0 && html`<${StepSlider} label="Training step" steps=${steps} value=${step} onChange=${(to) => open({step: to})} />`}
      ${more}
    </div>
    ${detail.error && html`<${Pending} error=${detail.error} />`}
    ${detail.data && !steps.length && html`<${Nothing}>
      This run has recorded no groups yet. training.record sets how many prompts and steps are recorded.
    </${Nothing}>`}
    ${record.error && html`<${Pending} error=${record.error} />`}
    ${waiting && html`<${Pending} what=${what} />`}
    ${record.data && children}
    ${keys}
  </section>`;
}
