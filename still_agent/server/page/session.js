// The open session: got from the server, and shown.

import { ask, at } from "./api.js";
import * as chart from "./chart.js";
import { fail, notice, working } from "./composer.js";
import { $, bytes, count, many } from "./dom.js";
import * as list from "./list.js";
import * as log from "./log.js";
import * as memory from "./memory.js";
import { corners, slotsOf, spansOf, tokensOf } from "./spans.js";
import { moments, state } from "./state.js";
import * as turns from "./turns.js";

const PAGE = 50; // turns that are shown at first
const MOST = 1000; // that the server gives at once

/** Open what the address names. */
export async function follow() {
  const wanted = addressed();
  if (wanted !== (state.name ?? "")) await open(wanted || null);
}

/** Open a session by its name, or none. */
export async function open(wanted) {
  state.name = wanted;
  state.session = null;
  state.said = [];
  $("side").classList.remove("open");
  $("shade").hidden = true;
  $("menu").setAttribute("aria-expanded", "false");
  if (addressed() !== (state.name ?? "")) {
    history.pushState(null, "", state.name === null ? "#" : `#${encodeURIComponent(state.name)}`);
  }
  list.mark(state.name);
  notice("");
  if (state.name !== null) {
    try {
      await refresh();
      turns.newest();
      return;
    } catch (error) {
      if (state.name !== wanted) return;
      state.name = null;
      fail(error);
    }
  }
  show();
}

/** Get the open session as the server has it, and show that. moved: let the change be seen. */
export async function refresh(moved = false) {
  const wanted = state.name;
  const found = await ask("GET", at(wanted));
  const last = state.said.at(-1);
  let told = [];
  if (last && last.number <= found.turns) {
    told = await turnsFrom(wanted, last.number - 1, found.turns);
    if (told[0]?.text !== last.text || told[0]?.created !== last.created) told = [];
  }
  const kept = told.length ? state.said.slice(0, -1) : [];
  if (!told.length) told = await turnsFrom(wanted, Math.max(0, found.turns - PAGE), found.turns);
  if (state.name !== wanted) return; // another was opened meanwhile
  state.session = found;
  state.budget = found.budget;
  state.said = [...kept, ...told];
  show(moved);
}

/** Turns [after, until) of a session, numbered from 0, with the steps of their compactions. */
async function turnsFrom(wanted, after, until) {
  const found = [];
  while (after + found.length < until) {
    const limit = Math.min(MOST, until - after - found.length);
    const query = `/turns?after=${after + found.length}&limit=${limit}`;
    const { data } = await ask("GET", at(wanted, query));
    found.push(...data.map((one) => ({ ...one, steps: one.usage.steps ?? [] })));
    if (!data.length) break; // somebody has rewound meanwhile
  }
  return found;
}

/** Show the open session. */
export function show(moved = false) {
  const { name, session, said, budget } = state;
  const run = state.run?.name === name ? state.run : null;
  $("name").textContent = name ?? "";
  document.title = name === null ? "Still Agent" : `${name} · Still Agent`;
  document.body.classList.toggle("empty", session === null);
  for (const id of ["memory", "watch"]) $(id).hidden = session === null;
  $("earlier").hidden = !said.length || said[0].number <= 1;
  turns.show(said, moments.get(name) ?? new Map());
  if (run) $("turns").append(...run.draft.items);
  working();
  if (session === null) {
    $("figures").textContent = "";
    return;
  }
  state.spans = run ? run.spans : spansOf(session.layout);
  state.path = run ? run.path : corners(said, session.tokens, session.slots, budget);
  memory.show(state.spans, budget, moved);
  chart.draw(state.path, budget);
  log.show(name, said);
  for (const event of run ? run.compactions : []) log.add(event);
  figures();
}

/** The line of figures. */
export function figures() {
  const { session, spans, budget } = state;
  const tokens = tokensOf(spans);
  const rounds = Math.max(0, ...spans.map((span) => span.rounds));
  $("figures").textContent = [
    `${many(tokens, "token")} seen`,
    `${count(Math.round(slotsOf(spans)))} of ${count(budget)} slots`,
    tokens === session.tokens
      ? `${bytes(session.bytes)} kept; a full cache takes ${bytes(session.full_bytes)}` : "",
    rounds ? `up to ${many(rounds, "round")}` : "",
  ].filter(Boolean).join(" · ");
}

/** Begin a session, and open it; whether there is one now. */
export async function begin(id, system) {
  try {
    const body = system ? { id, system } : { id };
    await ask("POST", "/v1/sessions", body);
    list.load();
    await open(id);
    return true;
  } catch (error) {
    fail(error);
    return false;
  }
}

/** Show turns from before those that are shown. */
export async function earlier() {
  const { name, said } = state;
  const first = said[0].number - 1;
  try {
    const before = await turnsFrom(name, Math.max(0, first - PAGE), first);
    if (state.said !== said) return; // another was opened meanwhile
    state.said = [...before, ...said];
    show();
  } catch (error) {
    fail(error);
  }
}

/** The session that the page's address names. */
function addressed() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return ""; // an address that nobody was given
  }
}
