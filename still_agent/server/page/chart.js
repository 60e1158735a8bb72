// Tokens seen against slots held: the line of a full cache, and this session's.

import { $, count, svg } from "./dom.js";

const LEFT = 6;
const RIGHT = 6;
const TOP = 12;
const LOW = 18;

let drawn = null; // what was drawn last

new ResizeObserver(() => drawn && draw(...drawn)).observe($("chart"));

/** Draw [tokens, slots] corners, in a budget of `budget` slots, as large as there is room. */
export function draw(path, budget) {
  drawn = [path, budget];
  const { clientWidth: wide, clientHeight: high } = $("chart");
  if (!wide || !high) return;
  $("chart").setAttribute("viewBox", `0 0 ${wide} ${high}`);
  const [seen, held] = path.at(-1);
  const most = Math.max(seen, budget / 4, 1); // of both axes: a full cache has a slot a token
  const x = (tokens) => LEFT + (tokens / most) * (wide - LEFT - RIGHT);
  const y = (slots) => high - LOW - (slots / most) * (high - LOW - TOP);
  const points = path.map(([tokens, slots]) => `${x(tokens).toFixed(1)},${y(slots).toFixed(1)}`);
  const base = y(0).toFixed(1);
  const low = (tokens) => `${x(tokens).toFixed(1)},${base}`;
  const area = [low(path[0][0]), ...points, low(seen)].join(" ");

  const children = [
    svg("line", { class: "axis", x1: LEFT, y1: y(0), x2: wide - RIGHT, y2: y(0) }),
    svg("line", { class: "full", x1: x(0), y1: y(0), x2: x(seen), y2: y(seen) }),
    svg("polygon", { class: "area", points: area }),
    svg("polyline", { class: "held", points: points.join(" ") }),
    svg("circle", { class: "now", cx: x(seen), cy: y(held), r: 3 }),
    svg("text", { class: "small", x: LEFT, y: high - 5 }, "0"),
    svg("text", { class: "small", x: x(seen), y: high - 5, "text-anchor": anchor(x(seen), wide) },
      `${count(seen)} tokens`),
  ];
  if (budget < most) {
    children.unshift(
      svg("line", { class: "budget", x1: LEFT, y1: y(budget), x2: wide - RIGHT, y2: y(budget) }),
    );
  }
  if (seen > 1.3 * held) {
    const label = { class: "full-label", x: x(seen * 0.7) - 6, y: y(seen * 0.7) - 2 };
    children.push(svg("text", { ...label, "text-anchor": "end" }, "full cache"));
  }
  const above = Math.min(y(held), y(budget < most ? budget : held)) - 5;
  if (seen > 2.5 * held) {
    children.push(svg("text", { class: "held-label", x: wide - RIGHT, y: above,
      "text-anchor": "end" }, `${count(held)} slots`));
  }
  $("chart").replaceChildren(...children);
  $("chart").setAttribute(
    "aria-label",
    `${count(seen)} tokens seen; ${count(held)} slots held, a full cache has ${count(seen)}`,
  );
}

const anchor = (x, wide) => (x > wide - 70 ? "end" : x < 70 ? "start" : "middle");
