// Pan and zoom of a drawing, with the pointer, the wheel and keys.

import {useEffect, useLayoutEffect, useRef, useState} from "preact";

const SCALES = [0.02, 6];
const MOVED = 4;

/** State of a drawing of `width` times `height` in an element.
 *
 * It starts as wide as the element, with the place `middle` of the drawing in the middle. Give `ref` to the element and `transform` to a group of the SVG. `area` are the visible top and bottom in the
 * drawing. The wheel scrolls, and with Ctrl it zooms. `dragged()` tells whether a click ended a drag.
 */
export function usePanZoom({width, height, margin, middle}) {
  const ref = useRef(null);
  const drag = useRef({pointers: new Map(), moved: 0});
  const [view, setView] = useState({x: margin, y: margin, scale: 1, high: 600, wide: 900});
  const change = (update) => setView((old) => limited({...old, ...update(old)}, {width, height, margin}));
  const around = (factor, px, py) =>
    change((old) => {
      const scale = Math.min(SCALES[1], Math.max(SCALES[0], old.scale * factor));
      const ratio = scale / old.scale;
      return {scale, x: px - (px - old.x) * ratio, y: py - (py - old.y) * ratio};
    });
  const center = (factor) => around(factor, view.wide / 2, view.high / 2);
  const fit = () =>
    change((old) => {
      const scale = Math.min(1.5, (old.wide - 2 * margin) / width, (old.high - 2 * margin) / height);
      return {scale, x: margin, y: margin};
    });
  const start = () =>
    change((old) => {
      const scale = Math.min(1.5, (old.wide - 2 * margin) / width);
      return {scale, x: margin, y: old.high / 2 - middle * scale};
    });
  const latest = useRef();
  const limit = (next) => limited(next, {width, height, margin});
  latest.current = {around, change, view, limit};

  useLayoutEffect(() => {
    const element = ref.current;
    const measure = () => setView((old) => ({...old, wide: element.clientWidth, high: element.clientHeight}));
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  useLayoutEffect(start, [width]);
  useEffect(() => listen(ref.current, drag.current, latest), []);

  const area = {top: (-view.y - 60) / view.scale, bottom: (view.high - view.y + 60) / view.scale};
  const show = (x, y) =>
    change((old) => {
      const [px, py] = [old.x + x * old.scale, old.y + y * old.scale];
      const to = {};
      if (px < margin || px > old.wide - 100) to.x = old.wide / 2 - x * old.scale;
      if (py < margin || py > old.high - margin) to.y = old.high / 2 - y * old.scale;
      return to;
    });
  return {
    ref, area, scale: view.scale, x: view.x, fit, show,
    in: () => center(1.3), out: () => center(1 / 1.3),
    dragged: () => drag.current.moved > MOVED,
    transform: `translate(${view.x} ${view.y}) scale(${view.scale})`,
  };
}

/** Keep a part of the drawing in sight. */
function limited(view, {width, height, margin}) {
  const between = (value, size, space) => {
    const low = Math.min(margin, space - size - margin);
    return Math.max(low, Math.min(Math.max(margin, space - size - margin), value));
  };
  return {...view, x: between(view.x, width * view.scale, view.wide), y: between(view.y, height * view.scale, view.high)};
}

function listen(element, drag, latest) {
  const at = (event) => {
    const box = element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const down = (event) => {
    if (event.button !== 0) return;
    if (!drag.pointers.size) drag.moved = 0;
    drag.pointers.set(event.pointerId, at(event));
  };
  const move = (event) => {
    const before = drag.pointers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    drag.moved += Math.abs(dx) + Math.abs(dy);
    const other = [...drag.pointers].find(([id]) => id !== event.pointerId)?.[1];
    drag.pointers.set(event.pointerId, now);
    if (other) latest.current.around(distance(now, other) / distance(before, other), ...other);
    else latest.current.change((old) => ({x: old.x + dx, y: old.y + dy}));
  };
  const up = (event) => drag.pointers.delete(event.pointerId);
  const wheel = (event) => {
    const {around, change, view, limit} = latest.current;
    if (event.ctrlKey || event.metaKey) {
      around(Math.exp(-event.deltaY * 0.01), ...at(event));
    } else {
      const by = (old) => ({x: old.x - event.deltaX, y: old.y - event.deltaY});
      const next = limit({...view, ...by(view)});
      if (next.x === view.x && next.y === view.y) return; // at the end, the page scrolls
      change(by);
    }
    event.preventDefault();
  };
  const on = [[element, "pointerdown", down], [window, "pointermove", move], [window, "pointerup", up], [window, "pointercancel", up]];
  on.forEach(([target, name, listener]) => target.addEventListener(name, listener));
  element.addEventListener("wheel", wheel, {passive: false});
  return () => {
    on.forEach(([target, name, listener]) => target.removeEventListener(name, listener));
    element.removeEventListener("wheel", wheel);
  };
}

const distance = ([ax, ay], [bx, by]) => Math.max(1, Math.hypot(ax - bx, ay - by));
