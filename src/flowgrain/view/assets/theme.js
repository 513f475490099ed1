// Light and dark colors: those of the system, or the chosen ones.

import {useEffect, useState} from "preact";

const KEY = "flowgrain-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** The stored choice: "light", "dark" or "" for the system. */
export function theme() {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

/** Show and store a choice. */
export function setTheme(value) {
  document.documentElement.dataset.theme = value;
  try {
    localStorage.setItem(KEY, value);
  } catch {
    // the choice lasts until the page is closed
  }
  dispatchEvent(new Event("themechange"));
}

/** Number of changes of the colors. Drawings on a canvas are drawn again when it changes. */
export function useTheme() {
  const [changes, setChanges] = useState(0);
  useEffect(() => {
    const change = () => setChanges((old) => old + 1);
    addEventListener("themechange", change);
    system.addEventListener("change", change);
    return () => {
      removeEventListener("themechange", change);
      system.removeEventListener("change", change);
    };
  }, []);
  return changes;
}

/** A color of the style sheet, such as "noise", as a canvas can use it. */
export function color(name, alpha = 1) {
  const probe = document.createElement("span");
  probe.style.color = `color-mix(in srgb, var(--${name}) ${100 * alpha}%, transparent)`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}
