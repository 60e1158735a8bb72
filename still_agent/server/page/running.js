// The running turn: what is said or read, its reply and its compactions as they come, and its end.

import { at, turn } from "./api.js";
import * as chart from "./chart.js";
import { fail, fit, notice, working } from "./composer.js";
import { $, count } from "./dom.js";
import * as list from "./list.js";
import * as log from "./log.js";
import * as memory from "./memory.js";
import { begin, figures, refresh } from "./session.js";
import { compacted, grown, slotsOf, tokensOf } from "./spans.js";
import { moments, state } from "./state.js";
import * as turns from "./turns.js";

/** Say what is in the message box. */
export async function say() {
  const text = $("say").value;
  if (!(await ready("chat", text))) return;
  $("say").value = "";
  fit();
  await perform("/turns", { text }, new turns.Draft(text));
}

/** Have a text read, without a reply. */
export async function read(text) {
  if (!(await ready("text", text))) return;
  await perform("/read", { text }, new turns.Draft(text, true), true);
}

/** Whether a turn can begin; in a new session, if none is open. */
async function ready(kind, text) {
  if (state.run || !text.trim()) return false;
  if (state.name !== null) return state.session !== null; // and not still on its way
  return begin(`${kind} ${new Date().toISOString().slice(0, 19)}`);
}

/** Run one turn, and show it as it goes. */
async function perform(what, body, draft, reading = false) {
  const { name, spans, path } = state;
  const controller = new AbortController();
  const mine = (state.run = { name, draft, controller, spans, path, compactions: [] });
  const began = performance.now();
  let moment = null;
  let reply = "";
  notice("");
  working();
  try {
    for await (const event of turn(at(name, what), body, controller.signal)) {
      if (event.still?.compaction) compaction(event.still.compaction, reading);
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      if (moment === null) {
        moment = performance.now() - began;
        draft.say("replying…");
      }
      reply += piece;
      draft.add(piece);
      live(grown(mine.spans, 1));
    }
    state.run = null;
    await settle(mine, { moment, spoken: reading ? "The text was read." : reply });
  } catch (error) {
    state.run = null;
    const stopped = controller.signal.aborted;
    await settle(mine, { spoken: "" });
    const left = reading ? "what was saved of the text stays" : "the turn was undone";
    if (stopped) notice(`Stopped; ${left}.`);
    else fail(error);
    if (!reading && !$("say").value) $("say").value = body.text;
    fit();
  }
}

/** A turn has ended, one way or the other: show what the server has. */
async function settle({ name: of, draft }, { moment = null, spoken }) {
  draft.remove();
  $("spoken").textContent = spoken;
  list.freshen();
  if (state.name !== of) return working();
  try {
    await refresh(true);
    if (moment !== null && state.said.at(-1)?.role === "assistant") {
      if (!moments.has(of)) moments.set(of, new Map());
      moments.get(of).set(state.said.at(-1).number, moment);
      turns.show(state.said, moments.get(of));
    }
    turns.newest();
  } catch (error) {
    fail(error);
  }
}

/** The running turn's memory was compacted, which comes when the budget is full. */
function compaction(event, reading) {
  const { run, budget } = state;
  const full = grown(run.spans, budget - slotsOf(run.spans));
  if (shown()) memory.show(full, budget);
  run.path.push([tokensOf(full), budget]);
  run.compactions.push(event);
  live(compacted(full, event), true);
  run.path.push([tokensOf(run.spans), slotsOf(run.spans)]);
  if (shown()) {
    chart.draw(run.path, budget);
    memory.flash(event.tokens_end, full.at(-1).start < event.tokens_end);
    log.add(event);
  }
  const { slots_before: before, slots_after: after } = event;
  run.draft.say(
    reading ? `reading… ${count(tokensOf(run.spans))} tokens seen`
      : `a compaction: ${count(before)} slots became ${count(after)}`,
  );
}

/** The running turn's slots are others. */
function live(next, move = false) {
  state.run.spans = next;
  if (!shown()) return;
  state.spans = next;
  memory.show(next, state.budget, move);
  figures();
}

/** Whether the running turn's session is the one that is shown. */
const shown = () => state.run.name === state.name && state.session !== null;

/** Stop it: the server undoes it. */
export const stop = () => state.run?.controller.abort();
