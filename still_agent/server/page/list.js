// The sessions at the left, newest first: a page at a time as one scrolls, found by name on the
// server, so that ten thousand of them are as quick as ten.

import { ask } from "./api.js";
import { $, ago, count, el, roving } from "./dom.js";

const PAGE = 50;
const PAUSE_MS = 150; // in typing, before it is searched

let current = null;
let more = false;
let loading = null; // the newest request; what an older one brings is late
let events; // {open(name), remove(name), fail(error)}

/** Begin: what to do when a session is chosen or to be deleted, and when the server fails. */
export function start(handlers) {
  events = handlers;
  roving($("sessions"), ".session");
  let pause;
  $("find").addEventListener("input", () => {
    clearTimeout(pause);
    pause = setTimeout(load, PAUSE_MS);
  });
  $("sessions").addEventListener("scroll", () => {
    const { scrollTop, scrollHeight, clientHeight } = $("sessions");
    if (more && !loading && scrollTop + clientHeight > scrollHeight - 400) page();
  });
}

/** The first page anew. */
export async function load() {
  await page(true);
}

/** The first page anew, unless one is looking further down. Nobody asked: a failure is not told. */
export async function freshen() {
  if ($("sessions").scrollTop < 100) await page(true, true);
}

/** Mark the session that is open. */
export function mark(name) {
  current = name;
  for (const item of $("sessions").querySelectorAll(".session")) {
    if (item.dataset.name === name) item.setAttribute("aria-current", "true");
    else item.removeAttribute("aria-current");
  }
}

async function page(first = false, quiet = false) {
  const mine = (loading = {});
  const query = new URLSearchParams({ limit: PAGE });
  const last = $("sessions").lastElementChild?.querySelector(".session")?.dataset.name;
  if ($("find").value) query.set("q", $("find").value);
  if (!first && last !== undefined) query.set("after", last);
  try {
    const { data, has_more } = await ask("GET", `/v1/sessions?${query}`);
    if (loading !== mine) return;
    more = has_more;
    const lines = data.map(line);
    const focused = $("sessions").contains(document.activeElement);
    const held = document.activeElement.dataset.name;
    if (first) $("sessions").replaceChildren(...lines);
    else $("sessions").append(...lines);
    if (!$("sessions").firstChild) {
      const nothing = $("find").value ? "No session of that name." : "No session yet.";
      $("sessions").append(el("li", { class: "nothing" }, nothing));
    }
    const items = [...$("sessions").querySelectorAll(".session")];
    if (items.length && !items.some((item) => item.tabIndex === 0)) items[0].tabIndex = 0;
    mark(current);
    if (first && focused) (items.find((item) => item.dataset.name === held) ?? $("find")).focus();
  } catch (error) {
    if (loading === mine && !quiet) events.fail(error);
  } finally {
    if (loading === mine) loading = null;
  }
}

function line({ id, tokens, slots, updated }) {
  return el(
    "li", {},
    el(
      "button",
      { type: "button", class: "session", tabindex: -1, "data-name": id, title: id,
        onclick: () => events.open(id) },
      el("span", { class: "name" }, id),
      el("span", { class: "facts" },
        `${count(tokens)} tokens · ${count(slots)} slots · ${ago(updated)}`),
    ),
    el("button", { type: "button", class: "quiet delete", "aria-label": `Delete ${id}`,
      title: "Delete", onclick: () => events.remove(id) }, "×"),
  );
}
