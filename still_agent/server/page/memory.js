// The memory made visible: above, the conversation's tokens; below, the slots of the budget; and
// between them, which tokens each span of slots stands for. A change moves: from the slots that the
// same tokens took before to those they take now.

import { $, count, el, many, roving, svg } from "./dom.js";
import { slotsBefore, slotsOf, tokensOf } from "./spans.js";

const MOVE_MS = 650;
const WIDE = 1000; // of the funnel, in its own units
const HIGH = 36;
const LEVELS = 6; // colours
const HINT = matchMedia("(hover: none)").matches
  ? "Tap a span to see what it holds."
  : "Point at a span, or go to it with Tab and the arrow keys, to see what it holds.";

const still = matchMedia("(prefers-reduced-motion: reduce)");

let spans = [];
let budget = 1;
let from = []; // slots of each span where its movement began
let began = 0;
let frame = 0;
let parts = []; // {button, wedge} of each span

roving($("bar"), "button");
$("span").textContent = HINT;

/** Show spans in a budget of `most` slots. move: let the change be seen. */
export function show(next, most, move = false) {
  const shown = spans.map((span, n) => ({ ...span, slots: slotsNow(n) }));
  const same = next.length === spans.length && next.every((span, n) => span.end === spans[n].end);
  from = next.map((span) => (move && shown.length ? slotsBefore(shown, span) : span.slots));
  spans = next;
  budget = most;
  began = move && !still.matches ? performance.now() : -Infinity;
  if (!same) rebuild();
  parts.forEach(({ button, wedge }, n) => dress(button, wedge, spans[n]));
  legend();
  $("seen").textContent = count(tokensOf(spans));
  cancelAnimationFrame(frame);
  draw();
}

/** Mark the span that ends at a token as just compacted. raw: from raw slots, among others. */
export function flash(end, raw) {
  const part = parts[spans.findIndex((span) => span.end === end)];
  for (const element of part ? [part.button, part.wedge] : []) {
    element.classList.remove("fresh", "merged");
    void element.getBoundingClientRect(); // so that the animation begins anew
    element.classList.add("fresh", ...(raw ? [] : ["merged"]));
  }
}

/** A span in words. */
export function words({ share, level, slots, start, end, rounds }) {
  const tokens = `tokens ${count(start)} to ${count(end)}`;
  if (share === "pinned") return `Pinned: ${many(slots, "slot")}, ${tokens}, never compacted`;
  if (share === "tail") return `Raw: ${many(slots, "slot")}, ${tokens}, one each`;
  return (
    `Compact, tier ${level}: ${many(Math.round(slots), "slot")} for ${count(end - start)} tokens ` +
    `(${ratioOf({ slots, start, end })}×), ${tokens}, ${many(rounds, "round")}`
  );
}

/** Tokens a slot: 8, 10.7, 32. */
function ratioOf({ slots, start, end }) {
  const ratio = (end - start) / slots;
  return String(ratio < 20 ? Math.round(ratio * 10) / 10 : Math.round(ratio));
}

function slotsNow(n) {
  const part = Math.min(1, (performance.now() - began) / MOVE_MS);
  const eased = 1 - (1 - part) ** 3;
  return from[n] + (spans[n].slots - from[n]) * eased;
}

function rebuild() {
  const focused = parts.findIndex(({ button }) => button === document.activeElement);
  parts = spans.map((_, n) => ({
    button: el(
      "button",
      { type: "button", tabindex: n ? -1 : 0, onfocus: () => tell(n), onpointerenter: () => tell(n),
        onblur: untell, onpointerleave: untell },
      el("span"),
    ),
    wedge: svg("polygon"),
  }));
  $("bar").replaceChildren(
    ...parts.map(({ button }) => button),
    el("div", { id: "free", "aria-hidden": "true" }),
  );
  $("funnel").replaceChildren(...parts.map(({ wedge }) => wedge));
  if (focused >= 0) parts[Math.min(focused, parts.length - 1)]?.button.focus();
}

function dress(button, wedge, span) {
  const kind = span.share === "memory" ? `level-${Math.min(span.level, LEVELS - 1)}` : span.share;
  button.className = wedge.className.baseVal = kind;
  button.setAttribute("aria-label", words(span));
  button.firstChild.textContent =
    span.share === "memory" ? `${ratioOf(span)}×` : "";
}

function draw() {
  const tokens = tokensOf(spans) || 1;
  let slot = 0;
  spans.forEach((span, n) => {
    const slots = slotsNow(n);
    const { button, wedge } = parts[n];
    button.style.flexGrow = slots;
    const top = [span.start, span.end].map((token) => (token / tokens) * WIDE);
    const low = [slot, slot + slots].map((place) => (place / budget) * WIDE);
    const corners = [[top[0], 0], [top[1], 0], [low[1], HIGH], [low[0], HIGH]];
    wedge.setAttribute("points", corners.map(([x, y]) => `${x.toFixed(1)},${y}`).join(" "));
    slot += slots;
  });
  $("free").style.flexGrow = Math.max(0, budget - slot);
  const moving = performance.now() - began < MOVE_MS;
  $("memory").classList.toggle("moving", moving);
  if (moving) frame = requestAnimationFrame(draw);
}

function tell(n) {
  $("span").textContent = words(spans[n]);
  parts.forEach(({ wedge }, other) => wedge.classList.toggle("told", other === n));
}

function untell() {
  $("span").textContent = HINT;
  for (const { wedge } of parts) wedge.classList.remove("told");
}

function legend() {
  const held = (share) => slotsOf(spans.filter((span) => span.share === share));
  const levels = new Map();
  for (const { share, level, slots } of spans) {
    if (share === "memory") levels.set(level, (levels.get(level) ?? 0) + slots);
  }
  const compact = [...levels].sort(([a], [b]) => b - a).map(([level, slots]) => [
    `level-${Math.min(level, LEVELS - 1)}`, `compact, tier ${level}`, slots,
  ]);
  const lines = [["pinned", "pinned", held("pinned")], ...compact, ["tail", "raw", held("tail")]];
  lines.push(["free", "free", Math.max(0, budget - slotsOf(spans))]);
  $("legend").replaceChildren(...lines.map(([kind, name, slots]) => el(
    "li", {}, el("i", { class: kind }), `${name} `, el("b", {}, count(Math.round(slots))),
  )));
}
