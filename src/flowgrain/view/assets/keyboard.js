// Keys of a page, and the line that names them.

import {html, useEffect, useRef} from "preact";

const EDITABLE = "input:not([type=checkbox]):not([type=radio]), textarea, select, dialog";

/** Call `keys[event.key]` of a page. Keys in form fields and dialogs, and shortcuts, stay untouched. */
export function useKeys(keys) {
  const current = useRef(keys);
  current.current = keys;
  useEffect(() => {
    const press = (event) => {
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.target.closest?.(EDITABLE)) return;
      const action = current.current[event.key];
      if (!action) return;
      event.preventDefault();
      action(event);
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
}

/** The keys of a page: pairs of keys and what they do. */
export function Keys({of}) {
  return html`<p class="keys faint">
    ${of.map(([keys, action]) => html`<span key=${keys}>${keys.split(" ").map((k) => html`<kbd>${k}</kbd>`)} ${action}</span>`)}
  </p>`;
}
