// Elements. Text is only ever set as text: nothing that a session, a message or an error says can
// become markup (the server's Content-Security-Policy forbids it once more).

export const $ = (id) => document.getElementById(id);

const SVG = "http://www.w3.org/2000/svg";

/** An element: `on…` properties are its listeners, the others its attributes. */
export function el(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** The same of SVG. */
export function svg(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const NUMBER = new Intl.NumberFormat("en");

/** 61322 as "61,322". */
export const count = (number) => NUMBER.format(number);

/** A number with its noun. */
export const many = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

/** Bytes in the largest unit that leaves a number of at least one. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; number >= 1024 && at < units.length - 1; at++) number /= 1024;
  return `${number < 10 && at ? number.toFixed(1) : Math.round(number)} ${units[at]}`;
}

/** Milliseconds, or seconds from one on. */
export const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

/** How long ago, in words; `then` in seconds since 1970. */
export function ago(then) {
  const seconds = Math.max(0, Date.now() / 1000 - then);
  if (seconds < 60) return "now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return new Date(then * 1000).toISOString().slice(0, 10);
}

/** Have arrow keys, Home and End move the focus among a container's children: one tab stop. */
export function roving(container, selector) {
  const all = () => [...container.querySelectorAll(selector)];
  const choose = (items, item) => {
    for (const other of items) other.tabIndex = other === item ? 0 : -1;
  };
  container.addEventListener("keydown", (event) => {
    const items = all();
    const at = items.indexOf(event.target.closest(selector));
    const to = {
      ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1,
      Home: 0, End: items.length - 1,
    }[event.key];
    if (at < 0 || to === undefined || !items[to]) return;
    event.preventDefault();
    choose(items, items[to]);
    items[to].focus();
  });
  container.addEventListener("focusin", (event) => {
    const item = event.target.closest(selector);
    if (item) choose(all(), item);
  });
}
