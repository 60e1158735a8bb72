// Each compaction as a line, newest first.

import { $, count, el, time } from "./dom.js";

const MOST = 200;

let owner = null; // whose compactions are shown
const seen = new Map(); // those of them watched here: rounds and time, which the turns do not tell

/** The lines of compactions that a session's turns tell of. */
export function show(name, turns) {
  if (name !== owner) seen.clear();
  owner = name;
  const events = turns.flatMap(({ number, steps }) => steps.map(
    ([tokens_start, tokens_end, slots_before, slots_after, level]) => (
      { tokens_start, tokens_end, slots_before, slots_after, level, number }
    ),
  )).map((event) => ({ ...seen.get(keyOf(event)), ...event }));
  $("log").replaceChildren(...events.slice(-MOST).reverse().map(line));
  if (!events.length) $("log").append(el("li", { class: "nothing" }, "None yet."));
}

/** One more, just now. */
export function add(event) {
  $("log").querySelector(".nothing")?.remove();
  seen.set(keyOf(event), event);
  const item = line(event);
  item.classList.add("fresh");
  $("log").prepend(item);
  if ($("log").childElementCount > MOST) $("log").lastElementChild.remove();
}

const keyOf = ({ tokens_start, tokens_end, slots_before, slots_after }) =>
  [tokens_start, tokens_end, slots_before, slots_after].join(" ");

function line(event) {
  const { tokens_start, tokens_end, slots_before, slots_after, level } = event;
  const facts = [`tokens ${count(tokens_start)}–${count(tokens_end)}`, `tier ${level}`];
  if (event.rounds !== undefined) facts.push(`round ${event.rounds}`);
  const marks = [];
  if (event.number !== undefined) marks.push(`turn ${event.number}`);
  if (event.seconds !== undefined) marks.push(time(event.seconds * 1000));
  return el(
    "li", {},
    el("b", {}, `${count(slots_before)} → ${count(slots_after)} slots`),
    el("span", { class: "number" }, marks.join(" · ")),
    el("span", { class: "facts" }, facts.join(" · ")),
  );
}
