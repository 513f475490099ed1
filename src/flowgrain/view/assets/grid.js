// A grid of many images: only the rows on the screen exist in the document.

import {html, useEffect, useLayoutEffect, useRef, useState} from "preact";
import {Picture} from "view/ui.js";

const GAP = 8;
const ROWS_AROUND = 2;
const MOVES = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: "row", ArrowUp: "-row"};

/** A grid of cells of equal height.
 *
 * `render(item, index)` draws a cell. Its height is `aspect` times its width plus `text`. Lengths are in sixteenths
 * of a rem: pixels, which grow on large screens. The arrow keys move the focus.
 */
export function VirtualGrid({items, cellWidth, aspect = 1, text, render, label}) {
  const outer = useRef(null);
  const [view, setView] = useState({columns: 1, height: 300, first: 0, last: 12});
  const count = items.length;
  const measure = () => {
    const box = outer.current?.getBoundingClientRect();
    if (!box?.width) return;
    const unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    const columns = Math.max(1, Math.floor((box.width + GAP) / (cellWidth * unit + GAP)));
    const width = (box.width - GAP * (columns - 1)) / columns;
    const height = Math.ceil(width * aspect + text * unit) + GAP;
    const first = Math.max(0, Math.floor(-box.top / height) - ROWS_AROUND);
    const last = Math.max(0, Math.ceil((innerHeight - box.top) / height) + ROWS_AROUND);
    setView((old) => {
      const same = old.columns === columns && old.height === height && old.first === first && old.last === last;
      return same ? old : {columns, height, first, last};
    });
  };
  useLayoutEffect(measure, [count, cellWidth, aspect, text]);
  useEffect(() => {
    let frame = 0;
    const later = () => {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(measure);
    };
    const observer = new ResizeObserver(later);
    observer.observe(outer.current);
    addEventListener("scroll", later, {passive: true});
    addEventListener("resize", later);
    return () => {
      observer.disconnect();
      removeEventListener("scroll", later);
      removeEventListener("resize", later);
      cancelAnimationFrame(frame);
    };
  }, [cellWidth, aspect, text]);
  const {columns, height, first, last} = view;
  const from = Math.min(first, Math.floor(count / columns)) * columns;
  const shown = items.slice(from, last * columns);
  const move = (event) => {
    const step = MOVES[event.key];
    const cell = event.target.closest("[data-index]");
    if (step === undefined || !cell || event.target.closest("input, select")) return;
    event.preventDefault();
    const by = step === "row" ? columns : step === "-row" ? -columns : step;
    focusCell(outer.current, Math.min(count - 1, Math.max(0, Number(cell.dataset.index) + by)), columns, height);
  };
  return html`<div
    class="virtual" ref=${outer} role="list" aria-label=${label} onKeyDown=${move}
    style=${{height: `${Math.ceil(count / columns) * height}px`}}
  >
    <div class="rows" style=${{
      top: `${(from / columns) * height}px`,
      gridTemplateColumns: `repeat(${columns}, minmax(0, 1fr))`,
      gridAutoRows: `${height - GAP}px`,
    }}>
      ${shown.map(
        (item, i) => html`<div role="listitem" key=${item.key} data-index=${from + i}>${render(item, from + i)}</div>`,
      )}
    </div>
  </div>`;
}

function focusCell(grid, index, columns, height) {
  const top = grid.getBoundingClientRect().top + Math.floor(index / columns) * height;
  const header = 60;
  if (top < header) scrollBy(0, top - header);
  else if (top + height > innerHeight) scrollBy(0, top + height - innerHeight);
  const focus = (tries) => {
    const target = grid.querySelector(`[data-index="${index}"] button`);
    if (target) target.focus({preventScroll: true});
    else if (tries) requestAnimationFrame(() => focus(tries - 1)); // the row is drawn after scrolling
  };
  focus(5);
}

/** An image over the whole page. `describe(item)` draws the text below it. */
export function Lightbox({items, index, onMove, onClose, describe}) {
  const dialog = useRef(null);
  const item = items[index];
  useEffect(() => {
    if (!dialog.current.open) dialog.current.showModal();
  }, []);
  const keys = (event) => {
    const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (by && items[index + by]) {
      event.preventDefault();
      onMove(index + by);
    }
  };
  return html`<dialog
    class="lightbox" ref=${dialog} aria-label="Image" onClose=${onClose} onKeyDown=${keys}
    onClick=${(event) => event.target === dialog.current && dialog.current.close()}
  >
    <div class="stage"><${Picture} key=${item.full} src=${item.full} alt=${item.alt} eager /></div>
    <div class="about">${describe(item)}</div>
    <div class="row">
      <button type="button" disabled=${index === 0} onClick=${() => onMove(index - 1)}>‹ Previous</button>
      <span class="faint">${index + 1} of ${items.length}</span>
      <button type="button" disabled=${index >= items.length - 1} onClick=${() => onMove(index + 1)}>Next ›</button>
      <button type="button" class="end" onClick=${() => dialog.current.close()}>Close</button>
    </div>
  </dialog>`;
}
