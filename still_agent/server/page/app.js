// The page: its parts are put together, and begun.

import * as actions from "./actions.js";
import { ask, key } from "./api.js";
import { fail, fit, notice, whenLocked } from "./composer.js";
import * as dialogs from "./dialogs.js";
import { $ } from "./dom.js";
import * as list from "./list.js";
import { say, stop } from "./running.js";
import { earlier, follow, open, show } from "./session.js";
import { state } from "./state.js";
import * as turns from "./turns.js";

/** Ask for a key, and begin with it. */
async function unlock() {
  $("key").hidden = false;
  const given = await dialogs.ask({
    title: "API key",
    text: "It is kept for this tab, until it is closed.",
    fields: [{ name: "key", label: "Key", type: "password", value: key.get() }],
    action: "Use it",
  });
  if (!given) return;
  key.set(given.key.trim());
  await arrive();
}

/** Begin: the list, the model, and what the address names. */
async function arrive() {
  notice("");
  $("key").hidden = !key.get();
  await list.load();
  try {
    const { data } = await ask("GET", "/v1/models");
    $("model").textContent = data[0].id;
    state.name = null;
    await follow();
    if (state.name === null) show();
  } catch (error) {
    fail(error);
  }
}

turns.start(actions);
whenLocked(unlock);
list.start({ open, fail, remove: actions.remove });
$("new").addEventListener("click", actions.anew);
$("read").addEventListener("click", actions.textToRead);
$("key").addEventListener("click", unlock);
$("stop").addEventListener("click", stop);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  say();
});
$("say").addEventListener("input", fit);
$("say").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    say();
  }
  if (event.key === "Escape") stop();
});
$("earlier").addEventListener("click", earlier);
$("menu").addEventListener("click", () => {
  const opened = $("side").classList.toggle("open");
  $("shade").hidden = !opened;
  $("menu").setAttribute("aria-expanded", String(opened));
  if (opened) $("find").focus();
});
$("shade").addEventListener("click", () => $("menu").click());
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", actions.dropped);
addEventListener("hashchange", follow);
addEventListener("popstate", follow);
addEventListener("focus", () => list.freshen());
arrive();
