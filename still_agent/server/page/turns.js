// The conversation: its turns, and the one that is being made.

import { $, count, el, many, time } from "./dom.js";

const LONG = 1000; // characters of a text that are shown at once
const BRIEF = 300; // while it is being read
const ROLES = { system: "System", user: "You", assistant: "Reply", tool: "Tool" };

let events; // {fork(number), rewind(number)}

/** Begin: what to do when a turn is to be forked from or rewound to. */
export function start(handlers) {
  events = handlers;
}

/** Show the turns. moments: of replies made here, ms to their first token, by number. */
export function show(turns, moments) {
  const last = turns.at(-1)?.number;
  $("turns").replaceChildren(...turns.map((turn) => entry(turn, turn.number === last, moments)));
}

/** Scroll to the newest turn. */
export function newest() {
  $("chat").scrollTop = $("chat").scrollHeight;
}

/** A turn that is being made: what was said, and a reply that grows. */
export class Draft {
  constructor(text, reading = false) {
    this.body = el("p", { class: "text" });
    this.state = el("p", { class: "facts" }, reading ? "reading…" : "prefilling…");
    this.items = [
      el("li", { class: "turn user" }, head("user"),
        el("p", { class: "text" }, clipped(text, reading ? BRIEF : LONG))),
      el("li", { class: "turn assistant draft", "aria-busy": "true" },
        head("assistant"), this.body, this.state),
    ];
    if (reading) this.items[1].classList.add("reading");
    $("turns").append(...this.items);
    newest();
  }

  add(piece) {
    const { scrollTop, scrollHeight, clientHeight } = $("chat");
    const follow = scrollTop + clientHeight > scrollHeight - 60;
    this.body.append(piece);
    if (follow) newest();
  }

  say(words) {
    this.state.textContent = words;
  }

  remove() {
    for (const item of this.items) item.remove();
  }
}


function entry(turn, last, moments) {
  const { number, role, text } = turn;
  const body = el("p", { class: "text" }, clipped(text));
  const item = el(
    "li", { class: `turn ${role}`, "data-number": number },
    head(role, number, [
      act("Fork", `Fork after turn ${number}`, () => events.fork(number)),
      act("Rewind", `Rewind to turn ${number}`, () => events.rewind(number), last),
    ]),
    body,
  );
  if (text.length > LONG) {
    const whole = el("button", { type: "button", class: "quiet" }, "Show all");
    whole.addEventListener("click", () => {
      body.textContent = text;
      whole.remove();
    });
    item.append(whole);
  }
  const facts = factsOf(turn, moments.get(number));
  if (facts) item.append(el("p", { class: "facts" }, facts));
  return item;
}

function factsOf({ role, tokens, usage }, moment) {
  if (role === "system") return `${many(tokens, "token")}, pinned`;
  const facts = [];
  if (usage.generated_tokens) {
    facts.push(`reused ${count(usage.reused_tokens)}`);
    facts.push(`prefilled ${count(usage.prefilled_tokens)}`);
    facts.push(`generated ${count(usage.generated_tokens)}`);
    if (moment !== undefined) facts.push(`first token after ${time(moment)}`);
  } else if (usage.prefilled_tokens) {
    facts.push(`read ${many(usage.prefilled_tokens, "token")}`);
  }
  if (usage.compactions) facts.push(many(usage.compactions, "compaction"));
  return facts.join(" · ");
}

function head(role, number, actions = []) {
  return el(
    "header", {},
    el("b", {}, ROLES[role] ?? role),
    number === undefined ? null : el("span", { class: "number" }, `turn ${number}`),
    ...actions,
  );
}

function act(name, label, onclick, disabled = false) {
  const rest = { type: "button", class: "quiet", disabled, onclick };
  return el("button", { ...rest, "aria-label": label }, name);
}

const clipped = (text, most = LONG) => (text.length > most ? `${text.slice(0, most)} …` : text);
