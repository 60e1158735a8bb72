// What the user can do to sessions, each after a question that says what it does.

import { ask, at } from "./api.js";
import { fail, notice } from "./composer.js";
import * as dialogs from "./dialogs.js";
import { $, bytes, many } from "./dom.js";
import * as list from "./list.js";
import { read } from "./running.js";
import { begin, open, refresh } from "./session.js";
import { moments, state } from "./state.js";

/** A new session, as the user wants it. */
export async function anew() {
  const given = await dialogs.ask({
    title: "New session",
    fields: [
      { name: "id", label: "Name", required: true },
      { name: "system", label: "System prompt", type: "area",
        hint: "Optional. It is pinned: never compacted, and fixed for the state.session." },
    ],
    action: "Begin",
  });
  if (given && (await begin(given.id, given.system))) $("say").focus();
}

/** A session that begins where this one stood after a turn. */
export async function fork(number) {
  const given = await dialogs.ask({
    title: `Fork after turn ${number}`,
    text: "A new session that begins where this one stood then. Nothing is copied.",
    fields: [{ name: "id", label: "Its name", value: `${state.name} @${number}`, required: true }],
    action: "Fork",
  });
  if (!given) return;
  await doing(async () => {
    await ask("POST", at(state.name, "/fork"), { name: given.id, at: number });
    list.load();
    await open(given.id);
  });
}

/** Back to where this one stood after a turn. */
export async function rewind(number) {
  const later = state.session.turns - number;
  const sure = await dialogs.ask({
    title: `Rewind to turn ${number}`,
    text: `The ${many(later, "turn")} after it will leave this session.`,
    action: "Rewind",
    danger: true,
  });
  if (!sure) return;
  await doing(async () => {
    await ask("POST", at(state.name, "/rewind"), { at: number });
    for (const made of moments.get(state.name)?.keys() ?? []) {
      if (made > number) moments.get(state.name).delete(made);
    }
    state.said = state.said.filter((one) => one.number <= number);
    await refresh(true);
    list.load();
  });
}

/** A session less. */
export async function remove(id) {
  const sure = await dialogs.ask({
    title: "Delete this session?",
    text: `“${id}”: its text and memory leave the store. Forks keep what they share with it.`,
    action: "Delete",
    danger: true,
  });
  if (!sure) return;
  await doing(async () => {
    await ask("DELETE", at(id));
    if (id === state.name) await open(null);
    await list.load();
  });
}

/** Something that is no turn, and that excludes one. */
async function doing(work) {
  if (state.run) return notice("A turn is running; stop it first.");
  notice("");
  document.body.classList.add("busy");
  try {
    await work();
    $("say").focus();
  } catch (error) {
    fail(error);
  } finally {
    document.body.classList.remove("busy");
  }
}

/** A text, or a file, to be read. */
export async function textToRead() {
  const given = await dialogs.ask({
    title: "Read a text",
    text: "It is taken in without a reply, and one can watch it being compacted.",
    fields: [
      { name: "text", label: "Text", type: "area" },
      { name: "file", label: "Or a file", type: "file" },
    ],
    action: "Read",
  });
  if (given) await read(given.file ? await given.file.text() : given.text);
}

/** A file that was let fall on the page. */
export async function dropped(event) {
  const file = event.dataTransfer.files[0];
  if (!file) return;
  event.preventDefault();
  const sure = await dialogs.ask({
    title: "Read this file?",
    text: `“${file.name}”, ${bytes(file.size)}, is taken in without a reply.`,
    action: "Read",
  });
  if (sure) await read(await file.text());
}
