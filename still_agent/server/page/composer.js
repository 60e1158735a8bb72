// The message box, and what is told above it.

import { Failure } from "./api.js";
import { $ } from "./dom.js";
import { state } from "./state.js";

let locked = async () => {};
let asking = false;

/** What to do when the server wants a key. */
export function whenLocked(unlock) {
  locked = unlock;
}

/** Tell something in words; "" takes it away. */
export function notice(words) {
  $("notice").textContent = words;
}

/** Tell of a failure. What is no Failure is a mistake of this page, and is raised again. */
export async function fail(error) {
  if (!(error instanceof Failure)) throw error;
  notice(error.message);
  if (error.status !== 401 || asking) return;
  asking = true;
  await locked();
  asking = false;
}

/** Show whether a turn is running. */
export function working() {
  const { name, run } = state;
  $("stop").hidden = run === null;
  $("send").hidden = run !== null;
  $("read").disabled = run !== null;
  $("stop").textContent = run && run.name !== name ? `Stop “${run.name}”` : "Stop";
}

/** As high as what is written in it. */
export function fit() {
  $("say").style.height = "auto";
  $("say").style.height = `${Math.min($("say").scrollHeight + 2, 200)}px`;
}
